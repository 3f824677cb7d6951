"""Generators against the reference programs, the closed forms of the literature, and happens-before."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import ScheduleError
from planner.schedule import (
    DURATION_DEPENDENT,
    NAMES,
    Durations,
    Instruction,
    Schedule,
    check,
    from_csv,
    generate,
    lower_communication,
    model_chunks,
)
from planner.schedule.check import Fact, produced, required
from planner.simulate import ScheduleReplay, replay_schedule

DATA = Path(__file__).parents[1] / "data" / "schedules"
Programs = tuple[tuple[Instruction, ...], ...]


def reference(name: str) -> Programs:
    schedule = from_csv((DATA / name).read_text())
    return tuple(tuple(step for step in program if step.op != "REDUCE_GRAD") for program in schedule.programs)


def replayed(name: str, p: int, m: int, v: int = 1, durations: Durations | None = None) -> ScheduleReplay:
    return replay_schedule(
        generate(name, num_ranks=p, num_micro_batches=m, num_model_chunks=v, durations=durations), durations
    )


@pytest.mark.parametrize(
    ("name", "p", "m", "v", "file"),
    [
        ("gpipe", 4, 8, 1, "gpipe_pp4_m8_compute.csv"),
        ("1f1b", 4, 8, 1, "zero-bubble/1f1b_pp4_m8.csv"),
        ("interleaved", 4, 8, 2, "interleaved1f1b_pp4_m8_v2_compute.csv"),
        ("interleaved", 2, 8, 2, "interleaved1f1b_pp2_m8_v2_compute.csv"),
        ("interleaved", 4, 12, 3, "interleaved1f1b_pp4_m12_v3_compute.csv"),
        ("interleaved", 4, 8, 2, "zero-bubble/vpp_pp4_m8_v2.csv"),
        ("looped-bfs", 4, 8, 2, "loopedbfs_pp4_m8_v2_compute.csv"),
        ("interleaved-zb", 4, 8, 2, "interleavedzerobubble_pp4_m8_v2_compute.csv"),
        ("interleaved-zb", 2, 8, 2, "interleavedzerobubble_pp2_m8_v2_compute.csv"),
        ("zb-h1", 4, 8, 1, "zero-bubble/zb1p_pp4_m8.csv"),
        ("dualpipe-v", 4, 10, 2, "dualpipev_4rank_10mb.csv"),
        ("dualpipe-v", 4, 10, 2, "dualpipev_pp4_m10_v2_compute.csv"),
        ("dualpipe-v", 2, 8, 2, "dualpipev_pp2_m8_v2_compute.csv"),
        ("zb-v", 4, 8, 2, "zbvzerobubble_pp4_m8_v2_compute.csv"),
        ("zb-v", 2, 6, 2, "zbvzerobubble_pp2_m6_v2_compute.csv"),
    ],
)
def test_programs_equal_the_reference(name: str, p: int, m: int, v: int, file: str) -> None:
    assert generate(name, num_ranks=p, num_micro_batches=m, num_model_chunks=v).programs == reference(file)


@pytest.mark.parametrize(
    ("name", "v", "file"),
    [
        ("zb-h1", 1, "zb1p"),
        ("zb-1p", 1, "zb1p"),
        ("zb-h2", 1, "zb2p"),
        ("zb-2p", 1, "zb2p"),
        ("zb-v", 2, "zbv"),
        ("v-half", 2, "vhalf"),
        ("v-min", 2, "vmin"),
    ],
)
def test_zero_bubble_family_is_no_worse_than_the_authors(name: str, v: int, file: str) -> None:
    ours = replayed(name, 4, 8, v)
    theirs = replay_schedule(from_csv((DATA / f"zero-bubble/{file}_pp4_m8.csv").read_text()))
    assert ours.span_bubble_ratio <= theirs.span_bubble_ratio
    assert ours.makespan_seconds <= theirs.makespan_seconds
    for a, b in ((ours.peak_in_flight, theirs.peak_in_flight), (ours.peak_until_w, theirs.peak_until_w)):
        assert all(x <= y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("p", range(1, 17))
def test_bubble_of_gpipe_and_1f1b(p: int) -> None:
    durations = Durations(1.0, 1.25, 0.75)
    for m, name in itertools.product(range(1, 65), ("gpipe", "1f1b")):
        result = replayed(name, p, m, durations=durations)
        assert result.bubble_ratio == pytest.approx((p - 1) / m)
        assert result.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))
        assert result.span_bubble_ratio <= result.bubble_ratio + 1e-12
        want = [m if name == "gpipe" else min(m, p - rank) for rank in range(p)]
        assert result.peak_in_flight == result.peak_until_w == want


@pytest.mark.parametrize("p", range(1, 17))
def test_bubble_and_peak_of_interleaved_1f1b(p: int) -> None:
    for m, v in itertools.product(range(p, 65, p), (1, 2, 3, 4)):
        result = replayed("interleaved", p, m, v)
        assert result.bubble_ratio == pytest.approx((p - 1) / (v * m))
        want = [min(v * m, (v - 1) * p + 2 * (p - 1 - rank) + 1) for rank in range(p)]
        assert result.peak_in_flight == want


@pytest.mark.parametrize(("p", "m"), [(2, 5), (3, 7), (4, 6), (4, 11), (8, 12), (8, 21)])
def test_interleaving_still_divides_the_bubble_if_ranks_do_not_divide_the_micro_batches(p: int, m: int) -> None:
    for v in (2, 3):
        bubble = replayed("interleaved", p, m, v).bubble_ratio
        assert (p - 1) / (v * m) - 1e-12 <= bubble < (p - 1) / m


@pytest.mark.parametrize("p", [2, 3, 4, 8, 12])
def test_bubble_and_peak_of_the_handcrafted_zero_bubble_schedules(p: int) -> None:
    m = 3 * p
    for durations in (Durations(), Durations(1.0, 1.1, 0.6)):
        f, i, w = (durations.of(op, 1)[0] for op in "FIW")
        h1 = replayed("zb-h1", p, m, durations=durations)
        assert h1.span_bubble_ratio * h1.ideal_seconds == pytest.approx((p - 1) * (f + i - w))
        assert h1.peak_in_flight == [p - rank for rank in range(p)]
        assert h1.peak_until_w == [p] * p
        h2 = replayed("zb-h2", p, m, durations=durations)
        assert h2.span_bubble_ratio * h2.ideal_seconds == pytest.approx((p - 1) * (f + i - 2 * w))
        assert h2.peak_in_flight == [2 * (p - rank) - 1 for rank in range(p)]
        assert max(h2.peak_until_w) == 2 * p - 1


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8, 16])
def test_zb_v_has_no_bubble_with_unit_costs(p: int) -> None:
    result = replayed("zb-v", p, 3 * p, 2)
    assert result.span_bubble_ratio == 0
    assert result.makespan_seconds == 18 * p + p - 1
    assert result.peak_until_w == [2 * p] * p


@pytest.mark.parametrize(("p", "half", "third"), [(4, 5, 11), (8, 17, 27)])
def test_bubble_and_peak_of_the_controllable_memory_schedules(p: int, half: int, third: int) -> None:
    for m in (2 * p, 4 * p):
        for name, bubble, peak in (("v-half", half, (p + 2) // 2), ("v-min", third, (p + 4) // 3)):
            result = replayed(name, p, m, 2)
            assert (result.span_seconds - result.busy_seconds).max() <= bubble
            assert max(result.peak_until_w) <= 2 * peak


@pytest.mark.parametrize("p", [2, 4, 6])
def test_bubble_and_peak_of_dualpipe_v(p: int) -> None:
    f, i, w = 1.0, 1.0, 1.0
    result = replayed("dualpipe-v", p, 5 * p, 2, Durations(f, i, w))
    overlapped, backward = f + i + w, i + w
    assert (result.span_seconds - result.busy_seconds).max() == pytest.approx((p - 1) * (overlapped + backward - 3 * w))
    assert max(result.peak_in_flight) == 2 * p + 1


def merge_backwards(schedule: Schedule) -> Schedule:
    """Return the schedule with each I that its W follows at once written as one B, which kernels can run faster."""
    programs = []
    for program in schedule.programs:
        merged: list[Instruction] = []
        for step in program:
            if step.op == "W" and merged and merged[-1] == step._replace(op="I"):
                merged[-1] = step._replace(op="B")
            else:
                merged.append(step)
        programs.append(tuple(merged))
    return replace(schedule, programs=tuple(programs))


def count_unit_steps(schedule: Schedule) -> int:
    """Return how many steps a schedule takes if each instruction takes one and ranks run one per step.

    In a step, ranks go in order and see what earlier ranks did in it; a rank that could not go on looks once more
    after the others. This is the measure by which torch tests its lowering (`_simulate_comms_compute`).
    """
    lowered = schedule.is_lowered
    done: set[Fact] = set()
    cursor = [0] * schedule.num_ranks
    steps = 0

    def advance(rank: int) -> bool:
        step = schedule.programs[rank][cursor[rank]]
        if not done.issuperset(required(step, schedule, lowered=lowered)):
            return False
        done.update(produced(step))
        cursor[rank] += 1
        return True

    def unfinished() -> list[int]:
        return [rank for rank, program in enumerate(schedule.programs) if cursor[rank] < len(program)]

    while ranks := unfinished():
        steps += 1
        idle = [rank for rank in ranks if not advance(rank)]
        for rank in idle:
            advance(rank)
    return steps


def test_lowering_takes_as_many_unit_steps_as_in_torch() -> None:
    compute = from_csv((DATA / "zb1p_2rank_2stagep_compute.csv").read_text())
    assert count_unit_steps(lower_communication(compute)) == 113
    merged = lower_communication(merge_backwards(compute))
    assert count_unit_steps(merged) == 113
    assert merged.programs == reference("zb1p_2rank_2stagep_comms.csv")


@pytest.mark.parametrize(
    "name", ["interleavedzerobubble_pp4_m8_v2", "interleavedzerobubble_pp2_m8_v2", "interleaved1f1b_pp2_m8_v2"]
)
def test_lowering_equals_torch_cell_for_cell(name: str) -> None:
    lowered = reference(f"{name}_comms.csv")
    lowered = tuple(tuple(step for step in program if step.op not in ("UNSHARD", "RESHARD")) for program in lowered)
    assert lower_communication(from_csv((DATA / f"{name}_compute.csv").read_text())).programs == lowered


sizes = st.tuples(st.integers(1, 7), st.integers(1, 17))
seconds = st.floats(0.0, 2.0) | st.just(1.0)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), sizes, st.integers(1, 3), seconds, seconds, seconds, st.sampled_from([0.0, 0.1, 3.0]))
def test_every_schedule_runs_for_any_size_and_durations(
    name: str, size: tuple[int, int], v: int, f: float, i: float, w: float, latency: float
) -> None:
    p, m = size
    chunks = model_chunks(name) or v
    durations = Durations(f, i, w, latency_seconds=latency)
    schedule = generate(name, num_ranks=p, num_micro_batches=m, num_model_chunks=chunks, durations=durations)
    assert schedule.num_stages == p * chunks
    assert schedule.num_model_chunks == chunks
    check(schedule)
    lowered = lower_communication(schedule)
    check(lowered)  # also where every RECV blocks
    coarse, fine = replay_schedule(schedule, durations), replay_schedule(lowered, durations)
    assert fine.makespan_seconds == pytest.approx(coarse.makespan_seconds)
    assert coarse.ideal_seconds <= coarse.makespan_seconds + 1e-9
    forwards = generate(
        name, num_ranks=p, num_micro_batches=m, num_model_chunks=chunks, durations=durations, forward_only=True
    )
    check(forwards, forward_only=True)
    check(lower_communication(forwards), forward_only=True)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(DURATION_DEPENDENT)), sizes, st.randoms(use_true_random=False))
def test_uneven_stages_keep_the_memory_limit(name: str, size: tuple[int, int], random: object) -> None:
    p, m = size
    chunks = model_chunks(name) or 1
    draw = random.uniform  # type: ignore[attr-defined]
    f, i, w = ([draw(0.1, 2.0) for _ in range(p * chunks)] for _ in "FIW")
    result = replayed(name, p, m, chunks, Durations(f, i, w, latency_seconds=draw(0.0, 0.5)))
    limit = {"zb-1p": p, "zb-2p": 4 * p, "v-half": 2 * ((p + 2) // 2), "v-min": 2 * ((p + 4) // 3)}[name]
    assert max(result.peak_until_w) <= limit
    assert max(result.peak_in_flight) <= (2 * p if name == "zb-2p" else limit)


def test_generate_refuses_what_is_not_defined() -> None:
    with pytest.raises(
        ScheduleError, match="'2f2b' is not a schedule that can be generated; choose one of gpipe, 1f1b"
    ):
        generate("2f2b", num_ranks=2, num_micro_batches=2)
    with pytest.raises(ScheduleError, match="read it from CSV with from_csv"):
        generate("custom", num_ranks=2, num_micro_batches=2)
    with pytest.raises(ScheduleError, match=r"zb-v has 2 model chunk.s. per rank, not 1; set num_model_chunks=2"):
        generate("zb-v", num_ranks=2, num_micro_batches=2)
    with pytest.raises(ScheduleError, match="num_micro_batches is 0; give at least 1"):
        generate("gpipe", num_ranks=2, num_micro_batches=0)
    with pytest.raises(ScheduleError, match="rank 0 holds 4 activations at 0F3, more than the limit of 3"):
        generate("gpipe", num_ranks=2, num_micro_batches=8, memory_limit=3)
    with pytest.raises(ScheduleError, match=r"memory limit of 0.5 activations; a rank needs at least 1"):
        generate("zb-1p", num_ranks=2, num_micro_batches=8, memory_limit=0.5)
    for name, limit in (("zb-2p", math.inf), ("zb-1p", math.nan), ("1f1b", math.nan)):
        with pytest.raises(ScheduleError, match=f"memory limit of {limit} activations; a?"):
            generate(name, num_ranks=2, num_micro_batches=3, memory_limit=limit)
