"""What must hold of the communicator whatever carries it: run by test_comm on threads, and by mpirun on processes.

The arguments are modes, a communicator for each; a check that fails is in the traceback, the mode in a note below it.
"""

import sys
import time

import numpy as np

from executor.comm import ALGORITHMS, clock_offsets, hash_replicated, wait_all

DTYPES = (np.float32, np.float64, np.int32, np.int64)


def uneven_counts(size):
    """Part sizes that differ, the second one empty."""
    return [0 if rank == 1 else 3 * rank + 2 for rank in range(size)]


def operands(comm, count, dtype, name=0):
    """Small integers for every rank [size, count]: all sums are exact, in every order, in every type."""
    return np.random.default_rng([comm.size, count, name]).integers(-8, 9, (comm.size, count)).astype(dtype)


def cut(array, counts, rank):
    """Part `rank` of a flat array."""
    start = sum(counts[:rank])
    return array[start : start + counts[rank]]


def check_collectives_are_exact(comm):
    """Every collective, algorithm, type, reduction, blocking or not, with uneven and empty parts."""
    world, rank, counts = comm.world, comm.rank, uneven_counts(comm.size)
    for dtype in DTYPES:
        data = operands(comm, sum(counts), dtype)
        for op, reduced in (("sum", data.sum(0, dtype=dtype)), ("max", data.max(0))):
            for algorithm in ALGORITHMS["all_reduce"]:
                blocking, started = data[rank].copy(), data[rank].copy()
                world.all_reduce(blocking, op, algorithm=algorithm)
                world.iall_reduce(started, op, algorithm=algorithm).wait()
                np.testing.assert_array_equal(blocking, reduced, algorithm)
                np.testing.assert_array_equal(started, reduced, algorithm)
            for algorithm in ALGORITHMS["reduce_scatter"]:
                send = data[rank].copy()
                blocking, started = np.full((2, counts[rank]), 99, dtype)
                world.reduce_scatter(send, blocking, counts, op, algorithm=algorithm)
                world.ireduce_scatter(send, started, counts, op, algorithm=algorithm).wait()
                np.testing.assert_array_equal(blocking, cut(reduced, counts, rank), algorithm)
                np.testing.assert_array_equal(started, cut(reduced, counts, rank), algorithm)
                np.testing.assert_array_equal(send, data[rank], "send buffer modified")
        for algorithm in ALGORITHMS["all_gather"]:
            for in_place in (False, True):
                blocking, started = np.full((2, sum(counts)), 99, dtype)
                for recv in (blocking, started):
                    send = cut(recv, counts, rank) if in_place else np.empty(counts[rank], dtype)
                    send[:] = cut(data[0], counts, rank)
                    if recv is blocking:
                        world.all_gather(send, recv, counts, algorithm=algorithm)
                    else:
                        world.iall_gather(None if in_place else send, recv, counts, algorithm=algorithm).wait()
                    np.testing.assert_array_equal(recv, data[0], algorithm)
        for algorithm in ALGORITHMS["broadcast"]:
            for root in {0, comm.size - 1}:
                buffer = data[rank].copy()
                world.broadcast(buffer, root, algorithm=algorithm)
                np.testing.assert_array_equal(buffer, data[root], algorithm)


def check_all_to_all(comm):
    """Rank i sends (i + 2j) mod 4 elements to rank j, some of them none."""
    rank, size = comm.rank, comm.size
    sizes = np.array([[(i + 2 * j) % 4 for j in range(size)] for i in range(size)])
    sent = [operands(comm, int(sizes[i].sum()), np.float64, name=i)[i] for i in range(size)]
    expected = np.concatenate([cut(sent[i], list(sizes[i]), rank) for i in range(size)])
    for algorithm in ALGORITHMS["all_to_all"]:
        recv = np.full((2, expected.size), 99.0)
        comm.world.all_to_all(sent[rank], recv[0], sizes[rank], sizes[:, rank], algorithm=algorithm)
        comm.world.iall_to_all(sent[rank], recv[1], sizes[rank], sizes[:, rank], algorithm=algorithm).wait()
        np.testing.assert_array_equal(recv, [expected, expected], algorithm)


