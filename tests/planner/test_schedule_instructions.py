"""The text form of instructions and the CSV grids of schedules."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import ScheduleError
from planner.schedule import (
    NAMES,
    Instruction,
    Schedule,
    from_csv,
    generate,
    loop_placement,
    model_chunks,
    overlap,
    parse_instruction,
    to_csv,
    v_placement,
)

DATA = Path(__file__).parents[1] / "data" / "schedules"

simple = st.builds(
    Instruction,
    st.integers(0, 999),
    st.sampled_from(["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]),
    st.integers(0, 999),
    st.just(()),
)
per_stage = st.builds(
    Instruction, st.integers(0, 999), st.sampled_from(["UNSHARD", "RESHARD", "REDUCE_GRAD"]), st.just(-1), st.just(())
)
composite = st.builds(
    lambda a, b, i, j: overlap(Instruction(a, "F", i), Instruction(b, "B", j)), *[st.integers(0, 99)] * 4
)


@given(st.one_of(simple, per_stage, composite))
def test_text_form_reads_back(step: Instruction) -> None:
    assert parse_instruction(str(step)) == step


def test_text_forms_of_torch() -> None:
    assert str(Instruction(2, "F", 0)) == "2F0"
    assert str(Instruction(3, "UNSHARD")) == "3UNSHARD"
    assert str(overlap(Instruction(0, "F", 7), Instruction(7, "B", 3))) == "(0F7;7B3)OVERLAP_F_B"


@pytest.mark.parametrize(
    "text",
    ["", "F0", "2F", "2X0", "2f0", "-1F0", "2F0 3", "2UNSHARD1", "(0F1)OVERLAP_F_B", "(0B1;1F1)OVERLAP_F_B", "٢F0"],
)
def test_what_is_no_instruction_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError):
        parse_instruction(text)


@pytest.mark.parametrize("path", sorted(DATA.rglob("*.csv")), ids=lambda path: path.stem)
def test_reference_files_survive_a_round_trip(path: Path) -> None:
    schedule = from_csv(path.read_text())
    assert from_csv(to_csv(schedule)) == schedule
    cells = [cell for line in path.read_text().splitlines() for cell in line.split(",") if cell]
    assert [str(step) for program in schedule.programs for step in program] == cells


@pytest.mark.parametrize("name", NAMES)
def test_generated_schedules_survive_a_round_trip(name: str) -> None:
    schedule = generate(name, num_ranks=3, num_micro_batches=7, num_model_chunks=model_chunks(name) or 2)
    assert from_csv(to_csv(schedule), name=name) == schedule


def test_csv_errors_name_the_place() -> None:
    with pytest.raises(ScheduleError, match="row 2, column 3: '1Q0' is not a pipeline instruction"):
        from_csv("0F0,0B0\n1F0,,1Q0\n")
    with pytest.raises(ScheduleError, match="0B0 is on rank 1, but rank 0 runs stage 0"):
        from_csv("0F0\n0B0\n")
    with pytest.raises(ScheduleError, match="no rank runs stage 1"):
        from_csv("0F0,2F0\n")
    with pytest.raises(ScheduleError, match="no instruction"):
        from_csv("\n")


def test_placements() -> None:
    assert loop_placement(6, 3) == (0, 1, 2, 0, 1, 2)
    assert v_placement(6, 3) == (0, 1, 2, 2, 1, 0)
    assert generate("zb-v", num_ranks=3, num_micro_batches=2, num_model_chunks=2).stages_of(1) == (1, 4)


def test_schedule_refuses_inconsistent_counts() -> None:
    with pytest.raises(ScheduleError, match="names 1 of 2 stages"):
        Schedule("custom", 2, 1, 1, (0,), ((),))
    with pytest.raises(ScheduleError, match="1 programs for 2 ranks"):
        Schedule("custom", 1, 2, 1, (0,), ((),))
    with pytest.raises(ScheduleError, match="names rank 5"):
        Schedule("custom", 1, 1, 1, (5,), ((),))
