"""Step seconds and memory of whole arrays of candidates, in closed form, from the block costs of `estimate`.

The pipeline is a closed form (Narayanan et al. 2021, section 2.2; Qi et al. 2024, arXiv:2401.10241, table 1), so an
estimate orders candidates and the replay decides among the best. Rows are placements (mesh, micro-batch, chunks);
columns are the ways to update (ZeRO stage, overlap), which share a placement's pipeline: arrays are [rows, columns].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.cost.compute import (
    early_reduction_seconds,
    exposed_seconds,
    oversubscription_factor,
    slowest_host_factor,
)
from planner.cost.footprint import footprint_bytes
from planner.cost.price import Place, compute_seconds, group_seconds, message_seconds
from planner.machine import Machine
from planner.program.rank import ITEM_BYTES
from planner.program.tasks import Task, Work
from planner.program.update import MIXED_PRECISIONS, WORKING_BYTES, update_bytes, working_bytes
from planner.search.estimate import BlockCost, Structure

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Update(NamedTuple):
    """A way to reduce gradients and hold state."""

    zero: int
    overlap: bool


UPDATES = (
    Update(0, False), Update(0, True), Update(1, False), Update(1, True), Update(2, False), Update(3, False),
)  # fmt: skip
"""ZeRO 2 and 3 reduce in every micro-batch, so that no overlap with the last one is an option of theirs."""

FLIGHT = {"zb-h2": 2.0, "zb-v": 1.0, "interleaved-zb": 1.5}
"""Micro-batches in flight on the first rank, over pipeline ranks, where a schedule has others than 1F1B."""

HIDDEN_WEIGHTS = {"zb-h1": 2, "zb-h2": 3, "zb-v": 3, "interleaved-zb": 2}
"""W per rank of distance that fill the bubble, beside F + I + W of 1F1B (Qi et al. 2024, table 1)."""


@dataclass
class Candidates:
    """Columns over the placements of one structure and schedule; sizes of axes, micro-batch, chunks."""

    pp: Ints
    dp: Ints
    cp: Ints
    tp: Ints
    micro_batch: Ints
    chunks: Ints


@dataclass
class Question:
    """What all candidates have in common."""

    machine: Machine
    structure: Structure
    schedule: str
    global_batch: int
    ranks_per_host: int
    updates: tuple[Update, ...] = UPDATES


def estimate(question: Question, costs: dict[str, BlockCost], at: Candidates) -> tuple[Floats, Floats]:
    """Step seconds and peak bytes per rank, [placements, updates]; infinite where an update makes no sense.

    `costs` hold one entry per placement. The slowest stage sets the pace; warm-up and cool-down add what the other
    stages take; gradient reduction and the update follow the last backward.
    """
    machine, structure, model = question.machine, question.structure, question.structure.model
    replica = -(-question.global_batch // at.dp)
    count = -(-replica // at.micro_batch)
    per_stage = -(-model.layers // (at.pp * at.chunks))
    layer, embedding, head = costs["layer"], costs["embedding"], costs["head"]
    seconds = _pipeline_seconds(question, costs, at, count)[:, None]
    parameters = per_stage * at.chunks * layer.parameters + np.maximum(embedding.parameters, head.parameters)
    if not structure.forward_only:
        seconds = seconds + _update_seconds(question, at, costs, parameters, count)
    hosts = np.ceil(at.pp * at.dp * at.cp * at.tp / question.ranks_per_host)
    slowest = slowest_host_factor(machine, hosts if machine.device.kind == "gpu" else 1)
    seconds = (seconds + machine.overheads.step_seconds) * np.reshape(slowest, (-1, 1))
    peak = _memory(question, at, costs, per_stage, count)
    sensible = (at.dp * at.cp > 1)[:, None] | np.array([update == Update(0, False) for update in question.updates])
    return np.where(sensible, seconds, np.inf), peak


def _pipeline_seconds(question: Question, costs: dict[str, BlockCost], at: Candidates, count: Ints) -> Floats:
    """Seconds from the first forward to the last backward."""
    machine, structure, model = question.machine, question.structure, question.structure.model
    whole = {name: c.forward_seconds + c.backward_seconds for name, c in costs.items()}
    busiest = _balanced(model.layers, at, whole["layer"], whole["embedding"], whole["head"])
    around = machine.overheads.micro_batch_seconds * (0.5 if structure.forward_only else 1.0)
    busiest = busiest + at.chunks * around
    total = model.layers * whole["layer"] + whole["embedding"] + whole["head"] + at.pp * at.chunks * around
    split = model.layers * costs["layer"].weight_seconds / at.pp
    fill = np.where(at.pp > 1, (total - busiest) / at.chunks, 0.0)
    hidden = HIDDEN_WEIGHTS.get(question.schedule, 0) * np.minimum(at.pp, count - 1) * split / at.chunks
    fill = np.maximum(0.0, fill - np.where(at.pp > 1, hidden * (at.pp - 1) / at.pp, 0.0))
    few = total + (count - 1) * busiest / at.chunks  # fewer micro-batches than ranks: chunks wait for the one before
    pace = np.maximum(count * busiest + fill, np.where((at.chunks > 1) & (count < at.pp), few, 0.0))
    return np.asarray(pace + _transfer_seconds(question, at, count))


def _transfer_seconds(question: Question, at: Candidates, count: Ints) -> Floats:
    """What messages add: one way through the pipeline and back, and in every micro-batch where nothing hides them.

    1F1B's steady state goes back and forth between neighbours, so that a micro-batch waits for a message each way even
    where messages block nobody; interleaved chunks give it other work meanwhile.
    """
    machine, structure, model = question.machine, question.structure, question.structure.model
    sequence = -(-model.seq_len // (at.cp * (at.tp if structure.sequence_parallel else 1)))
    payload = at.micro_batch * sequence * model.hidden * ITEM_BYTES[structure.training.precision]
    per_host = question.ranks_per_host
    one = message_seconds(
        machine, payload, at.pp * at.dp * at.cp * at.tp <= per_host, per_host, np.minimum(at.tp, per_host),
        whole=structure.tp and not structure.sequence_parallel,
    )  # fmt: skip
    ways = 1 if structure.forward_only else 2
    blocking = machine.framework.blocking_messages
    waited = one * (at.chunks if blocking else (at.chunks == 1))
    steady = count * (waited + at.chunks * machine.overheads.exchange_seconds)
    return np.asarray(np.where(at.pp > 1, ways * (steady + (at.pp - 1) * one), 0.0))


def _balanced(layers: int, at: Candidates, layer: Floats, first: Floats, last: Floats) -> Floats:
    """Seconds of the slowest rank when whole layers are placed to even out the embedding and the head.

    With one chunk per rank the least T such that floor((T - own extra) / layer) layers on each rank are all of them; T
    is a whole number of layers, alone or above an extra. With more chunks every stage has as many layers as another, or
    one more, and those with one more are spread over the ranks.
    """
    total = layers * layer + first + last
    best = total
    for extra in (np.zeros_like(first), first, last):
        for more in range(-1, 3):
            bound = layer * np.maximum(1, np.floor((total / at.pp - extra) / layer) + more) + extra
            ends = sum(np.floor((bound - own) / layer + 1e-9) for own in (first, last))
            room = ends + (at.pp - 2) * np.floor(bound / layer + 1e-9)
            fits = (room >= layers) & (bound >= layer + np.maximum(first, last) * (1 - 1e-9))
            best = np.where(fits, np.minimum(best, bound), best)
    stages = at.pp * at.chunks
    base, rest = layers // stages, layers % stages
    fewest, most = base * at.chunks + rest // at.pp, base * at.chunks - (-rest // at.pp)
    chunked = np.maximum(most * layer, fewest * layer + np.maximum(first, last))
    return np.asarray(np.where(at.pp == 1, total, np.where(at.chunks > 1, chunked, best)))


def _update_seconds(
    question: Question, at: Candidates, costs: dict[str, BlockCost], parameters: Floats, count: Ints
) -> Floats:
    """Gradient reduction over data ranks, sharded or not, exposed or behind the last backward pass, and the optimizer.

    Returns:
        [placements, updates].
    """
    machine, structure, per_host = question.machine, question.structure, question.ranks_per_host
    training, group = structure.training, at.dp * at.cp
    state = 8 if training.precision == "float64" else 4
    on_host = np.clip(per_host // at.tp, 1, group)
    place = Place(group, on_host, np.maximum(1, per_host // on_host))

    def collective(kind: str, item: int) -> Any:
        mixed, payload = training.precision in MIXED_PRECISIONS, (parameters * item).astype(np.int64)
        work = Work(bytes=payload, full_bytes=payload)
        return group_seconds(machine, Task("", kind, "", axis="data", work=work), place, mixed=mixed)

    reduce, scatter = collective("gradient_all_reduce", state), collective("gradient_reduce_scatter", state)
    gather = collective("parameter_gather", working_bytes(training))
    layers = np.maximum(1, structure.model.layers // (at.pp * at.chunks))
    behind = layers * costs["layer"].backward_seconds
    threads = training.threads_per_rank
    slow = oversubscription_factor(machine, per_host, threads)
    columns = []
    for update in question.updates:
        serial = {0: reduce, 1: scatter, 2: count * scatter, 3: count * (scatter + 2 * gather)}[update.zero]
        if update.overlap and machine.device.kind == "cpu":
            serial = early_reduction_seconds(machine, serial)
        elif update.overlap:
            serial = np.maximum(serial - behind, serial / (layers + 1))
        elif update.zero >= 2:
            whole = count * layers * (costs["layer"].forward_seconds + costs["layer"].backward_seconds)
            serial = exposed_seconds(machine, serial, whole)
        again = gather if update.zero in (1, 2) else 0.0
        owned = parameters / group if update.zero else parameters
        moved = owned * update_bytes(training)
        task = Task("", "optimizer", "", work=Work(elements=owned, bytes=moved))  # type: ignore[arg-type]
        step = compute_seconds(machine, task, training.precision, threads, per_host) * slow
        columns.append(np.where(group > 1, serial + again, 0.0) + step)
    return np.stack(columns, axis=1)


def _memory(question: Question, at: Candidates, costs: dict[str, BlockCost], per_stage: Ints, count: Ints) -> Floats:
    """Peak bytes of the fullest rank, [placements, updates]: state by ZeRO stage, micro-batches in flight, scratch."""
    machine, structure = question.machine, question.structure
    group = at.dp * at.cp
    layer, embedding, head = costs["layer"], costs["embedding"], costs["head"]
    everything = count * at.chunks
    if question.schedule == "gpipe":
        flight = everything
    else:
        limit = np.where(at.chunks == 1, at.pp, at.pp * at.chunks + at.pp - 1)
        if question.schedule in FLIGHT:
            limit = np.ceil(FLIGHT[question.schedule] * at.pp * at.chunks).astype(np.int64)
        flight = np.minimum(everything, limit)
    if structure.forward_only:
        flight = np.ones_like(count)
    # Rank 0 holds most micro-batches and the embedding; the last rank the head, which takes the place of layers.
    seconds = layer.forward_seconds + layer.backward_seconds
    per_first, per_last = (
        np.where(at.pp == 1, per_stage, _layers_beside(structure.model.layers, at, seconds, end)) for end in
        (embedding.forward_seconds + embedding.backward_seconds, head.forward_seconds + head.backward_seconds)
    )  # fmt: skip
    first = flight * (per_first * layer.saved_bytes) + np.minimum(flight, at.pp) * embedding.saved_bytes
    last = per_last * layer.saved_bytes * np.maximum(1, flight - at.pp + 1)
    if question.schedule in HIDDEN_WEIGHTS:  # what a rank near the loss has in hand waits for its W
        last = per_last * (layer.saved_bytes + np.maximum(0, flight - 1) * layer.weight_bytes)
    head_held = np.maximum(head.saved_bytes + head.scratch_bytes, layer.scratch_bytes)
    alone = at.pp == 1
    # The second rank has one micro-batch less in flight than the first, but often a layer more.
    per_inner = np.where(at.chunks > 1, structure.model.layers / (at.pp * at.chunks), per_stage)
    inner = np.where(at.pp > 2, np.maximum(1, flight - 1) * per_inner * layer.saved_bytes + layer.scratch_bytes, 0.0)
    held = (np.where(alone, first + head_held, first + layer.scratch_bytes), inner, last + head_held)
    owned = (
        per_first * at.chunks * layer.parameters + embedding.parameters,
        np.where(at.pp > 2, per_inner * at.chunks * layer.parameters, 0.0),
        per_last * at.chunks * layer.parameters + head.parameters,
    )
    groups = sum((size > 1).astype(np.int64) for size in (at.pp, at.dp, at.cp, at.tp))
    columns = []
    for update in question.updates:
        each = _state_bytes(question, update.zero, group)
        ends = []
        for parameters, activations in zip(owned, held, strict=True):
            if machine.device.kind == "gpu":
                ends.append(footprint_bytes(machine, parameters * each, activations, groups, "nvidia-smi"))
            else:
                ends.append(parameters * each + activations)
        columns.append(np.maximum.reduce([np.asarray(end) for end in ends]))
    return np.stack(columns, axis=1)


def _layers_beside(layers: int, at: Candidates, layer: Floats, extra: Floats) -> Floats:
    """Layers per stage, on average over a rank's chunks, of the rank that also holds the embedding or the head.

    Layers make room for the extra once it is worth one: another stage then has one more than the average.
    """
    stages = at.pp * at.chunks
    even = layers / stages
    room = np.maximum(1, np.floor(np.floor(even) + 1 - extra / layer + 1e-9))
    least = np.minimum(np.floor(even), room)
    return np.asarray((even * (at.chunks - 1) + least) / at.chunks)


def _state_bytes(question: Question, zero: int, group: Ints) -> Floats:
    """Bytes of state per parameter (Rajbhandari et al. 2020, table 1), as the framework or our executor keeps it."""
    training, framework = question.structure.training, question.machine.framework
    item = 8.0 if training.precision == "float64" else 4.0
    parameter, gradient, optimizer = item, item, (2 if training.optimizer == "adamw" else 0) * item
    mixed = training.precision in MIXED_PRECISIONS
    framed = mixed and framework.parameter_bytes is not None
    if mixed and not framed and not question.structure.forward_only:
        # Our executor keeps master parameters beside a working copy, which at stage 3 is made when it is gathered.
        parameter, optimizer = 0.0 if zero == 3 else WORKING_BYTES, optimizer + item
    elif mixed and not framed:
        parameter = WORKING_BYTES
    if framed:
        parameter, optimizer = framework.parameter_bytes or item, framework.optimizer_bytes or optimizer
        gradient = (framework.gradient_bytes or item) + framework.accumulated_gradient_bytes.get(
            training.precision, 0.0
        )
    if question.structure.forward_only:
        return np.full(np.shape(group), parameter)
    share = 1.0 / group
    total = parameter * (share if zero == 3 else 1.0) + gradient * (share if zero >= 2 else 1.0)
    if not framed and zero == 1:
        total = total + gradient * share  # our executor scatters into a shard of its own
    return np.asarray(total + optimizer * (share if zero else 1.0))
