"""Checks every fixed plan of this many ranks in one MPI job; rank 0 prints one JSON line per plan."""

import json

from equivalence_plans import fixed_plans

from executor.check import check
from executor.comm.mpi import mpi_communicator, run_under_mpi


def main():
    plain, strict = mpi_communicator(), mpi_communicator(synchronous_sends=True, paranoid=True)
    for number, (name, candidate) in enumerate(fixed_plans()[plain.size].items()):
        comm = strict if number % 2 else plain
        report = check(candidate, comm, "float64")
        if report is not None:
            largest = report.largest
            line = {"plan": name, "passed": report.passed, "difference": largest.difference, "tensor": largest.tensor}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_under_mpi(main)
