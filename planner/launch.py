"""Launch: mpirun of this environment with the flags that the plan and the MPI ask for, ended cleanly.

MPICH's Hydra and Open MPI differ in what they refuse: Open MPI starts neither as root nor with more ranks than slots
unless told to, and its ranks spin while they wait unless told to yield. Both would leave threads unbound, so that the
ranks of a plan that fits the cores are bound to them. On several hosts both start ranks over ssh, in blocks of the
order given; Open MPI has to be told which variables to take along. The files that ranks read and write must be reached
under the same paths on every host.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal, NamedTuple

from planner.errors import DataError, MachineError

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
UNBUFFERED = "PYTHONUNBUFFERED"
INTERRUPTED = 130
"""Exit status of a run that the user ended (128 + SIGINT)."""

GRACE_SECONDS = 3.0
"""How long mpirun may take to end its ranks before they are killed."""

_REMEDY = "install one with pip install 'meshwright[mpi]', or put your system's mpirun on PATH"


class Launcher(NamedTuple):
    """An mpirun and the family of its flags."""

    path: Path
    family: Literal["mpich", "openmpi"]


def find_launcher() -> Launcher:
    """Return the mpirun beside this Python, else the first on PATH.

    Raises:
        MachineError: there is none, or it is neither MPICH's nor Open MPI's.
    """
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")
    if found is None:
        raise MachineError(f"no mpirun beside {sys.executable} or on PATH; {_REMEDY}")
    try:
        answer = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"{found} --version does not answer ({error}); {_REMEDY}") from None
    return Launcher(Path(found), _family(answer.stdout + answer.stderr, found))


def _family(version: str, path: str) -> Literal["mpich", "openmpi"]:
    if "HYDRA" in version or "MPICH" in version:
        return "mpich"
    if "Open MPI" in version or "OpenRTE" in version or "PRTE" in version:
        return "openmpi"
    first = version.strip().partition("\n")[0]
    raise MachineError(f"{path} is neither MPICH nor Open MPI (it says {first!r}); {_REMEDY}")


def find_executor() -> list[str]:
    """Return the command that starts the executor: the script beside this Python, else on PATH.

    Raises:
        MachineError: there is none.
    """
    beside = Path(sys.executable).parent / "executor"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("executor")
    if found is None:
        raise MachineError(
            f"no executor beside {sys.executable} or on PATH; install with pip install 'meshwright[mpi]'"
        )
    return [found]


def parse_hosts(text: str | None) -> tuple[str, ...]:
    """Read host names: separated by commas, or the lines of a file ("#" begins a comment); none without a text.

    Raises:
        MachineError: an entry that is no host name, or a host named twice.
        DataError: a file that cannot be read.
    """
    if text is None:
        return ()
    entries = text.split(",")
    if Path(text).is_file():
        try:
            lines = Path(text).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise DataError(f"cannot read hosts file {text}: {error.strerror}; name a readable file") from None
        entries = [line for line in (line.partition("#")[0] for line in lines) if line.strip()]
    hosts = tuple(entry.strip() for entry in entries)
    for host in hosts or ("",):
        if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", host):
            raise MachineError(
                f"--hosts {text} has the entry {host!r}; write host names, as in node1,node2, or name a file with one "
                "host a line"
            )
        if hosts.count(host) > 1:
            raise MachineError(f"--hosts {text} names {host} {hosts.count(host)} times; name each host once")
    return hosts


def launch_command(
    launcher: Launcher,
    ranks: int,
    program: Sequence[str],
    *,
    threads_per_rank: int = 1,
    cores: int,
    root: bool,
    hosts: Sequence[str] = (),
) -> list[str]:
    """Return the command line that starts `program` on `ranks` ranks.

    Args:
        launcher: Which mpirun.
        ranks: Number of ranks.
        program: What each rank runs.
        threads_per_rank: Threads that each rank computes with.
        cores: Cores of this machine, and of each host; ranks that all have theirs are bound to them.
        root: Whether the user is root.
        hosts: Names of the hosts that take equal blocks of ranks, in order; none for this machine.
    """
    per_host = -(-ranks // max(1, len(hosts)))
    fits = per_host * threads_per_rank <= cores
    flags = ["-n", str(ranks)]
    if launcher.family == "mpich":
        flags += ["-hosts", ",".join(hosts), "-ppn", str(per_host)] if hosts else []
        if fits and ranks > 1:
            flags += ["-bind-to", "core" if threads_per_rank == 1 else f"core:{threads_per_rank}"]
        return [str(launcher.path), *flags, *program]
    if root:
        flags.append("--allow-run-as-root")
    if hosts:
        flags += ["--host", ",".join(f"{host}:{per_host}" for host in hosts)]
        flags += [word for name in (*THREAD_VARIABLES, UNBUFFERED) for word in ("-x", name)]
    if per_host > cores:
        # Without --oversubscribe Open MPI refuses; without yielding, waiting ranks burn the cores that others need.
        flags += ["--oversubscribe", "--mca", "mpi_yield_when_idle", "1", "--bind-to", "none"]
    elif fits and threads_per_rank == 1:
        flags += ["--bind-to", "core"]
    elif fits:
        flags += ["--map-by", f"slot:PE={threads_per_rank}", "--bind-to", "core"]
    else:
        flags += ["--bind-to", "none"]
    return [str(launcher.path), *flags, *program]


def launch_environment(threads_per_rank: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of the ranks: threads are set before NumPy can read them, and output is not held back."""
    environment = dict(os.environ if base is None else base)
    environment |= dict.fromkeys(THREAD_VARIABLES, str(threads_per_rank))
    environment[UNBUFFERED] = "1"
    return environment


def is_root() -> bool:
    """Whether this process runs as root."""
    return hasattr(os, "geteuid") and os.geteuid() == 0


def launch(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdout: IO[str] | None = None,
    stderr: IO[str] | None = None,
) -> int:
    """Run mpirun to its end and return its exit status; 130 when the user ended it.

    On Ctrl-C, or when this process is told to terminate, mpirun is asked to end its ranks; whatever is left after
    `GRACE_SECONDS` is killed, so that no rank outlives the call.

    Args:
        command: From `launch_command`.
        environment: From `launch_environment`.
        stdout: Where the ranks' standard output goes; None for this process's.
        stderr: Where their talk goes; None for this process's.
    """
    # A session of its own: the terminal's Ctrl-C reaches this process alone, which ends the ranks in order.
    process = subprocess.Popen(
        list(command),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    with _termination_as_interrupt():
        try:
            return process.wait()
        except KeyboardInterrupt:
            _end(process)
            return INTERRUPTED
        except BaseException:
            _end(process)
            raise


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the run as Ctrl-C does, instead of orphaning the ranks."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    kept = {}
    for which in (signal.SIGTERM, signal.SIGHUP):
        with suppress(ValueError):  # not the main thread: nobody's signals to take
            kept[which] = signal.signal(which, interrupt)
    try:
        yield
    finally:
        for which, handler in kept.items():
            signal.signal(which, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End mpirun and every process below it."""
    members = {process.pid, *descendants(process.pid)}
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and (process.poll() is None or any(map(_alive, members - {process.pid}))):
        members |= set(descendants(process.pid))
        time.sleep(0.05)
    for member in members:
        if _alive(member):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(member, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Return the processes started, directly or not, by a process (Linux; elsewhere none are found)."""
    found: list[int] = []
    frontier = [pid]
    while frontier:
        parent = frontier.pop()
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                children = [int(child) for child in path.read_text(encoding="ascii").split()]
                found += children
                frontier += children
    return found


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