def check_nothing_to_move(comm):
    """Collectives of no elements at all finish, by every algorithm."""
    for operation, names in ALGORITHMS.items():
        for algorithm in names:
            buffers = [np.empty(0)] if operation in ("all_reduce", "broadcast") else [np.empty(0), np.empty(0)]
            getattr(comm.world, operation)(*buffers, algorithm=algorithm)
            if operation != "broadcast":
                getattr(comm.world, "i" + operation)(*buffers, algorithm=algorithm).wait()


def check_equal_parts_without_counts(comm):
    """Parts default to equal ones, of arrays of any shape."""
    rank, size = comm.rank, comm.size
    data = operands(comm, 6 * size, np.float32).reshape(size, size, 2, 3)
    part, whole = np.empty((2, 3), np.float32), np.empty((size, 2, 3), np.float32)
    comm.world.reduce_scatter(data[rank], part)
    np.testing.assert_array_equal(part, data.sum(0)[rank])
    comm.world.all_gather(part, whole)
    np.testing.assert_array_equal(whole, data.sum(0))
    comm.world.all_to_all(data[rank], whole)
    np.testing.assert_array_equal(whole, data[:, rank])


def total(comm, value):
    """Sum a number over the ranks."""
    buffer = np.array([value])
    comm.world.all_reduce(buffer)
    return buffer[0]


def assert_adjoint(comm, forward, backward):
    """<F x, y> = <x, F' y>, given both sides' local inner products."""
    left, right = total(comm, forward), total(comm, backward)
    assert abs(left - right) <= 1e-12 * max(abs(left), 1.0), (left, right)


def check_adjoint_pairs(comm):
    """Every redistribution and the one its gradient takes, in float64; a replicated value is one logical copy."""
    world, rank, size, counts = comm.world, comm.rank, comm.size, uneven_counts(comm.size)
    number = sum(counts)
    mine, common = np.random.default_rng([5, rank]), np.random.default_rng(6)
    part, whole = mine.normal(size=counts[rank]), mine.normal(size=number)
    gathered, scattered = np.empty(number), np.empty(counts[rank])

    for gather in ALGORITHMS["all_gather"]:  # Shard -> Replicate, its gradient Partial -> Shard
        for scatter in ALGORITHMS["reduce_scatter"]:
            world.all_gather(part, gathered, counts, algorithm=gather)
            world.reduce_scatter(whole, scattered, counts, algorithm=scatter)
            assert_adjoint(comm, gathered @ whole, part @ scattered)

    reduced, cotangent = whole.copy(), common.normal(size=number)  # Partial -> Replicate, its gradient the identity
    world.all_reduce(reduced)
    assert_adjoint(comm, reduced @ cotangent / size, whole @ cotangent)

    sizes = np.array([[(3 * i + j) % 5 for j in range(size)] for i in range(size)])  # Shard(i) -> Shard(j) and back
    x, y = mine.normal(size=sizes[rank].sum()), mine.normal(size=sizes[:, rank].sum())
    fx, fty = np.empty_like(y), np.empty_like(x)
    world.all_to_all(x, fx, sizes[rank], sizes[:, rank])
    world.all_to_all(y, fty, sizes[:, rank], sizes[rank])
    assert_adjoint(comm, fx @ y, x @ fty)

    for shift in (1, 2, -1, size):
        x, y = mine.normal(size=(2, 11))
        fx, fty = np.empty((2, 11))
        world.ring_shift(x, fx, shift)
        world.ring_shift(y, fty, -shift)
        assert_adjoint(comm, fx @ y, x @ fty)

    if size > 1:  # a pipeline edge from rank 0 to rank 1: activations one way, gradients the other
        x, y = mine.normal(size=(2, 7))
        fx, fty = np.zeros((2, 7))
        if rank == 0:
            wait_all([world.isend(x, 1), world.irecv(fty, 1)])
        elif rank == 1:
            wait_all([world.irecv(fx, 0), world.isend(y, 0)])
        assert_adjoint(comm, fx @ y, x @ fty)

    spread, summed = x.copy(), y.copy()  # one rank -> Replicate, its gradient the sum at that rank
    world.broadcast(spread, size - 1)
    world.all_reduce(summed)
    assert_adjoint(comm, spread @ y, x @ summed if rank == size - 1 else 0.0)


