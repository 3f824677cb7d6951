"""The communicator on threads and over MPI: exactness, adjoints, counters, and how jobs with mistakes end."""

import subprocess
import sys
import time

import mpi_program_comm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.comm import ALGORITHMS, CommunicationError, hash_replicated
from executor.comm.loopback import run_loopback
from planner import admissible
from planner.errors import PlanError


@pytest.mark.parametrize("check", mpi_program_comm.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", mpi_program_comm.MODES)
def test_on_threads(check, size, mode):
    run_loopback(size, check, **mpi_program_comm.MODES[mode])


@pytest.mark.mpi
def test_over_mpi(launch):
    done = launch(4, "mpi_program_comm.py", *mpi_program_comm.MODES, timeout_seconds=100)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = f"passed {len(mpi_program_comm.CHECKS)} checks on 4 ranks"
    assert done.stdout.splitlines() == [f"{mode}: {passed}" for mode in mpi_program_comm.MODES]


@pytest.mark.mpi
def test_over_mpi_on_one_rank_without_mpirun():
    done = subprocess.run(
        [sys.executable, mpi_program_comm.__file__, "eager"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "on 1 ranks" in done.stdout


# Random programs over random meshes


@st.composite
def mesh_programs(draw):
    """A mesh of up to 16 ranks and a sequence of (axis, operation, algorithm, elements, blocking)."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda sizes: int(np.prod(sizes)) <= 16))
    operations = st.sampled_from([(operation, name) for operation, names in ALGORITHMS.items() for name in names])
    steps = draw(
        st.lists(st.tuples(st.integers(0, len(shape) - 1), operations, st.integers(0, 9), st.booleans()), max_size=6)
    )
    return tuple(shape), steps


def run_mesh_step(comm, groups, step, number):
    """Start one collective on integer data; return its request, its result and what that should be."""
    axis, (operation, algorithm), elements, blocking = step
    group = groups[axis]
    rng = np.random.default_rng([number, *group.ranks])
    counts = [int(count) for count in rng.integers(0, elements + 1, group.size)]
    data = rng.integers(-8, 9, (group.size, sum(counts))).astype(np.float32)
    send = data[group.rank].copy()
    part = np.empty(counts[group.rank], np.float32)
    whole = np.empty(sum(counts), np.float32)
    own = mpi_program_comm.cut(data[0], counts, group.rank).copy()
    summed = data.sum(0)
    options = {"algorithm": algorithm, "key": f"step{number}"}
    if operation == "broadcast":
        group.broadcast(send, group.size - 1, **options)
        return None, send, data[-1]
    prefix = "" if blocking else "i"
    call = getattr(group, prefix + operation)
    if operation == "all_reduce":
        return call(send, **options), send, summed
    if operation == "reduce_scatter":
        return call(send, part, counts, **options), part, mpi_program_comm.cut(summed, counts, group.rank)
    if operation == "all_gather":
        return call(own, whole, counts, **options), whole, data[0]
    sizes = rng.integers(0, elements + 1, (group.size, group.size))
    outgoing = np.repeat(np.arange(group.size) * 100 + group.rank, sizes[group.rank]).astype(np.float64)
    expected = np.repeat(group.rank * 100 + np.arange(group.size), sizes[:, group.rank]).astype(np.float64)
    incoming = np.empty_like(expected)
    return call(outgoing, incoming, sizes[group.rank], sizes[:, group.rank], **options), incoming, expected


def test_plans_may_name_the_algorithms_that_there_are():
    assert admissible.ALGORITHMS == ALGORITHMS


@settings(max_examples=60, deadline=None)
@given(program=mesh_programs(), synchronous_sends=st.booleans(), paranoid=st.booleans())
def test_random_programs_on_random_meshes(program, synchronous_sends, paranoid):
    shape, steps = program
    ranks = np.arange(int(np.prod(shape))).reshape(shape)

    def main(comm):
        coordinates = np.argwhere(ranks == comm.rank)[0]
        groups = []
        for axis in range(len(shape)):
            line = [*map(int, coordinates)]
            line[axis] = slice(None)
            groups.append(comm.group(map(int, ranks[tuple(line)]), f"axis{axis}"))
        running = [run_mesh_step(comm, groups, step, number) for number, step in enumerate(steps)]
        for request, result, expected in running:
            if request is not None:
                request.wait()
            np.testing.assert_array_equal(result, expected)

    run_loopback(ranks.size, main, synchronous_sends=synchronous_sends, paranoid=paranoid)


def test_scratch_memory_is_reused():
    def main(comm):
        for elements in (1000, 1000, 500, 1000):
            comm.world.all_reduce(np.zeros(elements), algorithm="ring")
            comm.world.ireduce_scatter(np.zeros(4 * elements), np.zeros(elements), algorithm="pairwise").wait()
        return sorted(block.nbytes for block in comm._record.scratch)

    assert run_loopback(4, main) == [[2000, 2000, 2000, 8000]] * 4


# Mistakes, on threads


def test_first_failure_ends_all_ranks_with_its_message():
    def main(comm):
        if comm.rank == 3:
            raise PlanError("tp=16 exceeds 12 heads")
        comm.world.barrier()

    start = time.monotonic()
    with pytest.raises(PlanError, match="tp=16") as caught:
        run_loopback(8, main)
    assert caught.value.__notes__ == ["raised on rank 3 of 8"]
    assert time.monotonic() - start < 2


def test_deadlock_is_found_at_once_and_described():
    def main(comm):
        peer = 1 - comm.rank
        comm.world.issend(np.zeros(2), peer, tag=7).wait()  # both wait before either receives
        comm.world.irecv(np.zeros(2), peer, tag=7).wait()

    start = time.monotonic()
    with pytest.raises(CommunicationError, match=r"deadlock(.|\n)*rank 0 waits for world send to rank 1, tag 7"):
        run_loopback(2, main)
    assert time.monotonic() - start < 2


def test_waiting_for_a_rank_that_returned_is_a_deadlock():
    def main(comm):
        if comm.rank:
            comm.world.irecv(np.zeros(1), 0).wait()

    with pytest.raises(CommunicationError, match=r"rank 1 waits for world receive(.|\n)*rank 0 has returned"):
        run_loopback(2, main)


def test_synchronous_sends_do_not_finish_early_and_eager_ones_do():
    def main(comm):
        finished = None
        if comm.rank == 0:
            request = comm.world.isend(np.ones(1), 1)
            finished = request.test()
            comm.world.barrier()
            request.wait()
        else:
            comm.world.barrier()
            comm.world.irecv(np.zeros(1), 0).wait()
        return finished

    assert run_loopback(2, main, synchronous_sends=True)[0] is False
    assert run_loopback(2, main, synchronous_sends=False)[0] is True


def test_synchronous_sends_expose_a_buffer_reused_too_early():
    def main(comm):
        value = np.ones(1)
        if comm.rank == 0:
            request = comm.world.isend(value, 1)
            value[:] = 2
            comm.world.barrier()
            request.wait()
        else:
            comm.world.barrier()
            comm.world.irecv(value, 0).wait()
        return value[0]

    assert run_loopback(2, main, synchronous_sends=True) == [2, 2]


def mismatched_operation(comm):
    if comm.rank == 1:
        comm.world.broadcast(np.zeros(4), key="oops")
    else:
        comm.world.all_reduce(np.zeros(4), key="gradient")


def mismatched_key(comm):
    for key in ("b", "a") if comm.rank == 1 else ("a", "b"):
        comm.world.all_reduce(np.zeros(4), key=key)


def mismatched_dtype(comm):
    comm.world.all_reduce(np.zeros(4, np.int64 if comm.rank == 1 else np.float64))


def mismatched_shape_started(comm):
    comm.world.iall_reduce(np.zeros(5 if comm.rank == 1 else 4), algorithm="root").wait()


@pytest.mark.parametrize("main", [mismatched_operation, mismatched_key, mismatched_dtype])
def test_paranoid_names_the_odd_rank_and_its_last_calls(main):
    with pytest.raises(CommunicationError, match=r"^rank 1 started another collective") as caught:
        run_loopback(4, main, paranoid=True)
    assert "rank 0: #1 world." in str(caught.value)
    assert "rank 1: #1 world." in str(caught.value)


def test_paranoid_of_two_has_no_majority():
    with pytest.raises(CommunicationError, match=r"one of ranks 0, 1 \(no majority\)"):
        run_loopback(2, mismatched_operation, paranoid=True)


@pytest.mark.parametrize("main", [mismatched_operation, mismatched_dtype, mismatched_shape_started])
def test_threads_refuse_mismatches_even_without_paranoid(main):
    with pytest.raises(CommunicationError, match=r"different collectives|disagree|carries"):
        run_loopback(4, main)


def test_paranoid_names_a_late_rank_and_where_it_was_last_heard():
    def main(comm):
        comm.world.all_reduce(np.zeros(4), key="first")
        if comm.rank == 2:
            time.sleep(1.0)
        comm.world.all_reduce(np.zeros(4), key="second")

    start = time.monotonic()
    with pytest.raises(CommunicationError, match=r"^rank 2 did not arrive at a collective") as caught:
        run_loopback(3, main, paranoid=True, paranoid_timeout_seconds=0.2)
    assert "is at #2 world.all_reduce('second'" in str(caught.value)
    assert "rank 2 was last heard at #1 world.all_reduce('first'" in str(caught.value)
    assert time.monotonic() - start < 5


def test_paranoid_does_not_make_starting_a_collective_wait():
    """Starting on one rank before, on the other after a message between them is legal, and stays so."""

    def main(comm):
        value = np.ones(1)
        if comm.rank == 0:
            request = comm.world.iall_reduce(value)
            comm.world.isend(np.zeros(1), 1).wait()
        else:
            comm.world.irecv(np.zeros(1), 0).wait()
            request = comm.world.iall_reduce(value)
        request.wait()
        return value[0]

    assert run_loopback(2, main, paranoid=True, paranoid_timeout_seconds=5) == [2, 2]


def test_hash_names_the_rank_that_drifted():
    def main(comm):
        hash_replicated(np.zeros(3), comm.world, "same")
        hash_replicated(np.full((4, 2), 1.0 + (comm.rank == 2) * 1e-15).T, comm.world, "stage0.weight")

    with pytest.raises(CommunicationError, match=r"'stage0.weight' of group 'world' differs on rank 2 \("):
        run_loopback(4, main)


BAD_CALLS = {
    "float16": (lambda g: g.all_reduce(np.zeros(2, np.float16)), "buffer of float16"),
    "list": (lambda g: g.all_reduce([0.0]), "buffer of list"),
    "strided": (lambda g: g.all_reduce(np.zeros((4, 4))[:, 1]), "not C-contiguous"),
    "fortran": (lambda g: g.all_reduce(np.zeros((4, 4), order="F")), "not C-contiguous"),
    "read-only": (lambda g: g.all_reduce(np.broadcast_to(np.zeros(1), (1,))), "read-only"),
    "type of parts": (lambda g: g.all_gather(np.zeros(2, np.float64), np.zeros(4, np.float32)), "float64 .* float32"),
    "size of parts": (lambda g: g.reduce_scatter(np.zeros(4), np.zeros(1)), "2 elements .* 1 of"),
    "uneven": (lambda g: g.all_gather(np.zeros(2), np.zeros(5)), "do not divide into 2 equal parts"),
    "counts": (lambda g: g.all_gather(np.zeros(2), np.zeros(5), [2, 2]), r"counts \[2, 2\] do not split"),
    "negative": (lambda g: g.all_gather(np.zeros(2), np.zeros(5), [6, -1]), "do not split"),
    "op": (lambda g: g.all_reduce(np.zeros(2), "mean"), "no reduction 'mean'"),
    "algorithm": (lambda g: g.all_reduce(np.zeros(2), algorithm="tree"), "no algorithm 'tree'; use one of"),
    "root": (lambda g: g.broadcast(np.zeros(2), 2), "root 2 is outside the group"),
    "peer": (lambda g: g.isend(np.zeros(2), g.rank), "is no other member"),
    "tag": (lambda g: g.isend(np.zeros(2), 1 - g.rank, 1 << 24), "tag 16777216 is outside"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_buffers_and_arguments_are_refused_before_anything_is_sent(name):
    call, message = BAD_CALLS[name]

    def main(comm):
        with pytest.raises(CommunicationError, match=message):
            call(comm.world)
        assert comm.counters.snapshot() == {}

    run_loopback(2, main)


def test_overlapping_buffers_are_refused():
    def main(comm):
        buffer = np.zeros(8)
        for call in (
            lambda: comm.world.reduce_scatter(buffer, buffer[:4]),
            lambda: comm.world.all_to_all(buffer, buffer),
            lambda: comm.world.ring_shift(buffer, buffer),
            lambda: comm.world.all_gather(buffer[1:5], buffer),
        ):
            with pytest.raises(CommunicationError, match="overlap"):
                call()

    run_loopback(2, main)


@pytest.mark.parametrize("ranks", [(0, 0), (0, 9), (1,)])
def test_impossible_groups_are_refused(ranks):
    def main(comm):
        if comm.rank == 0:
            with pytest.raises(CommunicationError, match="group 'tp'"):
                comm.group(ranks, "tp")

    run_loopback(2, main)


def test_loopback_does_not_start_mpi():
    code = "import sys, executor.comm.loopback; sys.exit('mpi4py.MPI' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


# Mistakes, over MPI


def run_fault(launch, fault, *options):
    start = time.monotonic()
    done = launch(4, "mpi_program_fault.py", fault, *options, timeout_seconds=30)
    return done, time.monotonic() - start


@pytest.mark.mpi
def test_exception_on_one_rank_ends_the_job_with_its_traceback(launch):
    done, seconds = run_fault(launch, "exception_on_one_rank")
    assert done.returncode == 1
    assert "rank 2 of 4:\nTraceback" in done.stderr
    assert "ZeroDivisionError: rank two failed" in done.stderr
    assert "last communication calls:\n  world.all_reduce('gradient', sum, <f8, (3,), native)" in done.stderr
    assert seconds < 8  # 5 seconds and the start of the job


@pytest.mark.mpi
def test_user_error_on_all_ranks_is_printed_once_with_code_2(launch):
    done, seconds = run_fault(launch, "user_error_on_all")
    assert done.returncode == 2
    assert done.stderr.count("error: tp=16 exceeds the 12 attention heads; use tp<=12") == 1
    assert "Traceback" not in done.stderr
    assert "MPI_ABORT" not in done.stderr.upper()
    assert seconds < 8


@pytest.mark.mpi
def test_user_error_with_unmatched_messages_still_ends_with_code_2(launch):
    done, seconds = run_fault(launch, "user_error_with_messages_in_flight")
    assert done.returncode == 2
    assert done.stderr.count("error: the plan ends here") == 1
    assert seconds < 8


@pytest.mark.mpi
def test_user_error_on_one_rank_is_printed_once_with_code_2(launch):
    done, seconds = run_fault(launch, "user_error_on_one")
    assert done.returncode == 2
    assert done.stderr.count("error: rank two has no data") == 1
    assert "Traceback" not in done.stderr
    assert seconds < 8


@pytest.mark.mpi
def test_code_returned_by_all_is_the_exit_code(launch):
    done, _ = run_fault(launch, "code_on_all")
    assert done.returncode == 1
    assert "MPI_ABORT" not in done.stderr.upper()


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong_collective", "rank 1 started another collective than the rest of group 'world' (0, 1, 2, 3)"),
        ("late_rank", "rank 3 did not arrive at a collective of group 'world' (0, 1, 2, 3) within 1 seconds"),
        ("drifted_replica", "replicated tensor 'stage0.weight' of group 'world' differs on rank 2"),
        ("short_message", "message from position 0, tag 0 has 24 bytes, expected 32"),
    ],
)
def test_mistakes_end_the_job_in_time_and_are_named(launch, fault, message):
    done, seconds = run_fault(launch, fault, "paranoid")
    assert done.returncode == 1
    assert message in done.stderr
    assert seconds < 9
