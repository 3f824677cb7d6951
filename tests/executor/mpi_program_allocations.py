"""What a later step allocates on real ranks, in bytes: run as `mpirun -n 2 python mpi_program_allocations.py`."""

from __future__ import annotations

import gc
import json
import tracemalloc
from typing import Any

from executor.comm import Communicator
from executor.comm.mpi import mpi_communicator
from executor.data import Batches
from executor.runtime import Runtime
from planner.mesh import Mesh
from planner.model import base_spec, with_sizes
from planner.plan import Training, make_plan

MICRO_BATCH_SIZE = 2
TWO_RANKS: dict[str, dict[str, Any]] = {
    "sequence parallel": {"tp": 2, "sequence_parallel": True},
    "ring": {"cp": 2, "cp_kind": "ring"},
    "ulysses": {"cp": 2, "cp_kind": "ulysses"},
    "gathered keys": {"cp": 2},
    "zero 1": {"dp": 2, "zero_stage": 1},
    "zero 3": {"dp": 2, "zero_stage": 3},
    "pipeline": {"pp": 2},
    "overlapped": {"dp": 2, "overlap_gradients": True},
}


def least_growth(comm: Communicator, choices: dict[str, Any]) -> tuple[int, int]:
    """Bytes by which a later step makes traced memory grow, and the arena: the least of several steps.

    What the program allocates, it allocates in every step; a send that lingers because its receiver is late makes the
    arena hand out a new block now and then. Spans are left out: they are kept for the measurement.
    """
    choices = dict(choices)
    mesh = Mesh(**{axis: choices.pop(axis) for axis in ("pp", "dp", "cp", "tp") if axis in choices})
    model = with_sizes(base_spec(), layers=2, hidden=256, heads=4, seq_len=256)
    training = Training(dropout=0.1, optimizer="adamw", clip_norm=1.0)
    batch = 2 * MICRO_BATCH_SIZE * mesh.dp  # a first micro-batch and a later one on every replica
    plan = make_plan(
        model, mesh, global_batch_size=batch, micro_batch_size=MICRO_BATCH_SIZE, training=training, **choices
    )
    runtime = Runtime(plan, comm, Batches("synthetic", model, batch, 1))
    runtime.record = False
    for step in range(2):
        runtime.run_step(step)
    found = []
    for step in range(2, 5):
        gc.collect()
        reserved = runtime.arena.reserved_bytes
        comm.world.barrier()
        tracemalloc.start()
        runtime.run_step(step)
        found.append((tracemalloc.get_traced_memory()[1], runtime.arena.reserved_bytes - reserved))
        tracemalloc.stop()
    return min(found)


def main() -> None:
    """Print the growth of every plan on the rank where it is largest."""
    comm = mpi_communicator()
    grown = {name: least_growth(comm, choices) for name, choices in TWO_RANKS.items()}
    worst = {name: [max(comm.world.gather_words(value)) for value in values] for name, values in grown.items()}
    if comm.rank == 0:
        print(json.dumps(worst))


if __name__ == "__main__":
    main()