def check_counters(comm):
    """Payload bytes exactly as documented, whatever the algorithm; nothing on one rank."""
    world, rank, counts = comm.world, comm.rank, uneven_counts(comm.size)
    number = sum(counts)
    data, whole, part = np.zeros(number, np.float32), np.zeros(number, np.float32), np.zeros(counts[rank], np.float32)
    before = comm.counters.snapshot()
    for algorithm in ("native", "ring"):
        world.all_reduce(data, key="grad", algorithm=algorithm)
        world.all_gather(part, whole, counts, key="weight", algorithm=algorithm)
        world.reduce_scatter(data, part, counts, key="grad", algorithm=algorithm)
    world.broadcast(data, 0, key="init")
    world.all_to_all(np.zeros(2 * comm.size, np.int64), np.zeros(2 * comm.size, np.int64), key="heads")
    world.ring_shift(np.zeros(5), np.zeros(5), key="kv")
    world.barrier()
    world.arrive()
    after = comm.counters.snapshot()
    counted = {
        name[1:]: (tally.calls - old.calls, tally.payload_bytes - old.payload_bytes)
        if (old := before.get(name))
        else tally
        for name, tally in after.items()
        if tally != before.get(name)
    }
    expected = {
        ("all_reduce", "grad"): (2, 2 * 4 * number),
        ("all_gather", "weight"): (2, 2 * 4 * counts[rank]),
        ("reduce_scatter", "grad"): (2, 2 * 4 * number),
        ("broadcast", "init"): (1, 4 * number if rank == 0 else 0),
        ("all_to_all", "heads"): (1, 16 * comm.size),
        ("send", "kv"): (1, 40),
    }
    assert counted == ({} if comm.size == 1 else expected), counted
    if comm.size > 1:
        assert comm.counters.payload_bytes(axis="world", key="kv") == 40


def check_groups_of_a_mesh(comm):
    """Rows and columns of a mesh work at the same time, in any member order, cached by ranks and axis."""
    columns = 2 if comm.size % 2 == 0 else 1
    rows = comm.size // columns
    mesh = np.arange(comm.size).reshape(rows, columns)
    wanted = [("row", tuple(map(int, row))) for row in mesh]
    wanted += [("column", tuple(map(int, column))) for column in mesh.T]
    wanted += [("again", tuple(map(int, row[::-1]))) for row in mesh]
    groups = comm.create_groups(wanted)
    assert len(groups) == 3
    for (axis, ranks), group in groups.items():
        assert comm.group(ranks, axis) is group
        assert group.ranks[group.rank] == comm.rank
        value = np.array([10**comm.rank if comm.rank < 9 else 0])
        group.all_reduce(value)
        assert value[0] == sum(10**rank if rank < 9 else 0 for rank in ranks)
        members = np.empty(group.size, np.int64)
        group.all_gather(np.array([comm.rank]), members)
        assert tuple(members) == ranks


def check_messages_keep_their_order(comm):
    """First in, first out per (source, destination, tag); tags are independent; all is sent before any receive."""
    world, rank, size = comm.world, comm.rank, comm.size
    if size == 1:
        return
    after, before = (rank + 1) % size, (rank - 1) % size
    for elements in (1, 200_000):  # below and far above any eager limit
        outgoing = [np.full(elements, 100 * rank + number, np.float32) for number in range(4)]
        incoming = [np.empty(elements, np.float32) for _ in range(4)]
        requests = [world.isend(outgoing[number], after, tag=number % 2) for number in range(4)]
        requests += [world.irecv(incoming[number], before, tag=number % 2) for number in (1, 3, 0, 2)]
        wait_all(requests)
        for number in range(4):
            np.testing.assert_array_equal(incoming[number], outgoing[number] - 100 * rank + 100 * before)
    send = world.issend(np.zeros(1), after)
    receive = world.irecv(np.empty(1), before)
    wait_all([send, receive])
    assert send.test() and receive.test()


