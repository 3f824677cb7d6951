"""The classic experiments: each a function from sizes to an `Experiment`, with published figures where there are any.

Layers over tensor-parallel workers and attention over the sequence follow the questions of Shoeybi et al. 2019
(arXiv 1909.08053) and Li et al. 2023 (arXiv 2105.13120); forward-only pipelining those of Huang et al. 2019 (GPipe,
arXiv 1811.06965).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import msgspec

from planner.cost.communication import collective_seconds, p2p_seconds
from planner.errors import PlanError
from planner.experiments.experiment import (
    PHASES,
    Case,
    Experiment,
    Records,
    Row,
    Sizes,
    block_seconds,
    flops_per_second,
    phase_shares,
)
from planner.experiments.staged import staged_attention
from planner.machine import Machine
from planner.mesh import Mesh
from planner.model import parameters
from planner.plan import Plan, ScheduleRecipe, Training, make_plan
from planner.trace import Record

GRADIENT_BYTES = 4
_PLAIN = Training()


def layer_blocks(sizes: Sizes) -> Experiment:
    """Speedup of attention block, feed-forward block and whole encoder layer, tensor parallel on 1, 2, 4, 8 workers."""
    model = sizes.spec(layers=1, hidden=512, heads=8, ffn_hidden=2048)
    batch = sizes.batch(10)
    cases = tuple(
        Case(str(p), make_plan(model, Mesh(tp=p), global_batch_size=batch, micro_batch_size=batch, training=_PLAIN))
        for p in (1, 2, 4, 8)
        if p <= model.heads
    )

    def read(records: Records) -> list[Row]:
        if "1" not in records:
            return []
        alone, rows = block_seconds(records["1"]), []
        for name, record in records.items():
            own = block_seconds(record)
            speedups = {block: alone[block] / own[block] for block in own}
            layer = sum(alone.values()) / sum(own.values())
            rows.append(Row(f"{name} workers", speedups | {"layer": layer, "layer seconds": sum(own.values())}))
        return rows

    columns = {"attention": "x", "feed-forward": "x", "layer": "x", "layer seconds": "seconds"}
    title = f"one encoder layer over tensor-parallel workers, speedup: {model.name}, batch {batch}"
    return Experiment("layer-blocks", title, cases, read, columns, "layer")


def sequence_attention(sizes: Sizes) -> Experiment:
    """Strong scaling of attention split over the sequence, keys and values all-gathered, p = 1, 2, 4."""
    model = sizes.spec(layers=1, hidden=512, heads=8, ffn_hidden=2048, seq_len=512)
    batch = sizes.batch(4)
    cases = tuple(
        Case(str(p), make_plan(model, Mesh(cp=p), global_batch_size=batch, micro_batch_size=batch, training=_PLAIN))
        for p in (1, 2, 4)
    )

    def read(records: Records) -> list[Row]:
        rows, alone = [], None
        for name, record in records.items():
            seconds = block_seconds(record)["attention"]
            rate = batch * model.seq_len / seconds
            alone = rate if name == "1" else alone
            figures = {"tokens/s": rate, "seconds": seconds}
            if alone is not None:
                figures |= {"speedup": rate / alone, "efficiency": rate / alone / int(name)}
            rows.append(Row(f"{name} workers", figures))
        return rows

    columns = {"seconds": "seconds", "tokens/s": "rate", "speedup": "x", "efficiency": "share"}
    title = f"attention split over the sequence, K and V all-gathered: {model.name}, batch {batch}"
    return Experiment("sequence-attention", title, cases, read, columns, "speedup")


SIMULATED_RANKS = (8, 16, 32, 64, 100, 200)


def data_parallel(sizes: Sizes) -> Experiment:
    """Weak scaling of data parallelism, gradients all-reduced or gathered and broadcast by a root."""
    model = sizes.spec(layers=4, hidden=256, heads=8)
    each = sizes.batch(8)
    cases = [Case("1", make_plan(model, Mesh(), global_batch_size=each, micro_batch_size=each, training=_PLAIN))]
    for p, (how, chosen) in product((2, 4), _REDUCTIONS.items()):
        plan = make_plan(
            model, Mesh(dp=p), global_batch_size=each * p, micro_batch_size=each, training=_PLAIN, collectives=chosen
        )
        cases.append(Case(f"{p}, {how}", plan))

    def read(records: Records) -> list[Row]:
        alone, rows = records.get("1"), []
        for name, record in records.items():
            figures = {"tokens/s": record.tokens_per_second, **phase_shares(record)}
            if alone is not None:
                ranks = record.plan.mesh.world_size
                figures["efficiency"] = record.tokens_per_second / alone.tokens_per_second / ranks
            rows.append(Row(f"{name} workers" if name == "1" else name.replace(",", " workers,"), figures))
        return rows

    def simulate(records: Records, machine: Machine) -> list[Row]:
        payload = parameters(model).total * GRADIENT_BYTES
        return [_simulated(records["1"], machine, payload, p, how) for p, how in product(SIMULATED_RANKS, _REDUCTIONS)]

    columns = {"tokens/s": "rate", "efficiency": "share", **dict.fromkeys(PHASES, "share")}
    title = f"weak scaling of data parallelism, {each} sequences a worker: {model.name}"
    note = "simulated: every rank on a host of its own between whose links the profile's formulas hold"
    return Experiment("data-parallel", title, tuple(cases), read, columns, "efficiency", simulate=simulate, note=note)


_REDUCTIONS: dict[str, dict[str, str]] = {"all-reduce": {}, "root": {"data.all_reduce": "root"}}


def _simulated(alone: Record, machine: Machine, payload_bytes: int, ranks: int, how: str) -> Row:
    """A step of one rank with the gradients of `ranks` ranks summed by a ring, or through a root.

    A ring moves 2(p-1)/p of the gradients (Patarasu & Yuan 2009). A root receives p-1 messages and sends as many, one
    after the other: its time grows with p, and the others wait.
    """
    plain = msgspec.structs.replace(machine, link_between_hosts=_unmeasured(machine))
    if how == "root":
        seconds = 2 * (ranks - 1) * float(p2p_seconds(plain, payload_bytes, same_host=False))
        moving = seconds / (ranks - 1)  # what a rank that is not the root spends in its own two messages
    else:
        seconds = float(collective_seconds(plain, "all_reduce", payload_bytes, ranks, 1, "ring"))
        moving = seconds
    step = alone.step_seconds + seconds
    own = {phase: share * alone.step_seconds / step for phase, share in phase_shares(alone).items()}
    own |= {"communication": moving / step, "waiting": (seconds - moving) / step}
    rate = alone.tokens_per_second * alone.step_seconds / step * ranks
    efficiency = alone.step_seconds / step
    return Row(f"{ranks} workers, {how}", {"tokens/s": rate, "efficiency": efficiency, **own})


def _unmeasured(machine: Machine) -> Any:
    """The link between hosts by its formulas; a machine that is one host lends its own link."""
    link = machine.link_in_host if machine.device.kind == "cpu" else machine.link_between_hosts
    return msgspec.structs.replace(link, measured=())


PUBLISHED_PIPELINE = {8: (3.23, 4.62, 5.89, 6.81), 4: (2.47, 3.05, 3.47, 3.73)}
"""Speedups over one worker with 4, 8, 16, 32 micro-batches, forward only, by number of workers."""

PIPELINE_MICRO_BATCHES = (4, 8, 16, 32)


def pipeline_forward(sizes: Sizes) -> Experiment:
    """Forward-only pipelining over micro-batches and workers, beside published speedups and mp/(m+p-1)."""
    model = sizes.spec(layers=24, hidden=768, heads=12, seq_len=100)
    batch = sizes.batch(32)
    counts = [m for m in PIPELINE_MICRO_BATCHES if m <= batch]

    def plan(workers: int, count: int) -> Plan:
        return make_plan(
            model, Mesh(pp=workers), global_batch_size=batch, micro_batch_size=-(-batch // count), forward_only=True,
            schedule=ScheduleRecipe(name="gpipe"), training=_PLAIN,
        )  # fmt: skip

    cases = [Case("1", plan(1, 1))]
    workers = [p for p in (2, 4, 8) if p <= model.layers]
    cases += [Case(f"{p} workers, {m} micro-batches", plan(p, m)) for p, m in product(workers, counts)]

    def read(records: Records) -> list[Row]:
        if "1" not in records:
            return []
        alone = records["1"].step_seconds
        return [
            Row(name, {"speedup": alone / record.step_seconds, "seconds": record.step_seconds})
            for name, record in records.items()
            if name != "1"
        ]

    references: dict[str, dict[str, float]] = {}
    for p, m in product(workers, counts):
        known = {"ideal": m * p / (m + p - 1)}
        if p in PUBLISHED_PIPELINE and not sizes.model and batch == 32:
            known["published"] = PUBLISHED_PIPELINE[p][PIPELINE_MICRO_BATCHES.index(m)]
        references[f"{p} workers, {m} micro-batches"] = known
    above = "; the published figures lie above it, their one-worker time being slow"
    title = f"forward-only pipelining, speedup over one worker on the whole batch: {model.name}, batch {batch}"
    return Experiment(
        "pipeline-forward", title, tuple(cases), read, {"speedup": "x", "seconds": "seconds"}, "speedup", references,
        note=f"ideal is mp/(m+p-1){above if any('published' in each for each in references.values()) else ''}",
    )  # fmt: skip


def pipeline_tensor(sizes: Sizes) -> Experiment:
    """Pipeline against tensor parallelism at equal numbers of workers."""
    model = sizes.spec(layers=8, hidden=512, heads=8)
    batch = sizes.batch(16)
    cases = [Case("1", make_plan(model, Mesh(), global_batch_size=batch, micro_batch_size=batch, training=_PLAIN))]
    for p in (2, 4, 8):
        if p > min(model.layers, model.heads):
            break
        micro = max(1, batch // (4 * p))
        pipeline = make_plan(model, Mesh(pp=p), global_batch_size=batch, micro_batch_size=micro, training=_PLAIN)
        tensor = make_plan(model, Mesh(tp=p), global_batch_size=batch, micro_batch_size=batch, training=_PLAIN)
        cases += [Case(f"{p} workers, pipeline", pipeline), Case(f"{p} workers, tensor", tensor)]

    def read(records: Records) -> list[Row]:
        alone, rows = records.get("1"), []
        for name, record in records.items():
            figures = {
                "seconds": record.step_seconds,
                "bubble": record.bubble_fraction,
                "communication": record.exposed_communication_seconds / record.step_seconds,
            }
            if alone is not None:
                figures["speedup"] = alone.step_seconds / record.step_seconds
            rows.append(Row("1 workers" if name == "1" else name, figures))
        return rows

    columns = {"seconds": "seconds", "speedup": "x", "bubble": "share", "communication": "share"}
    title = f"pipeline against tensor parallelism: {model.name}, batch {batch}"
    return Experiment("pipeline-tensor", title, tuple(cases), read, columns, "speedup")


def batch_dimension(sizes: Sizes) -> Experiment:
    """What the batch dimension does to the FLOP/s of one worker."""
    model = sizes.spec(layers=2, hidden=512, heads=8)
    most = sizes.batch(32)
    batches = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size <= most]
    cases = tuple(
        Case(str(b), make_plan(model, Mesh(), global_batch_size=b, micro_batch_size=b, training=_PLAIN))
        for b in batches
    )

    def read(records: Records) -> list[Row]:
        rows = []
        for name, each in records.items():
            rates = {"FLOP/s": flops_per_second(each), "MFU": each.mfu, "tokens/s": each.tokens_per_second}
            rows.append(Row(f"batch {name}", {"seconds": each.step_seconds} | rates))
        return rows

    columns = {"seconds": "seconds", "FLOP/s": "flops", "MFU": "share", "tokens/s": "rate"}
    return Experiment("batch", f"the batch dimension on one worker: {model.name}", cases, read, columns, "FLOP/s")


def threads(sizes: Sizes) -> Experiment:
    """The cores of a machine as ranks or as threads of ranks."""
    model = sizes.spec(layers=4, hidden=512, heads=8)
    cores = max(2, sizes.cores)
    batch = sizes.batch(2 * cores)
    cases = []
    for ranks in (r for r in range(1, cores + 1) if cores % r == 0 and r <= batch):
        settings = msgspec.structs.replace(_PLAIN, threads_per_rank=cores // ranks)
        plan = make_plan(
            model, Mesh(dp=ranks), global_batch_size=batch, micro_batch_size=-(-batch // ranks), training=settings
        )
        cases.append(Case(f"{ranks} rank(s) of {cores // ranks} thread(s)", plan))

    def read(records: Records) -> list[Row]:
        return [
            Row(
                name,
                {"seconds": r.step_seconds, "tokens/s": r.tokens_per_second, "peak bytes": float(sum(r.peak_bytes))},
            )
            for name, r in records.items()
        ]

    columns = {"seconds": "seconds", "tokens/s": "rate", "peak bytes": "bytes"}
    title = f"threads per rank against ranks on {cores} cores: {model.name}, batch {batch}"
    return Experiment("threads", title, tuple(cases), read, columns, "tokens/s")


EXPERIMENTS: dict[str, Callable[[Sizes], Experiment]] = {
    "layer-blocks": layer_blocks,
    "sequence-attention": sequence_attention,
    "staged-attention": staged_attention,
    "data-parallel": data_parallel,
    "pipeline-forward": pipeline_forward,
    "pipeline-tensor": pipeline_tensor,
    "batch": batch_dimension,
    "threads": threads,
}
"""Every experiment by name; each makes its value from sizes that may override its own."""


def experiment(name: str, sizes: Sizes) -> Experiment:
    """Return an experiment by name.

    Raises:
        PlanError: no such experiment, or its sizes cannot be planned.
    """
    if name not in EXPERIMENTS:
        raise PlanError(f"--measure {name} is no experiment; use one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name](sizes)
