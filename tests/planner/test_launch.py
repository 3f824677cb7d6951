"""Starting mpirun: which one, with which flags, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from planner import launch
from planner.errors import DataError, MachineError
from planner.launch import Launcher, find_launcher, launch_command, launch_environment, parse_hosts

PROGRAM = ["executor", "run", "plan.json"]


def _launcher(folder: Path, version: str) -> Path:
    path = folder / "mpirun"
    path.write_text(f"#!/bin/sh\necho '{version}'\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def _flags(family: str, ranks: int, *, threads: int = 1, cores: int = 4, root: bool = False) -> list[str]:
    command = launch_command(
        Launcher(Path("mpirun"), family),  # type: ignore[arg-type]
        ranks,
        PROGRAM,
        threads_per_rank=threads,
        cores=cores,
        root=root,
    )
    assert command[:1] == ["mpirun"]
    assert command[-3:] == PROGRAM
    return command[1:-3]


@pytest.mark.parametrize(
    ("ranks", "threads", "root", "flags"),
    [
        (4, 1, False, "-n 4 -bind-to core"),
        (2, 2, True, "-n 2 -bind-to core:2"),
        (1, 4, False, "-n 1"),
        (8, 1, True, "-n 8"),
        (4, 2, False, "-n 4"),
    ],
)
def test_flags_of_mpich(ranks: int, threads: int, root: bool, flags: str) -> None:
    assert _flags("mpich", ranks, threads=threads, root=root) == flags.split()


@pytest.mark.parametrize(
    ("ranks", "threads", "root", "flags"),
    [
        (4, 1, False, "-n 4 --bind-to core"),
        (4, 1, True, "-n 4 --allow-run-as-root --bind-to core"),
        (2, 2, False, "-n 2 --map-by slot:PE=2 --bind-to core"),
        (8, 1, False, "-n 8 --oversubscribe --mca mpi_yield_when_idle 1 --bind-to none"),
        (4, 2, False, "-n 4 --bind-to none"),
    ],
)
def test_flags_of_open_mpi(ranks: int, threads: int, root: bool, flags: str) -> None:
    assert _flags("openmpi", ranks, threads=threads, root=root) == flags.split()


def test_ranks_fill_hosts_in_equal_blocks() -> None:
    hosts = ("node1", "node2")
    flags = {
        family: launch_command(
            Launcher(Path("mpirun"), family),  # type: ignore[arg-type]
            8, PROGRAM, threads_per_rank=1, cores=4, root=False, hosts=hosts,
        )
        for family in ("mpich", "openmpi")
    }  # fmt: skip
    assert flags["mpich"] == [
        *["mpirun", "-n", "8", "-hosts", "node1,node2", "-ppn", "4", "-bind-to", "core"],
        *PROGRAM,
    ]
    taken = ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "PYTHONUNBUFFERED"]
    carried = [word for name in taken for word in ("-x", name)]
    assert flags["openmpi"] == [
        *["mpirun", "-n", "8", "--host", "node1:4,node2:4"], *carried, "--bind-to", "core", *PROGRAM,
    ]  # fmt: skip
    odd = launch_command(
        Launcher(Path("mpirun"), "openmpi"), 5, PROGRAM, threads_per_rank=1, cores=2, root=False, hosts=hosts
    )
    assert "node1:3,node2:3" in odd and "--oversubscribe" in odd, "three ranks on the two cores of a host"


def test_hosts_are_names_or_a_file_of_names(tmp_path: Path) -> None:
    assert parse_hosts(None) == ()
    assert parse_hosts("node1, 10.0.0.2,node-3.cluster") == ("node1", "10.0.0.2", "node-3.cluster")
    file = tmp_path / "hosts"
    file.write_text("# ours\nnode1  # the fast one\n\nnode2\n", encoding="utf-8")
    assert parse_hosts(str(file)) == ("node1", "node2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1,,node2", "has the entry ''; write host names"),
        ("node1 slots=2", "has the entry 'node1 slots=2'; write host names"),
        ("-x", "has the entry '-x'"),
        ("a,b,a", "names a 2 times; name each host once"),
    ],
)
def test_hosts_that_are_none(text: str, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        parse_hosts(text)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that exists and cannot be read")
def test_a_hosts_file_that_cannot_be_read_is_named() -> None:
    with pytest.raises(DataError, match=r"cannot read hosts file /proc/self/mem: .*; name a readable file"):
        parse_hosts("/proc/self/mem")


def test_threads_are_set_for_every_library() -> None:
    environment = launch_environment(3, {"PATH": "/bin", "OMP_NUM_THREADS": "64"})
    assert environment["PATH"] == "/bin"
    threads = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    assert {name: environment[name] for name in threads} == dict.fromkeys(threads, "3")


@pytest.mark.parametrize(
    ("says", "family"),
    [("HYDRA build details:", "mpich"), ("mpirun (Open MPI) 5.0.11", "openmpi"), ("mpirun (OpenRTE) 2.1", "openmpi")],
)
def test_mpirun_is_known_by_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, family: str
) -> None:
    path = _launcher(tmp_path, says)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert find_launcher() == Launcher(path, family)  # type: ignore[arg-type]


def test_mpirun_beside_python_comes_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, on_path = tmp_path / "beside", tmp_path / "path"
    beside.mkdir()
    on_path.mkdir()
    _launcher(on_path, "mpirun (Open MPI) 5.0.11")
    monkeypatch.setenv("PATH", f"{on_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    assert find_launcher().family == "openmpi"
    _launcher(beside, "HYDRA build details:")
    assert find_launcher() == Launcher(beside / "mpirun", "mpich")


def test_a_machine_without_a_usable_mpirun_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(MachineError, match=r"no mpirun beside .* pip install 'meshwright\[mpi\]'"):
        find_launcher()
    _launcher(tmp_path, "Some other launcher 1.0")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(MachineError, match=r"neither MPICH nor Open MPI .*Some other launcher"):
        find_launcher()


def test_the_status_of_the_job_is_returned(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("w", encoding="utf-8") as file:
        assert launch.launch(["sh", "-c", "echo $WORD; exit 3"], {"WORD": "hello", "PATH": "/bin"}, stdout=file) == 3
    assert out.read_text(encoding="utf-8") == "hello\n"


STUBBORN = """
import os, pathlib, signal, sys, time
for which in (signal.SIGINT, signal.SIGTERM):
    signal.signal(which, signal.SIG_IGN)