def check_many_in_flight(comm):
    """Non-blocking collectives of all algorithms overlap, with a message in between, and finish in any order."""
    world = comm.world
    data = operands(comm, 5 * comm.size, np.float64)
    started = []
    for operation in ("all_reduce", "reduce_scatter", "all_gather"):
        for algorithm in ALGORITHMS[operation]:
            mine = data[comm.rank].copy()
            part = np.empty(5)
            slot = slice(5 * comm.rank, 5 * comm.rank + 5)
            if operation == "all_reduce":
                started.append((world.iall_reduce(mine, algorithm=algorithm), mine, data.sum(0)))
            elif operation == "reduce_scatter":
                started.append((world.ireduce_scatter(mine, part, algorithm=algorithm), part, data.sum(0)[slot]))
            else:
                mine[:] = 0
                mine[slot] = data[0][slot]
                started.append((world.iall_gather(None, mine, algorithm=algorithm), mine, data[0]))
    shifted = np.empty(3)
    world.ring_shift(np.full(3, float(comm.rank)), shifted)
    assert (shifted == (comm.rank - 1) % comm.size).all()
    for request, result, expected in reversed(started[::2]):
        request.wait()
        np.testing.assert_array_equal(result, expected)
    for request, result, expected in started[1::2]:
        while not request.test():
            time.sleep(0)
        np.testing.assert_array_equal(result, expected)


def check_results_repeat(comm):
    """The same reduction twice is bitwise equal, and equal on all ranks, in float32 where order matters."""
    values = np.random.default_rng(comm.rank).normal(size=1001).astype(np.float32)
    for algorithm in ALGORITHMS["all_reduce"]:
        first, second = values.copy(), values.copy()
        comm.world.all_reduce(first, algorithm=algorithm)
        comm.world.all_reduce(second, algorithm=algorithm)
        assert first.tobytes() == second.tobytes()
        hash_replicated(first, comm.world, algorithm)


def check_wait_apart_from_work(comm):
    """The latest rank waits least, and the others wait for it."""
    delay_seconds = 0.1
    late = comm.size - 1
    comm.world.barrier()
    if comm.rank == late:
        time.sleep(delay_seconds)
    buffer = np.ones(4)
    elapsed = comm.world.timed(lambda: comm.world.all_reduce(buffer))
    waits = np.zeros(comm.size)
    comm.world.all_gather(np.array([elapsed.wait_seconds]), waits)
    assert buffer[0] == comm.size
    assert elapsed.work_seconds >= 0
    assert (waits[:late] > 0.5 * delay_seconds).all(), waits
    assert waits[late] == waits.min(), waits


def check_clocks(comm):
    """One host has one clock; a clock set back by 5 s per rank is found so."""
    plain = clock_offsets(comm)
    skewed = clock_offsets(comm, clock=lambda: time.perf_counter() - 5.0 * comm.rank)
    for offsets, truth in ((plain, 0.0), (skewed, 5.0)):
        assert offsets.offset_seconds[0] == 0
        error = np.abs(offsets.offset_seconds - truth * np.arange(comm.size))
        assert (error <= offsets.uncertainty_seconds + 1e-9).all(), (error, offsets)
        assert (offsets.uncertainty_seconds < 0.05).all(), offsets
    assert hash_replicated(skewed.offset_seconds, comm.world, "offsets") is None


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


MODES = {"eager": {}, "synchronous": {"synchronous_sends": True}, "paranoid": {"paranoid": True}}


def main():
    """Run every check on one MPI rank, in every mode asked for."""
    from executor.comm.mpi import mpi_communicator

    for mode in sys.argv[1:]:
        comm = mpi_communicator(**MODES[mode])
        for check in CHECKS:
            try:
                check(comm)
            except Exception as error:
                error.add_note(f"in mode {mode}")
                raise
        comm.world.barrier()
        if comm.rank == 0:
            print(f"{mode}: passed {len(CHECKS)} checks on {comm.size} ranks")


if __name__ == "__main__":
    from executor.comm.mpi import run_under_mpi

    run_under_mpi(main)
