"""What a run refuses before it starts."""

import pytest

from executor.cli import _peek_threads
from executor.comm.loopback import run_loopback
from executor.session import require_writable
from planner.errors import DataError


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "it is a folder"),
        ("nowhere/measured.json", "nowhere is no writable folder"),
        ("file/measured.json", "file is no writable folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_by_all_ranks_before_the_run(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    told = []

    def main(comm):
        with pytest.raises(DataError, match=rf"cannot write .*: .*{reason}; choose another file with -o") as caught:
            require_writable(comm, tmp_path / name)
        told.append(str(caught.value))

    run_loopback(2, main)
    assert len(told) == 2
    run_loopback(2, lambda comm: require_writable(comm, tmp_path / "measured.json"))


@pytest.mark.parametrize(
    ("text", "threads"),
    [
        ('{"training": {"threads_per_rank": 3}}', 3),
        ('{"training": {"threads_per_rank": "3"}}', 1),
        ('{"training": []}', 1),
        ("[" * 100_000, 1),
        ("", 1),
    ],
    ids=["a plan", "text", "a list", "nested without end", "empty"],
)
def test_threads_are_read_of_a_plan_and_one_of_what_is_none(tmp_path, text, threads):
    """BLAS is told before the plan is judged, so that whatever the file holds must not end the rank here."""
    (tmp_path / "plan.json").write_text(text)
    assert _peek_threads(tmp_path / "plan.json") == threads
    assert _peek_threads(tmp_path / "nothing.json") == 1
