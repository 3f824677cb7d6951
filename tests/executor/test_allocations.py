"""After the first steps the executor allocates nothing large: buffers come from the arena and from kept rooms."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mpi_program_allocations import TWO_RANKS, least_growth

from executor.comm.loopback import run_loopback

LIMIT_BYTES = 200_000
"""Requests, views and dictionaries of a step stay below; half a key tensor on one of two ranks is 262,144 bytes."""


@pytest.mark.parametrize(
    "choices",
    [{}, {"attention": "blocked"}, {"recompute": "full"}, {"recompute": "selective"}],
    ids=["plain", "blocked", "full recompute", "selective recompute"],
)
def test_later_steps_of_one_rank_allocate_nothing_large(choices: dict[str, Any]) -> None:
    ((growth, reserved),) = run_loopback(1, lambda comm: least_growth(comm, choices))
    assert growth < LIMIT_BYTES
    assert reserved == 0


@pytest.mark.mpi
@pytest.mark.parametrize("launch", ["installed"], indirect=True)
def test_later_steps_of_two_ranks_allocate_nothing_large(launch: Any) -> None:
    """The in-process communicator copies messages, so this one is over MPI."""
    done = launch(2, "mpi_program_allocations.py", timeout_seconds=100)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    assert grown.keys() == TWO_RANKS.keys()
    too_much = {name: values for name, values in grown.items() if values[0] >= LIMIT_BYTES or values[1] > 0}
    assert not too_much
