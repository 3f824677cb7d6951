"""The executor's command line on one rank, optionally with a fault planted on rank 1.

FAULT=raise lets a kernel of rank 1 raise in its second step; FAULT=wrong makes the gradients of rank 1 wrong;
FAULT=rich fails on every rank but the first that has loaded rich by the end of the run.
"""

import os
import sys

from executor.cli import _is_first_rank, main

FAULT = os.environ.get("FAULT")


def plant():
    from executor import kernels

    right, calls = kernels.matmul, []

    def wrong(*arguments, **more):
        calls.append(None)
        if FAULT == "raise" and len(calls) > 150:
            raise RuntimeError("planted in a kernel")
        right(*arguments, **more)
        if FAULT == "wrong" and more.get("transpose_a"):
            arguments[2][0, 0] += 1e-3

    kernels.matmul = wrong


if __name__ == "__main__":
    if FAULT in ("raise", "wrong") and not _is_first_rank():
        plant()
    try:
        main()
    finally:
        if FAULT == "rich" and not _is_first_rank() and "rich" in sys.modules:
            os._exit(7)
