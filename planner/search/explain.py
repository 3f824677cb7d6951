"""Explain: how the answer of a search would change on half or double the network, the memory or the batch.

Each change asks the whole question again, so that what is told is the best plan there, not the same plan elsewhere.
Transports are compared on the plan as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from planner.compare import key_seconds
from planner.errors import MeshwrightError
from planner.machine import TRANSPORTS, Link, Machine, Transport
from planner.plan import Plan
from planner.predict import predict
from planner.search.request import SearchRequest
from planner.search.suggest import Ranked, Suggestion
from planner.trace import Prediction, is_communication

if TYPE_CHECKING:
    from planner.search.assign import Assignment

FACTORS = (0.5, 2.0)


class Variation(msgspec.Struct, frozen=True, kw_only=True):
    """The best plan under one change, or why there is none.

    Attributes:
        what: "network", "memory" or "batch".
        factor: What it was multiplied by.
        best: The best plan under the change and its prediction; None where nothing fits.
        same: Whether that is the plan suggested before (of another batch: the same choices).
        kept_seconds: Step of the plan suggested before under the change; None where it cannot be carried out or fit.
        reason: Why there is no plan.
    """

    what: str
    factor: float
    best: Ranked | None
    same: bool
    kept_seconds: float | None = None
    reason: str = ""


def variations(request: SearchRequest, found: Suggestion) -> Iterator[Variation]:
    """Ask again with half and with double the network bandwidth, memory and global batch.

    Args:
        request: What was asked.
        found: What was answered.

    Yields:
        One variation each; the network's are left out where one rank is all there is.
    """
    best = found.plans[0].plan
    for what in ("network", "memory", "batch"):
        for factor in FACTORS:
            changed = _changed(request, what, factor)
            if changed is not None:
                yield _vary(changed, best, what, factor)


class Crossing(msgspec.Struct, frozen=True, kw_only=True):
    """What one plan takes over one transport.

    Attributes:
        transport: The transport.
        used: Whether the plan names it.
        step_seconds: Of the plan over it.
        communication_seconds: Of all collectives and messages of a rank, hidden ones included, mean over ranks.
        staging_seconds: Those of them that are copies between device and host memory, or sums in it.
    """

    transport: Transport
    used: bool
    step_seconds: float
    communication_seconds: float
    staging_seconds: float


def crossings(plan: Plan, machine: Machine) -> list[Crossing]:
    """Predict a plan over every transport that its machine has figures for and its ranks can use.

    Empty for one rank, and where there is nothing to choose between.
    """
    known = [t for t in TRANSPORTS if t in {machine.transport_in_use, *machine.transports} and machine.suits(t)]
    if machine.ranks_per_device(plan.mesh.world_size) > 1:
        known = [transport for transport in known if transport != "nccl"]
    if plan.mesh.world_size == 1 or len(known) < 2:
        return []
    return [_crossing(plan, machine.over(transport), transport) for transport in known]


def _crossing(plan: Plan, machine: Machine, transport: Transport) -> Crossing:
    over = msgspec.structs.replace(plan, transport=transport)
    prediction = predict(over, machine)
    moving = _communication_seconds(prediction)
    copies = 0.0
    if machine.staging is not None:  # what is left without the copies is MPI's
        copies = moving - _communication_seconds(predict(over, msgspec.structs.replace(machine, staging=None)))
    return Crossing(
        transport=transport,
        used=transport == plan.transport,
        step_seconds=prediction.step_seconds,
        communication_seconds=moving,
        staging_seconds=copies,
    )


def _communication_seconds(prediction: Prediction) -> float:
    return sum(seconds for key, seconds in key_seconds(prediction).items() if is_communication(key))


def _changed(request: SearchRequest, what: str, factor: float) -> SearchRequest | None:
    if what == "network":
        name = network(request.machine, request.workers)
        return None if name is None else request.but(machine=faster_link(request.machine, name, factor))
    if what == "memory":
        return request.but(memory_limit_bytes=request.limit_bytes * factor)
    size = request.global_batch_size * factor
    return request.but(global_batch_size=int(size)) if size >= 1 else None


def _vary(request: SearchRequest, before: Plan, what: str, factor: float) -> Variation:
    kept = _kept_seconds(request, before)
    try:
        best = request.ask().plans[0]
    except MeshwrightError as error:
        return Variation(what=what, factor=factor, best=None, same=False, kept_seconds=kept, reason=str(error))
    same = choices(best.plan) == choices(before)
    return Variation(what=what, factor=factor, best=best, same=same, kept_seconds=kept)


def _kept_seconds(request: SearchRequest, before: Plan) -> float | None:
    """Step of the plan as it is, where only machine and limit changed and it still fits."""
    if request.global_batch_size != before.global_batch_size:
        return None
    prediction = predict(before, request.machine)
    return prediction.step_seconds if max(prediction.peak_bytes) <= request.limit_bytes else None


def choices(plan: Plan) -> tuple[object, ...]:
    """What makes two plans the same choice, whatever their batch."""
    chunks = plan.schedule.num_model_chunks
    return (
        plan.mesh, plan.schedule.name, chunks, plan.recompute, plan.zero_stage, plan.sequence_parallel,
        plan.overlap_gradients, plan.cp_kind if plan.mesh.cp > 1 else None,
    )  # fmt: skip


def network(machine: Machine, workers: int) -> str | None:
    """Return the link that `workers` ranks depend on: between hosts if they span several, else inside; None for one."""
    if workers == 1:
        return None
    one_host = workers <= machine.ranks_per_host(workers)
    return "link_in_host" if one_host else "link_between_hosts"


def faster_link(machine: Machine, name: str, factor: float) -> Machine:
    """Return a machine with `factor` times the bandwidth of a link, its latencies unchanged."""
    link: Link = getattr(machine, name)
    shared = link.shared_bandwidth_bytes_per_second
    measured = tuple(
        msgspec.structs.replace(
            table,
            regimes=tuple(
                msgspec.structs.replace(regime, seconds_per_byte=regime.seconds_per_byte / factor)
                for regime in table.regimes
            ),
        )
        for table in link.measured
    )
    changed = msgspec.structs.replace(
        link,
        bandwidth_bytes_per_second=link.bandwidth_bytes_per_second * factor,
        shared_bandwidth_bytes_per_second=None if shared is None else shared * factor,
        measured=measured,
    )
    return msgspec.structs.replace(machine, **{name: changed})


def cheapest_signatures(found: Suggestion, machine: Machine) -> Assignment | None:
    """Return the optimal signatures of the best plan's operators on the tensor axis; None without such an axis."""
    from planner.search.assign import best_signatures  # noqa: PLC0415 - scipy takes a third of a second to load

    plan = found.plans[0].plan
    if found.assignment is not None:
        return found.assignment
    return best_signatures(plan, machine) if plan.mesh.tp > 1 else None
