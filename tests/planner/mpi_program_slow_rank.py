"""Two ranks, the second slowed: an even and a balanced plan run in turns; rank 0 prints the gains.

The slow rank computes as the other does and is then busy for SLOWDOWN - 1 times as long again, in processor time, so
that what else the machine does falls on both plans alike.
"""

import json
import sys
from time import thread_time

import msgspec
import numpy as np

from executor.comm.mpi import mpi_communicator, run_under_mpi
from executor.data import Batches
from executor.ops import BINDINGS
from executor.runtime import Runtime
from planner.machine import load_machine
from planner.mesh import Mesh
from planner.model import with_sizes
from planner.plan import Training, make_plan
from planner.predict import predict
from planner.search.suggest import suggest

SLOWDOWN = 3.0
STEPS, WARMUP = 6, 1
MODEL = with_sizes(layers=8, hidden=128, heads=4, seq_len=64)
TRAINING = Training()


class SlowRuntime(Runtime):
    """A runtime on a rank that computes SLOWDOWN times as slowly as others."""

    def _run(self, part, task):
        begun = thread_time()
        super()._run(part, task)
        if task.axis is None and (task.kind in BINDINGS or part.op == "U"):
            end = thread_time() + (SLOWDOWN - 1) * (thread_time() - begun)
            while thread_time() < end:
                pass


def plans(axis):
    """An even plan, one balanced for the slow rank, and the gain that is predicted."""
    machine = load_machine("cpu-generic")
    host = msgspec.structs.replace(machine.host, cores=2, devices=2)
    machine = msgspec.structs.replace(machine, host=host, relative_speeds=(1.0, 1 / SLOWDOWN))
    options = {"fixed": {axis: 2, "recompute": "none"}, "global_batch_size": 16, "micro_batch_size": 1, "top": 1}
    balanced = suggest(MODEL, 2, machine, training=TRAINING, **options).plans[0].plan
    even = make_plan(
        MODEL,
        Mesh(**{axis: 2}),
        global_batch_size=16,
        micro_batch_size=1,
        training=TRAINING,
        schedule=balanced.schedule,
    )
    found = [predict(plan, machine).step_seconds for plan in (even, balanced)]
    return even, balanced, found[0] / found[1]


def main():
    comm = mpi_communicator()
    even, balanced, predicted_gain = plans(sys.argv[1])
    kind = SlowRuntime if comm.rank == 1 else Runtime
    runtimes = [kind(plan, comm, Batches("synthetic", MODEL, 16, TRAINING.seed)) for plan in (even, balanced)]
    seconds = np.zeros((comm.size, 2, STEPS))
    for number in range(WARMUP + STEPS):
        for place, runtime in enumerate(runtimes):
            result = runtime.run_step(number)
            if number >= WARMUP:
                seconds[comm.rank, place, number - WARMUP] = result.seconds
    flat = seconds.reshape(comm.size, -1)
    comm.world.all_gather(None, flat)
    if comm.rank == 0:
        steps = flat.reshape(comm.size, 2, STEPS).max(axis=0)
        best = steps.min(axis=1)  # what a step takes when nothing else runs
        print(
            json.dumps(
                {
                    "parts": [list(balanced.parts.batch), list(balanced.stage_layers)],
                    "predicted_gain": predicted_gain,
                    "measured_gain": float(best[0] / best[1]),
                    "seconds": best.tolist(),
                }
            )
        )


if __name__ == "__main__":
    run_under_mpi(main)
