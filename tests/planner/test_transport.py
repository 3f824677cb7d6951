"""Transports: what each one changes of a machine, what staging costs, and how plans name them."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_plans import GPT, LLAMA, plan

from planner import load_machine, predict, suggest, with_sizes
from planner.cli import frame
from planner.cost.communication import collective_seconds, p2p_seconds
from planner.cost.price import Pricer
from planner.cost.staging import staged_seconds
from planner.errors import DataError, MachineError
from planner.machine import Machine, Staging, TransportFigures, dump_machine, machine_names
from planner.mesh import Coordinate
from planner.plan import dump_plan, load_plan
from planner.search.explain import crossings
from planner.search.suggest import default_memory_limit

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
GPU_TRANSPORTS = ("nccl", "cuda-aware", "staged")
H100 = load_machine("h100-80gb")


def on_the_same_links(staging: Staging | None = None) -> Machine:
    """A machine whose transports all cross the profile's own links: MPI synchronises, staging copies as well."""
    mpi = {"provenance": "for the test", "bandwidth_fraction": 0.9, "call_seconds": 1e-5}
    return msgspec.structs.replace(
        H100,
        transports={
            "cuda-aware": TransportFigures(**mpi),
            "staged": TransportFigures(**mpi, staging=staging or staging_of(50e9)),
        },
    )


def staging_of(rate: float, **changes: float | None) -> Staging:
    figures: dict[str, float | None] = {"latency_seconds": 1e-5, "reduction_bytes_per_second": 1e10} | changes
    return Staging(
        provenance="for the test", to_host_bytes_per_second=rate, to_device_bytes_per_second=2 * rate, **figures
    )


# ---- a machine over a transport --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", machine_names())
def test_every_shipped_machine_changes_transport_and_back(name: str, tmp_path) -> None:
    machine = load_machine(name)
    if machine.device.kind == "cpu":
        assert machine.over("host") is machine
        with pytest.raises(MachineError, match=r"no figures for transport nccl; use one it has \(host\)"):
            machine.over("nccl")
        return
    for first in GPU_TRANSPORTS:
        there = machine.over(first)
        assert there.transport_in_use == first
        assert (there.staging is not None) == (first == "staged")
        dump_machine(there, tmp_path / "there.toml")
        assert load_machine(tmp_path / "there.toml") == there
        for second in GPU_TRANSPORTS:  # however one came there
            direct, around = machine.over(second), there.over(second)
            assert direct.link_in_host == around.link_in_host
            assert direct.link_between_hosts == around.link_between_hosts
            assert direct.staging == around.staging


def test_a_transport_without_links_has_the_profiles_slowed() -> None:
    link = H100.over("cuda-aware").link_in_host
    figures = H100.transports["cuda-aware"]
    assert link.bandwidth_bytes_per_second == H100.link_in_host.bandwidth_bytes_per_second * figures.bandwidth_fraction
    assert link.call_seconds == H100.link_in_host.call_seconds + figures.call_seconds
    assert link.efficiency == H100.link_in_host.efficiency
    assert figures.provenance in link.provenance


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"transports.staged.staging": None}, "transport staged lacks the figures transports.staged.staging; add them"),
        ({"transports.host": {"provenance": "for the test"}}, "transport host is not one of a gpu"),
        ({"transports.cuda-aware.call_seconds": -1.0}, r"Expected `float` >= 0.0 - at `\$.transports"),
        ({"transports.staged.link_in_host.efficiency": {"gather": 0.5}}, "unknown key 'gather'"),
        ({"transports.carrier-pigeon": {"provenance": "for the test"}}, "carrier-pigeon"),
        ({"transport": "staged"}, "transport staged lacks the figures staging; add them"),
    ],
)
def test_figures_that_contradict_are_refused(figures: dict[str, object], message: str) -> None:
    with pytest.raises(MachineError, match=message):
        H100.with_figures(figures)


