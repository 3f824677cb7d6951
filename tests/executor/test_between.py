"""Several hosts without a network: which groups are timed, jobs made of some ranks, clocks that drift."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from executor.calibrate import between, exchanges
from executor.calibrate.between import equal_hosts, time_between
from executor.calibrate.exchanges import ALWAYS_BYTES, QUICK_SIZES, host_bytes_per_second
from executor.comm import ClockOffsets, ClockWatch, clock, ranks_by_host
from executor.comm.loopback import run_loopback
from planner.errors import MachineError


def test_ranks_of_one_process_share_a_host():
    assert run_loopback(3, ranks_by_host) == [((0, 1, 2),)] * 3


def test_hosts_are_told_apart_by_name_in_the_order_of_their_ranks():
    world = SimpleNamespace(gather_words=lambda _: [7, 5, 7, 6])
    assert ranks_by_host(SimpleNamespace(world=world)) == ((0, 2), (1,), (3,))


@pytest.mark.parametrize("hosts", [((0, 1), (2,)), ((0, 2), (1, 3))])
def test_a_profile_needs_equal_hosts_in_rank_order(monkeypatch, hosts):
    monkeypatch.setattr(between, "ranks_by_host", lambda _: hosts)
    size = sum(map(len, hosts))
    held = "; ".join(",".join(map(str, ranks)) for ranks in hosts)
    with pytest.raises(MachineError, match=rf"2 hosts hold the ranks {held}: .* planner profile --hosts"):
        run_loopback(size, equal_hosts)


@pytest.mark.parametrize(
    ("hosts", "groups"),
    [
        (((0, 1),), set()),
        (((0,), (1,)), {(2, 1)}),
        (((0, 1), (2, 3)), {(2, 1), (4, 2)}),
        (((0,), (1,), (2,)), {(2, 1), (3, 1)}),
    ],
)
def test_what_is_timed_between_hosts(hosts, groups):
    told = []

    def main(comm):
        tell = told.append if comm.rank == 0 else lambda _: None
        return time_between(comm, hosts, quick=True, seconds=0.0, tell=tell, meet=comm.world.barrier)

    found = run_loopback(sum(map(len, hosts)), main)[0]
    assert {(each.group_size, each.ranks_per_host) for each in found.exchanges} == groups
    assert {each.measured().ranks_per_host for each in found.exchanges} == {on_host for _, on_host in groups}
    assert sorted(told) == sorted(size for size, _ in groups)
    for each in found.exchanges:
        assert max(each.sizes_bytes) >= ALWAYS_BYTES / 2, "the bandwidth shows only in large messages"
        assert len(each.sizes_bytes) <= len(QUICK_SIZES) and min(each.seconds) > 0
    assert (found.host_bytes_per_second is None) == (not groups)
    assert bool(found.barrier_seconds) == bool(groups)


def test_the_bandwidth_of_a_host_counts_all_its_messages(monkeypatch):
    ticks = threading.local()

    def second():
        ticks.count = getattr(ticks, "count", 0) + 1
        return float(ticks.count)

    monkeypatch.setattr(exchanges, "perf_counter", second)  # whatever is timed takes a second
    for senders in (1, 2, 3):
        found = run_loopback(2 * senders, lambda comm: host_bytes_per_second(comm.world, 1 << 16))
        assert found == [senders * 65536.0] * (2 * senders)


def test_a_job_made_of_some_ranks():
    def main(comm):
        chosen = (3, 1)
        if comm.rank not in chosen:
            return None
        part = comm.subset(chosen)
        value = np.array([float(comm.rank)])
        part.world.broadcast(value, 0)
        pair = part.group((1, 0), "pair")
        total = np.ones(1)
        pair.all_reduce(total)
        return part.rank, part.size, value[0], pair.rank, total[0]

    assert run_loopback(4, main) == [None, (1, 2, 3.0, 0, 2.0), None, (0, 2, 3.0, 1, 2.0)]


def test_a_drifting_clock_is_corrected_on_the_line_between_two_readings(monkeypatch):
    offsets = iter([ClockOffsets(np.array([0.0, -10.0]), np.array([0.0, 1e-6])),
                    ClockOffsets(np.array([0.0, -14.0]), np.array([0.0, 3e-6]))])  # fmt: skip
    now = iter([100.0, 300.0])
    monkeypatch.setattr(clock, "clock_offsets", lambda _: next(offsets))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    watch = ClockWatch(SimpleNamespace(rank=1))
    watch.end()
    assert [watch.offset_seconds(at) for at in (100.0, 150.0, 300.0)] == [-10.0, -11.0, -14.0]
    assert watch.note() == {
        "before_seconds": [0.0, -10.0],
        "after_seconds": [0.0, -14.0],
        "uncertainty_seconds": [0.0, 3e-6],
    }
