"""Jobs that go wrong in the way the argument names, to see how they end."""

import sys
import time

import numpy as np

from executor.comm import hash_replicated
from executor.comm.mpi import mpi_communicator, run_under_mpi
from planner.errors import PlanError


def exception_on_one_rank(comm):
    comm.world.all_reduce(np.zeros(3), key="gradient")
    if comm.rank == 2:
        raise ZeroDivisionError("rank two failed")
    comm.world.barrier()


def user_error_on_all(comm):
    raise PlanError("tp=16 exceeds the 12 attention heads; use tp<=12")


def user_error_with_messages_in_flight(comm):
    after = (comm.rank + 1) % comm.size
    comm.world.isend(np.zeros(1 << 20), after)
    comm.world.irecv(np.zeros(3), after, tag=5)
    raise PlanError("the plan ends here")


def user_error_on_one(comm):
    if comm.rank == 2:
        raise PlanError("rank two has no data")
    comm.world.barrier()


def code_on_all(comm):
    return 1


def wrong_collective(comm):
    comm.world.barrier()
    if comm.rank == 1:
        comm.world.broadcast(np.zeros(4), key="oops")
    else:
        comm.world.all_reduce(np.zeros(4), key="gradient")


def late_rank(comm):
    comm.world.all_reduce(np.zeros(4), key="first")
    if comm.rank == 3:
        time.sleep(60)
    comm.world.all_reduce(np.zeros(4), key="second")


def drifted_replica(comm):
    hash_replicated(np.full(8, 1.0 if comm.rank != 2 else 1.0 + 1e-15), comm.world, "stage0.weight")


def short_message(comm):
    if comm.rank == 0:
        comm.world.isend(np.zeros(3), 1).wait()
    elif comm.rank == 1:
        comm.world.irecv(np.zeros(4), 0).wait()
    comm.world.barrier()


def main():
    """Run the named fault on one rank."""
    return globals()[sys.argv[1]](mpi_communicator(paranoid="paranoid" in sys.argv, paranoid_timeout_seconds=1.0))


if __name__ == "__main__":
    run_under_mpi(main)
