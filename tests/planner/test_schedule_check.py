"""What `check` refuses, and the grids it prints."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import ScheduleError
from planner.schedule import Schedule, check, format_grid, from_csv, generate, lower_communication

DATA = Path(__file__).parents[1] / "data" / "schedules"


def refusal(schedule: Schedule, **options: object) -> str:
    with pytest.raises(ScheduleError) as caught:
        check(schedule, **options)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("micro_batches", [None, 8])
def test_the_known_bad_1f1b_of_torch_is_a_deadlock(micro_batches: int | None) -> None:
    text = (DATA / "1f1b_pp4_m8_compute.csv").read_text()
    assert refusal(from_csv(text, num_micro_batches=micro_batches)) == (
        "custom: deadlock: rank 3 waits forever at 3B0 for 3F0, which no rank runs; add it before 3B0\n"
        "step    0    1      2    3    4    5    6\n"
        "rank 0  0F0  0F1    0F2  0F3  0B0  0F4  0B1\n"
        "rank 1  1F0  1F1    1F2  1B0  1F3  1B1  1F4\n"
        "rank 2  2F0  2F1    2B0  2F2  2B1  2F3  2B2\n"
        "rank 3  3F1  >3B0<  3F2  3B1  3F3  3B2  3F4"
    )


@pytest.mark.parametrize("path", sorted(DATA.rglob("*.csv")), ids=lambda path: path.stem)
def test_all_other_reference_files_pass(path: Path) -> None:
    if path.name != "1f1b_pp4_m8_compute.csv":
        check(from_csv(path.read_text()))


def test_a_cycle_of_waits_is_named() -> None:
    message = refusal(from_csv("0F0,0B1,0F1,0B0\n1F0,1B0,1F1,1B1\n"))
    assert "deadlock: rank 0 waits forever at 0B1 for 0F1, which it runs only later, at step 2" in message
    message = refusal(from_csv("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n"))
    assert message == (
        "custom: deadlock: these wait for each other: rank 0 at 0B0 for 1B0 or 1I0, rank 1 at 1F1 for 0F1; "
        "reorder one of them\n"
        "step    0    1      2    3\n"
        "rank 0  0F0  >0B0<  0F1  0B1\n"
        "rank 1  1F0  1F1    1B0  1B1"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0F0,0F0,0B0\n", "0F0 does again what was done before"),
        ("0F0,0B0,0W0\n", "0W0 does again what was done before"),
        ("0F0\n", "stage 0 never runs B (or I and W) of micro-batch 0; add it to rank 0"),
        ("0F0,0I0\n", "stage 0 never runs W of micro-batch 0"),
        ("0F0,0B0,0B1,0F1\n", "waits forever at 0B1 for 0F1, which it runs only later"),
        ("0F0,0W0,0I0\n", "waits forever at 0W0 for 0B0 or 0I0, which it runs only later"),
        ("0F0,0F1,0B1,0B0\n1F1,1B1,1F0,1B0\n", "1F1 takes a message out of order: the next one that rank 0 sends"),
        (
            "0F0,0SEND_F0,0RECV_B0,0B0\n1F0,1B0,1SEND_B0\n",
            "rank 1 waits forever at 1F0 for 1RECV_F0, which no rank runs",
        ),
        ("0F0,0SEND_F0,0B0\n", "0SEND_F0 has no stage at its other end; remove it"),
        ("0F0,0SEND_F0,1RECV_F0,1F0,1B0,0B0\n", "0SEND_F0 would go from rank 0 to itself; remove it"),
        ("0F0,0RECV_B0,0SEND_F0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n", "deadlock"),
    ],
)
def test_broken_programs_are_refused(text: str, expected: str) -> None:
    assert expected in refusal(from_csv(text))


def test_micro_batches_beyond_the_step_are_refused() -> None:
    assert "1 there are" in refusal(from_csv("0F0,0B0,0F1,0B1\n", num_micro_batches=1))


def test_forward_only() -> None:
    forwards = from_csv("0F0,0F1\n1F0,1F1\n")
    check(forwards, forward_only=True)
    assert "never runs B" in refusal(forwards)
    assert "backward in a forward-only schedule" in refusal(from_csv("0F0,0B0\n"), forward_only=True)


def test_stage_on_another_rank_is_refused() -> None:
    swapped = replace(generate("1f1b", num_ranks=2, num_micro_batches=1), stage_to_rank=(1, 0))
    assert "0F0 is on rank 0, but stage 0 is on rank 1" in refusal(swapped)


def test_memory_limit_marks_the_forward_too_many() -> None:
    schedule = generate("1f1b", num_ranks=3, num_micro_batches=4)
    check(schedule, memory_limit=3)
    assert refusal(schedule, memory_limit=2) == (
        "1f1b: rank 0 holds 3 activations at 0F2, more than the limit of 2; run a B or I before it\n"
        "step    0    1    2      3    4    5    6    7\n"
        "rank 0  0F0  0F1  >0F2<  0B0  0F3  0B1  0B2  0B3\n"
        "rank 1  1F0  1F1  1B0    1F2  1B1  1F3  1B2  1B3\n"
        "rank 2  2F0  2B0  2F1    2B1  2F2  2B2  2F3  2B3"
    )


def test_grid_without_mark_shows_everything() -> None:
    schedule = generate("gpipe", num_ranks=1, num_micro_batches=8)
    assert format_grid(schedule).splitlines()[1].split() == ["rank", "0", *map(str, schedule.programs[0])]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_random_swap_is_refused_exactly_if_it_breaks_a_dependency(data: st.DataObject) -> None:
    schedule = generate(data.draw(st.sampled_from(["1f1b", "zb-h1", "gpipe"])), num_ranks=3, num_micro_batches=4)
    rank = data.draw(st.integers(0, 2))
    program = list(schedule.programs[rank])
    i = data.draw(st.integers(0, len(program) - 2))
    program[i], program[i + 1] = program[i + 1], program[i]
    swapped = replace(schedule, programs=(*schedule.programs[:rank], tuple(program), *schedule.programs[rank + 1 :]))
    runs = runs_by_brute_force(swapped) and channels_keep_order(swapped)
    try:
        check(swapped)
    except ScheduleError:
        assert not runs
    else:
        assert runs


def runs_by_brute_force(schedule: Schedule) -> bool:
    """Run any step that can run until none can."""
    left = [list(program) for program in schedule.programs]
    done: set[tuple[int, str, int]] = set()
    moved = True
    while moved:
        moved = False
        for program in left:
            while program:
                stage, op, micro_batch, _ = program[0]
                needs = {"F": [(stage - 1, "F")], "W": [(stage, "I")]}.get(op, [(stage, "F"), (stage + 1, "I")])
                if any((s, o, micro_batch) not in done for s, o in needs if 0 <= s < schedule.num_stages):
                    break
                done |= {(stage, each, micro_batch) for each in ("IW" if op == "B" else op)}
                program.pop(0)
                moved = True
    return not any(left)


def channels_keep_order(schedule: Schedule) -> bool:
    def order(rank: int, ops: str) -> list[int]:
        return [step.micro_batch for step in schedule.programs[rank] if step.op in ops]

    return all(
        order(rank, ops) == order(rank + 1, ops) for rank in range(schedule.num_ranks - 1) for ops in ("F", "BI")
    )


def test_lowered_schedules_are_checked_by_their_messages() -> None:
    lowered = lower_communication(generate("1f1b", num_ranks=2, num_micro_batches=2))
    check(lowered)
    program = tuple(step for step in lowered.programs[0] if str(step) != "0SEND_F1")
    assert "0SEND_F1, which no rank runs" in refusal(replace(lowered, programs=(program, lowered.programs[1])))
