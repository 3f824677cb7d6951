"""CPU hosts joined by a network: which link a group is priced on, and what it shares."""

from __future__ import annotations

import msgspec
import pytest

from planner import Mesh, load_machine, make_plan, predict, suggest, with_sizes
from planner.cost.algorithms import fix_collectives
from planner.cost.communication import collective_seconds, p2p_seconds
from planner.cost.price import COLLECTIVES, Place, Pricer, measured_tables
from planner.machine import Machine, MeasuredCollective, MeasuredRegime, dump_machine
from planner.mesh import Coordinate
from planner.program import lower
from planner.search.suggest import default_memory_limit

SPEC = with_sizes(None, layers=2, hidden=128, heads=4, seq_len=64)


def line(
    operation: str, size: int, latency: float, per_byte: float, *, on_host: int = 1, algorithm: str = "native"
) -> MeasuredCollective:
    regime = MeasuredRegime(latency_seconds=latency, seconds_per_byte=per_byte)
    return MeasuredCollective(
        operation=operation,  # type: ignore[arg-type]
        group_size=size, algorithm=algorithm, ranks_per_host=on_host, regimes=(regime,),
    )  # fmt: skip


def machine(hosts: int = 2, between: tuple[MeasuredCollective, ...] | None = None) -> Machine:
    """Inside a host 1 µs and 10 GB/s, between hosts 100 µs and 10 MB/s for a rank, 15 MB/s for a host."""
    generic = load_machine("cpu-generic")
    inside = (line("all_reduce", 2, 1e-6, 1e-10), line("send", 2, 1e-6, 1e-10, algorithm="library"))
    if between is None:
        between = (
            line("all_reduce", 2, 1e-4, 1e-7),
            line("all_reduce", 4, 3e-4, 3e-7, on_host=2),
            line("send", 2, 1e-4, 1e-7, algorithm="library"),
        )
    return msgspec.structs.replace(
        generic,
        hosts=hosts,
        link_in_host=msgspec.structs.replace(generic.link_in_host, measured=inside),
        link_between_hosts=msgspec.structs.replace(
            generic.link_between_hosts, measured=between, bandwidth_bytes_per_second=1e7,
            shared_bandwidth_bytes_per_second=1.5e7,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("hosts", "world", "on_each"), [(1, 8, 8), (2, 8, 4), (2, 7, 4), (3, 7, 3), (4, 2, 1), (2, 1, 1)]
)
def test_ranks_are_split_over_cpu_hosts(hosts: int, world: int, on_each: int) -> None:
    assert machine(hosts).ranks_per_host(world) == on_each


def test_gpu_hosts_are_filled() -> None:
    gpu = load_machine("a100-80gb")
    assert [gpu.ranks_per_host(n) for n in (4, 8, 64)] == [4, 8, 8]


def test_a_group_is_priced_on_the_link_it_crosses() -> None:
    two, n = machine(), 1e6
    assert collective_seconds(two, "all_reduce", n, 2, 2) == pytest.approx(1e-6 + 1e-4)
    assert collective_seconds(two, "all_reduce", n, 2, 1) == pytest.approx(1e-4 + 0.1)
    assert collective_seconds(two, "all_reduce", n, 4, 2) == pytest.approx(3e-4 + 0.3)


def test_groups_that_share_a_host_share_its_network() -> None:
    two, n = machine(), 1e6
    # Two ranks of 10 MB/s each want 20 MB/s of 15: the bytes take 4/3 as long, the latency does not.
    assert collective_seconds(two, "all_reduce", n, 2, 1, concurrent_groups=2) == pytest.approx(1e-4 + 0.1 * 4 / 3)
    assert p2p_seconds(two, n, False, 2) == pytest.approx(1e-4 + 0.1 * 4 / 3)
    assert p2p_seconds(two, n, False, 1) == pytest.approx(1e-4 + 0.1)
    assert p2p_seconds(two, n, True, 2) == pytest.approx(1e-6 + 1e-4)
    assert p2p_seconds(two, 0, False, 2) == 0


def test_the_pricer_knows_who_sits_where() -> None:
    two = machine()
    plan = make_plan(SPEC, Mesh(dp=2, tp=2), global_batch_size=4, micro_batch_size=2)
    pricer = Pricer(plan, two)
    assert (pricer.ranks_per_host, pricer.one_host) == (2, False)
    tasks = {task.axis: task for part in lower(plan, 0).steps for task in part.tasks if task.kind in COLLECTIVES}
    at = Coordinate(0, 0, 0, 0)
    places = {axis: pricer.place(tasks[axis], at) for axis in ("tp", "data", "world")}
    assert places == {"tp": Place(2, 2, 1), "data": Place(2, 1, 2), "world": Place(4, 2, 1)}
    assert measured_tables(two, places["tp"]) == two.link_in_host.measured
    assert measured_tables(two, places["data"]) == two.link_between_hosts.measured
    gradients = tasks["data"].work.full_bytes
    assert pricer.seconds(tasks["data"], at) >= float(gradients) * 1e-7 * 4 / 3


def test_one_host_prices_nothing_on_the_network() -> None:
    for mesh in (Mesh(dp=2, tp=2), Mesh(pp=2, tp=2), Mesh(tp=4)):
        plan = make_plan(SPEC, mesh, global_batch_size=4, micro_batch_size=2)
        alone, two = predict(plan, machine(1)), predict(plan, machine(2))
        assert two.step_seconds > 2 * alone.step_seconds
        slower = machine(1).with_figures({"link_between_hosts.latency_seconds": 10.0})
        assert predict(plan, slower).step_seconds == alone.step_seconds


def test_an_algorithm_is_fixed_by_the_link_that_its_group_crosses() -> None:
    between = (
        line("all_reduce", 2, 1e-4, 1e-7), line("all_reduce", 2, 1e-5, 1e-8, algorithm="ring"),
        line("all_reduce", 4, 1e-4, 1e-7, on_host=2), line("send", 2, 1e-4, 1e-7, algorithm="library"),
    )  # fmt: skip
    plan = make_plan(SPEC, Mesh(dp=2, tp=2), global_batch_size=4, micro_batch_size=2)
    fixed = fix_collectives(plan, machine(between=between)).collectives
    assert fixed == {"data.all_reduce": "ring"}


def test_the_search_keeps_the_tensor_axis_inside_a_slow_network() -> None:
    spec = with_sizes(None, layers=4, hidden=256, heads=4, seq_len=256, tie_embeddings=False)
    fixed = {"cp": 1, "recompute": "none", "zero_stage": 0}
    slow = suggest(spec, 4, machine(), global_batch_size=1, fixed=fixed).plans[0].plan.mesh
    one = suggest(spec, 4, machine(1), global_batch_size=1, fixed=fixed).plans[0].plan.mesh
    assert (slow.pp, slow.tp) == (2, 2)
    assert one.tp == 4


def test_each_host_has_memory_of_its_own() -> None:
    assert default_memory_limit(machine(2), 4) == 2 * default_memory_limit(machine(1), 4)


def test_a_profile_of_hosts_is_read_as_written(tmp_path: object) -> None:
    path = f"{tmp_path}/machine.toml"
    dump_machine(machine(), path)
    assert load_machine(path) == machine()