pathlib.Path(sys.argv[1], str(os.getpid())).touch()
time.sleep(100)
"""

# A shell's background job, and so these tests in one, starts with SIGINT ignored.
STARTER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from planner.launch import find_launcher, launch, launch_command, launch_environment
program = [sys.executable, "-c", sys.argv[1], sys.argv[2]]
command = launch_command(find_launcher(), 3, program, cores=1, root=True)
sys.exit(launch(command, launch_environment(1)))
"""


def _wait(condition: object, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


@pytest.mark.mpi
def test_no_rank_outlives_an_interrupted_run(tmp_path: Path) -> None:
    """Ranks that ignore every polite signal, three of them on one core, are gone 5 s after Ctrl-C.

    A run for each signal, at the same time: they spend it waiting. Their folders name them.
    """
    starters: dict[signal.Signals, subprocess.Popen[bytes]] = {}
    try:
        for which in (signal.SIGINT, signal.SIGTERM):
            folder = tmp_path / which.name
            folder.mkdir()
            starters[which] = subprocess.Popen([sys.executable, "-c", STARTER, STUBBORN, str(folder)])
        assert _wait(lambda: len(list(tmp_path.glob("*/*"))) == 6, 30), list(tmp_path.glob("*/*"))
        deadline = time.monotonic() + 5
        for which, starter in starters.items():
            starter.send_signal(which)
        for which, starter in starters.items():
            assert starter.wait(timeout=max(0.0, deadline - time.monotonic())) == launch.INTERRUPTED, which
        ranks = {path: int(path.name) for path in tmp_path.glob("*/*")}
        assert _wait(lambda: not any(map(launch._alive, ranks.values())), 1), ranks
    finally:
        for starter in starters.values():
            starter.kill()
