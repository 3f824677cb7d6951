"""Forty fixed plans through real MPI: one job per number of ranks, every second plan with synchronous sends."""

import json

import pytest
from equivalence_plans import fixed_plans

PLANS = fixed_plans()


def test_there_are_forty():
    assert sum(len(plans) for plans in PLANS.values()) >= 40


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("launch", "ranks"),
    [("installed", ranks) for ranks in sorted(PLANS)] + [("openmpi", 2), ("openmpi", 4)],
    indirect=["launch"],
)
def test_fixed_plans_equal_one_rank(launch, ranks):
    done = launch(ranks, "mpi_program_equivalence.py", timeout_seconds=100)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["plan"] for line in lines] == list(PLANS[ranks])
    failed = [line for line in lines if not line["passed"]]
    assert not failed, failed