def test_the_list_of_machines_says_transports_and_prices(capsys) -> None:
    assert frame.run(["machines", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["h200"]["transports"] == sorted(GPU_TRANSPORTS)
    assert found["cpu-generic"]["transports"] == ["host"]
    for row in found.values():
        assert (row["dollars_per_hour"] is None) == (row["price_provenance"] == "")


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("group", "on_host", "groups"), [(2, 2, 1), (8, 8, 1), (4, 2, 4), (16, 8, 1), (3, 1, 8)])
def test_staged_is_the_sum_of_its_parts(operation, group, on_host, groups) -> None:
    machine = H100.over("staged")
    staging, n = machine.staging, 3e8
    assert staging is not None
    mpi = collective_seconds(
        msgspec.structs.replace(machine, staging=None), operation, n, group, on_host, concurrent_groups=groups
    )
    ranks = on_host * groups
    sent = n / group if operation == "all_gather" else n
    received = n / group if operation == "reduce_scatter" else n
    shared = staging.shared_bandwidth_bytes_per_second / ranks
    expected = 2 * staging.latency_seconds
    expected += sent / min(staging.to_host_bytes_per_second, shared)
    expected += received / min(staging.to_device_bytes_per_second, shared)
    if operation in ("all_reduce", "reduce_scatter"):
        expected += n * (group - 1) / group / staging.reduction_bytes_per_second
    found = collective_seconds(machine, operation, n, group, on_host, concurrent_groups=groups)
    assert found - mpi == pytest.approx(expected, rel=1e-9)


def test_a_staged_message_is_copied_twice() -> None:
    machine = H100.over("staged")
    staging = machine.staging
    assert staging is not None
    mpi = p2p_seconds(msgspec.structs.replace(machine, staging=None), 1e6, False, 2)
    copies = 2 * staging.latency_seconds + 1e6 / staging.to_host_bytes_per_second
    copies += 1e6 / staging.to_device_bytes_per_second
    assert p2p_seconds(machine, 1e6, False, 2) - mpi == pytest.approx(copies)
    assert p2p_seconds(machine, 0, False, 2) == 0


def test_long_messages_are_cut_and_their_chunks_piped() -> None:
    """k chunks take the three stages of one, and k-1 times the slowest; from two chunks on."""
    rates = {"latency_seconds": 1e-5, "chunk_bytes": 4e6}
    machine = on_the_same_links(staging_of(20e9, **rates)).over("staged")
    link = msgspec.structs.replace(machine, staging=None)
    out, sent, back = 1e-5 + 4e6 / 20e9, p2p_seconds(link, 4e6), 1e-5 + 4e6 / 40e9
    assert out == max(out, sent, back)
    assert p2p_seconds(machine, 4e8) == pytest.approx(out + sent + back + 99 * out)
    short = 8e6 - 1
    assert p2p_seconds(machine, short) == pytest.approx(2e-5 + short / 20e9 + short / 40e9 + p2p_seconds(link, short))
    together = p2p_seconds(machine, np.array([short, 4e8]))
    assert together == pytest.approx([p2p_seconds(machine, short), p2p_seconds(machine, 4e8)])
    whole = on_the_same_links(staging_of(20e9)).over("staged")
    assert link.link_in_host.latency_seconds < p2p_seconds(link, 4e8) < p2p_seconds(machine, 4e8)
    assert p2p_seconds(machine, 4e8) < p2p_seconds(whole, 4e8)


def test_nothing_is_copied_for_one_rank_or_for_no_bytes() -> None:
    machine = H100.over("staged")
    assert staged_seconds(machine, "all_gather", 1e9, 1, 8).total == 0
    assert collective_seconds(machine, "all_gather", 1e9, 1) == 0
    assert collective_seconds(machine, "all_gather", 0, 8) == 0


def test_ranks_on_one_device_share_its_copy_engines_and_those_of_a_host_its_memory() -> None:
    machine = on_the_same_links(staging_of(50e9, latency_seconds=0.0)).over("staged")
    one = staged_seconds(machine, "send", 1e9, 2, 8)
    two = staged_seconds(machine, "send", 1e9, 2, 16)  # 16 ranks on the host's 8 devices
    assert two.to_host == pytest.approx(2 * one.to_host)
    assert two.to_device == pytest.approx(2 * one.to_device)
    narrow = on_the_same_links(staging_of(50e9, latency_seconds=0.0, shared_bandwidth_bytes_per_second=80e9))
    few, many = (staged_seconds(narrow.over("staged"), "send", 1e9, 2, ranks).to_host for ranks in (1, 8))
    assert few == pytest.approx(1e9 / 50e9)
    assert many == pytest.approx(8e9 / 80e9)


@settings(deadline=None)
@given(
    operation=st.sampled_from(OPERATIONS),
    payload=st.floats(1, 1e11),
    group=st.integers(2, 64),
    on_host=st.integers(1, 8),
    rates=st.tuples(st.floats(1e8, 1e12), st.floats(1e8, 1e12)),
    shared=st.none() | st.floats(1e8, 1e12),
)
def test_more_staging_bandwidth_never_slows(operation, payload, group, on_host, rates, shared) -> None:
    slow, fast = (
        collective_seconds(
            on_the_same_links(staging_of(rate, shared_bandwidth_bytes_per_second=shared)).over("staged"),
            operation, payload, group, on_host,
        )
        for rate in sorted(rates)
    )  # fmt: skip
    assert fast <= slow


@settings(deadline=None)
@given(
    operation=st.sampled_from(OPERATIONS),
    payload=st.floats(0, 1e11),
    group=st.integers(1, 64),
    on_host=st.integers(1, 8),
)
def test_on_the_same_links_nccl_is_fastest_and_staging_slowest(operation, payload, group, on_host) -> None:
    machine = on_the_same_links()
    nccl, aware, staged = (
        collective_seconds(machine.over(transport), operation, payload, group, on_host) for transport in GPU_TRANSPORTS
    )
    assert nccl <= aware <= staged


@settings(deadline=None)
@given(
    payload=st.floats(0, 1e11),
    rates=st.tuples(st.floats(1e8, 1e12), st.floats(1e8, 1e12)),
    chunk=st.none() | st.floats(1e3, 1e9),
    same_host=st.booleans(),
)
def test_messages_are_in_that_order_and_never_slower_for_more_bandwidth(payload, rates, chunk, same_host) -> None:
    machines = [on_the_same_links(staging_of(rate, chunk_bytes=chunk)) for rate in sorted(rates)]
    slow, fast = (p2p_seconds(machine.over("staged"), payload, same_host, 8) for machine in machines)
    nccl, aware = (p2p_seconds(machines[0].over(transport), payload, same_host, 8) for transport in GPU_TRANSPORTS[:2])
    assert nccl <= aware <= fast <= slow


@pytest.mark.parametrize(
    "axes",
    [
        {"dp": 2, "zero_stage": 3}, {"tp": 3, "sequence_parallel": True}, {"cp": 2, "cp_kind": "ring"},
        {"pp": 2, "micro": 1}, {"pp": 2, "dp": 2, "tp": 2},
    ],
)  # fmt: skip
def test_steps_over_transports_are_in_the_same_order(axes) -> None:
    machine = on_the_same_links()
    steps = [predict(plan(LLAMA, **axes, transport=each), machine).step_seconds for each in GPU_TRANSPORTS]
    assert steps == sorted(steps)
    assert steps[0] < steps[2]


def test_arrays_cost_what_each_of_their_entries_costs() -> None:
    machine = H100.over("staged")
    n, p, r = np.array([0.0, 1e3, 1e8]), np.array([4, 1, 16]), np.array([2, 1, 8])
    together = collective_seconds(machine, "reduce_scatter", n, p, r)
    alone = [collective_seconds(machine, "reduce_scatter", *each) for each in zip(n, p, r, strict=True)]
    assert together == pytest.approx(alone)


def test_the_plan_decides_over_which_transport_it_is_priced() -> None:
    staged, nccl = (plan(GPT, tp=2, transport=transport) for transport in ("staged", "nccl"))
    for machine in (H100, H100.over("staged"), H100.over("cuda-aware")):
        assert Pricer(staged, machine).machine.transport_in_use == "staged"
        assert predict(nccl, machine).step_seconds == predict(nccl, H100).step_seconds
    host = plan(GPT, tp=2)  # of CPU ranks: here as GPU ranks would carry it out
    assert predict(host, H100).step_seconds == predict(nccl, H100).step_seconds
    assert predict(host, H100.over("staged")).step_seconds == predict(staged, H100).step_seconds


def test_a_search_prices_staging_as_predictions_do() -> None:
    """Plans of a staged machine say so, and the best of them loses less by staging than the best over NCCL would."""
    spec = with_sizes(layers=4, hidden=256, heads=4)
    over = {name: suggest(spec, 4, H100.over(name), global_batch_size=16, top=3) for name in ("nccl", "staged")}
    best = {name: found.plans[0] for name, found in over.items()}
    assert {name: each.plan.transport for name, each in best.items()} == {"nccl": "nccl", "staged": "staged"}
    moved = msgspec.structs.replace(best["nccl"].plan, transport="staged")
    assert best["staged"].prediction.step_seconds <= predict(moved, H100).step_seconds * 1.001
    assert best["staged"].prediction.step_seconds > best["nccl"].prediction.step_seconds


def test_crossings_tell_the_copies_apart() -> None:
    found = {each.transport: each for each in crossings(plan(GPT, dp=2, tp=2, transport="staged"), H100)}
    assert set(found) == set(GPU_TRANSPORTS)
    assert [each.transport for each in found.values() if each.used] == ["staged"]
    assert found["nccl"].staging_seconds == found["cuda-aware"].staging_seconds == 0
    staged = found["staged"]
    assert 0 < staged.staging_seconds < staged.communication_seconds
    priced = plan(GPT, dp=2, tp=2, transport="staged")
    assert staged.step_seconds == predict(priced, H100).step_seconds
    assert crossings(plan(GPT), H100) == []
    assert crossings(plan(GPT, tp=2), load_machine("cpu-generic")) == []


def test_ranks_that_share_a_gpu_take_turns_share_its_memory_and_cannot_use_nccl() -> None:
    whole = load_machine("h200,per-host=1")
    shared = load_machine("h200,per-host=1,per-device=2")
    assert (whole.ranks_per_host(4), shared.ranks_per_host(4), shared.ranks_per_device(4)) == (1, 2, 2)
    assert default_memory_limit(shared, 2) == default_memory_limit(whole, 2) / 2
    assert default_memory_limit(shared, 1) == default_memory_limit(whole, 1)
    at = Coordinate(0, 0, 0, 0)
    slow, fast = (Pricer(plan(GPT, dp=2, transport="staged"), machine) for machine in (shared, whole))
    task = next(task for step in _tasks(fast.plan) for task in step if task.kind.startswith("linear"))
    assert slow.seconds(task, at) == pytest.approx(2 * fast.seconds(task, at))
    assert {each.transport for each in crossings(slow.plan, shared)} == {"staged", "cuda-aware"}


def _tasks(candidate):
    from planner.program import lower

    return [step.tasks for step in lower(candidate, 0).steps]


# ---- plans and the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["host", *GPU_TRANSPORTS])
def test_plans_keep_their_transport(transport, tmp_path) -> None:
    candidate = plan(GPT, dp=2, transport=transport)
    dump_plan(candidate, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == candidate
    assert (candidate.hash == plan(GPT, dp=2).hash) == (transport == "host")


def test_plans_of_old_read_as_host_and_keep_their_hash(tmp_path) -> None:
    candidate = plan(GPT, dp=2)
    path = tmp_path / "plan.json"
    dump_plan(candidate, path)
    for change in ({"transport": "mpi"}, {}):
        document = json.loads(path.read_text())
        del document["transport"]
        path.write_text(json.dumps(document | change))
        found = load_plan(path)
        assert found.transport == "host"
        assert found.hash == candidate.hash
        dump_plan(found, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transport": "smoke"}))
    with pytest.raises(DataError, match="transport"):
        load_plan(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--machine h200 --transport host", "machine h200 has GPU ranks; use staged, cuda-aware or nccl"),
        ("--machine cpu-generic --transport nccl", "machine cpu-generic has CPU ranks; use host"),
        ("--machine h200 --transport smoke", "--transport smoke is not known; use one of host, staged"),
        ("--machine h200,per-host=1,per-device=2 --transport nccl", "takes one rank per GPU, and 2 share one"),
    ],
)
@pytest.mark.parametrize("command", ["suggest --workers 2", "plan --dp 2", "sweep --workers 2"])
def test_transports_that_cannot_be_used_are_refused(command, options, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert frame.run(f"{command} {options} --layers 1".split()) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_h200_plans_are_made_shown_and_explained(workers, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    small = "--layers 2 --hidden 128 --heads 4 --micro-batch-size 2 --fix recompute=none"
    line = f"suggest --machine h200 --precision bfloat16 --workers {workers} {small} --explain --json"
    assert frame.run(line.split()) == 0
    found = json.loads(capsys.readouterr().out)
    made = load_plan(tmp_path / "plan.json")
    assert (made.transport, made.training.precision) == ("nccl", "bfloat16")
    assert found["plans"][0]["transport"] == "nccl"
    over = [each["transport"] for each in found["explanation"]["transports"]]
    assert sorted(over) == (sorted(GPU_TRANSPORTS) if workers > 1 else [])
    assert frame.run(["show", "plan.json"]) == 0
    shown = capsys.readouterr().out
    assert "nccl: NCCL, one GPU a rank" in shown
    assert frame.run(["predict", "plan.json", "--machine", "h200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step_seconds"] == found["plans"][0]["step_seconds"]


def test_explain_says_what_staging_takes(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    small = "--layers 2 --hidden 128 --heads 4 --micro-batch-size 2 --fix recompute=none,tp=2"
    assert frame.run(f"suggest --machine h200 --workers 2 --transport staged {small} --explain".split()) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "are copies between GPU and host, and sums there." in shown
    assert "over staged; it would take" in shown


def test_gpus_are_shared_over_staging_where_nothing_else_is_asked_for(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert frame.run(["plan", "--machine", "h200,per-host=1,per-device=4", "--dp", "4", "--layers", "1"]) == 0
    assert load_plan(tmp_path / "plan.json").transport == "staged"
    capsys.readouterr()
    assert frame.run(["plan", "--machine", "h200", "--dp", "4", "--layers", "1", "--transport", "cuda-aware"]) == 0
    assert load_plan(tmp_path / "plan.json").transport == "cuda-aware"


def test_predicting_a_plan_for_the_other_kind_of_device_says_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    dump_plan(plan(GPT, dp=2, transport="staged"), tmp_path / "plan.json")
    assert frame.run(["predict", "plan.json", "--machine", "cpu-generic", "--json"]) == 0
    assert "the plan's transport staged is none of CPU ranks; predicted over host" in capsys.readouterr().err


def test_a_profile_without_the_figures_says_which() -> None:
    bare = msgspec.structs.replace(H100, transports={})
    with pytest.raises(MachineError, match=r"h100-80gb' has no figures for transport staged; .*\[transports.staged\]"):
        predict(plan(GPT, tp=2, transport="staged"), bare)
