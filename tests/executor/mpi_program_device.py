"""The executor's command line on ranks that share an emulated GPU: real MPI, staged through host memory.

DEVICES is how many GPUs the host seems to have; FAULT=memory leaves the last rank's GPU too small. The emulation stands
in for CuPy in this test program only.
"""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "executor")]

import emulated_cupy  # noqa: E402
from emulated_cupy import memory  # noqa: E402
from emulated_cupy.kernels import reference_table  # noqa: E402

import executor  # noqa: E402
from executor import measure  # noqa: E402
from executor.cli import RANK_VARIABLES, main  # noqa: E402

if __name__ == "__main__":
    sys.modules["cupy"], sys.modules["cupy.cuda"] = emulated_cupy, emulated_cupy.cuda
    emulated_cupy.cuda.runtime.devices = int(os.environ.get("DEVICES", "1"))
    sys.modules["executor.cuda"] = executor.cuda = reference_table()
    measure.DEVICE_GEMM_SIZE = 64
    own = next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)
    if os.environ.get("FAULT") == "memory" and own == 1:
        memory.set_limit(60_000)
    main()
