"""The environment of a measurement: complete, JSON-ready, and harmless to ask for."""

import json
import subprocess
import sys

import numpy as np

from executor.environment import describe_environment


def test_names_the_blas_kernel_and_the_versions(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    np.ones((2, 2)) @ np.ones((2, 2))
    environment = json.loads(json.dumps(describe_environment()))
    assert environment["versions"]["numpy"] == np.__version__
    assert environment["variables"]["OMP_NUM_THREADS"] == "1"
    assert 1 <= environment["usable_cores"] <= environment["cores"]
    assert environment["memory_bytes"] > 2**28
    assert environment["processor"]
    blas = [library for library in environment["blas"] if library["name"] in ("openblas", "mkl", "blis")]
    assert blas and all(library["threads"] >= 1 for library in blas)
    assert any(library["architecture"] for library in blas)
    assert not any("/" in library["library"] for library in environment["blas"])


def test_does_not_start_mpi_but_names_it_once_it_runs():
    code = (
        "import sys; from executor.environment import describe_environment as d;"
        "assert d()['mpi'] is None and 'mpi4py.MPI' not in sys.modules;"
        "import executor.comm.mpi; assert 'MPI' in d()['mpi'], d()['mpi']; assert '\\n' not in d()['mpi']"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
