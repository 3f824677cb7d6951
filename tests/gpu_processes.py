"""Processes of `gpu.py`: what they find around them, a time limit for each, and steps on demand."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class StageError(RuntimeError):
    """A process failed, or took longer than its stage may."""


def prepare(wheels: Path, folder: Path) -> dict[str, str]:
    """Make everything importable that ranks need, without installing it; the environment of processes.

    Args:
        wheels: a folder of wheels that this Python lacks (an MPI and its mpirun among them); it may be missing.
        folder: where they are unpacked.
    """
    site = folder / "site"
    site.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    data = next(site.glob("*.data/data"), site)
    for program in (data / "bin").glob("*"):
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    _declare_version(site)
    environment = dict(os.environ)
    _prepend(environment, "PYTHONPATH", site, ROOT, ROOT / "tests", *_inherited("PYTHONPATH"))
    _prepend(environment, "PATH", data / "bin", Path(sys.executable).parent, *_inherited("PATH"))
    _prepend(environment, "LD_LIBRARY_PATH", data / "lib", data / "lib/mpich", *_inherited("LD_LIBRARY_PATH"))
    library = data / "lib/libmpi.so.12"
    if library.is_file():  # else mpi4py prefers one that belongs to this Python, and its ranks do not know this mpirun
        environment["MPI4PY_LIBMPI"] = str(library)
    environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        environment.pop(name, None)
    environment["PYTHONUNBUFFERED"] = "1"
    # Of the host's kernels only the check's one rank runs, for seconds: compiling the fused ones takes longer.
    environment["MESHWRIGHT_KERNELS"] = "reference"
    sys.path[:0] = [str(site), str(ROOT)]
    return environment


def _declare_version(site: Path) -> None:
    """Let a checkout that is not installed say its version as an installed one does."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    note = site / f"meshwright-{version}.dist-info"
    note.mkdir(exist_ok=True)
    (note / "METADATA").write_text(f"Metadata-Version: 2.1\nName: meshwright\nVersion: {version}\n")


def _inherited(name: str) -> list[Path]:
    return [Path(part) for part in os.environ.get(name, "").split(os.pathsep) if part]


def _prepend(environment: dict[str, str], name: str, *paths: Path) -> None:
    environment[name] = os.pathsep.join(map(str, paths))


def mpirun(environment: dict[str, str], ranks: int) -> list[str]:
    """The beginning of a command on several ranks.

    Raises:
        StageError: there is no mpirun.
    """
    found = shutil.which("mpirun", path=environment["PATH"])
    if found is None:
        raise StageError("no mpirun on PATH; carry the wheel of an MPI (make gpu-wheels) or install one")
    said = subprocess.run([found, "--version"], env=environment, capture_output=True, text=True, check=False).stdout
    flags = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in said or "PRTE" in said else []
    return [found, *flags, "-n", str(ranks)]


def run(command: list[str], environment: dict[str, str], seconds: float, log: Path) -> None:
    """Run a command to its end, its output in a file.

    Raises:
        StageError: it failed or was ended at the time limit.
    """
    with log.open("a") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            raise StageError(f"ended at its limit of {seconds:.0f} s; see {log.name}") from None
        finally:
            end(process)
    if status:
        raise StageError(f"status {status}: {last_words(log)}")


def end(process: subprocess.Popen[Any]) -> None:
    """End a process of ours and what it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_words(log: Path) -> str:
    """The end of a log in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-400:]


class Stepper:
    """A process that runs a step whenever it is told to: `gpu_worker.py step` or `torch_step.py`."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._output = log.open("a")
        self.process = subprocess.Popen(
            command, env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._output, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def line(self, deadline: float) -> str:
        """Its next line.

        Raises:
            StageError: it ended, or said nothing until the deadline (monotonic).
        """
        try:
            found = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
        except queue.Empty:
            raise StageError(f"no answer in time; see {self.log.name}") from None
        if not found:
            raise StageError(f"ended: {last_words(self.log)}")
        return found

    def ready(self, deadline: float) -> dict[str, Any]:
        """What it says of itself when it is ready."""
        line = self.line(deadline)
        while not line.startswith("ready "):  # compilers talk
            line = self.line(deadline)
        facts: dict[str, Any] = json.loads(line.removeprefix("ready "))
        return facts

    def step(self, deadline: float) -> float:
        """Seconds of one step."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return float(self.line(deadline))

    def close(self) -> None:
        """End it."""
        end(self.process)
        self._output.close()
