"""suggest: enumerate, estimate all, replay the best, rank, explain what was rejected.

Every combination of axis sizes, micro-batch, model chunks, schedule, recomputation, ZeRO stage, sequence parallelism
and kind of context parallelism is a candidate. All are estimated at once by array formulas; as many of the best as fit
the time budget are lowered and replayed, and those decide.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.errors import MeshwrightError, PlanError
from planner.estimate import ArraySizes, BlockCost, Candidates, Structure, StructureCosts, step_seconds
from planner.machine import Machine
from planner.mesh import Mesh, factorizations
from planner.model import ModelSpec
from planner.plan import ContextKind, Plan, Recompute, ScheduleRecipe, Training, make_plan
from planner.predict import predict
from planner.trace import Prediction

REPLAY_SECONDS = 0.8
"""Time for replaying the best candidates; the first few are replayed in any case."""

ALWAYS_REPLAYED = 4
SCHEDULES = ("1f1b", "interleaved", "zb-h1")
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
CONTEXT_KINDS: tuple[ContextKind, ...] = ("allgather", "ring", "ulysses")


@dataclass(frozen=True)
class Ranked:
    """A plan and what it is predicted to take."""

    plan: Plan
    prediction: Prediction


@dataclass(frozen=True)
class Rejection:
    """Why candidates were left out, and how many."""

    reason: str
    count: int


@dataclass(frozen=True)
class Suggestion:
    """What the search found: plans from best to worst, and the bookkeeping behind them."""

    candidates: int
    feasible: int
    replayed: int
    seconds: float
    plans: list[Ranked]
    rejected: list[Rejection]
    notes: list[str]


@dataclass
class _Group:
    """Candidates of one structure and schedule, estimated."""

    structure: Structure
    schedule: str
    columns: Candidates
    seconds: NDArray[np.float64]
    peak_bytes: NDArray[np.float64]


@dataclass
class _Search:
    """The question, and what was found on the way."""

    model: ModelSpec
    workers: int
    machine: Machine
    global_batch_size: int
    micro_batch_size: int | None
    training: Training
    fixed: Mapping[str, Any]
    limit_bytes: float
    forward_only: bool
    rejected: Counter[str] = field(default_factory=Counter)
    candidates: int = 0
    groups: list[_Group] = field(default_factory=list)

    def estimate_all(self) -> None:
        """Estimate every candidate, structure by structure."""
        meshes = [Mesh(dp=d, tp=t, pp=p, cp=c) for d, t, p, c in factorizations(self.workers, 4)]
        by_shape: dict[tuple[bool, int], list[Mesh]] = {}
        for mesh in meshes:
            if self._possible(mesh):
                by_shape.setdefault((mesh.tp > 1, mesh.cp), []).append(mesh)
        for (tp, cp), members in by_shape.items():
            for structure in self._structures(tp=tp, cp=cp):
                self._estimate(structure, members)

    def _possible(self, mesh: Mesh) -> bool:
        model = self.model
        limits = (
            (mesh.tp > model.heads, f"tp above the {model.heads} attention heads"),
            (mesh.dp > self.global_batch_size, f"more replicas than the {self.global_batch_size} sequences of a batch"),
            (mesh.pp > model.layers, f"more pipeline stages than the {model.layers} layers"),
            (mesh.cp > 1 and model.seq_len < 2 * mesh.cp * mesh.tp, "sequence parts below two positions"),
        )
        for bad, reason in limits:
            if bad:
                self.rejected[reason] += 1
                return False
        return all(
            self.fixed.get(axis, getattr(mesh, axis)) == getattr(mesh, axis) for axis in ("dp", "tp", "pp", "cp")
        )

    def _structures(self, *, tp: bool, cp: int) -> Iterator[Structure]:
        fixed = self.fixed
        sequence = [fixed["sequence_parallel"]] if "sequence_parallel" in fixed else [False, True]
        kinds = [fixed["cp_kind"]] if "cp_kind" in fixed else CONTEXT_KINDS
        recompute = [fixed["recompute"]] if "recompute" in fixed else RECOMPUTE
        attention = fixed.get("attention", default_attention(self.model))
        for sp, kind, again in product(sequence, kinds if cp > 1 else kinds[:1], recompute):
            if (
                (sp and not tp)
                or (self.forward_only and again != "none")
                or (again == "selective" and attention != "plain")
            ):
                continue
            core = "plain" if kind == "ring" and cp > 1 else attention
            yield Structure(self.model, self.training, tp, cp, sp, kind, again, core, self.forward_only)

    def _estimate(self, structure: Structure, meshes: list[Mesh]) -> None:
        rows = [
            (mesh.pp, mesh.dp, mesh.tp, micro, chunks, zero, schedule)
            for mesh in meshes
            for micro in self._micro_batches(mesh)
            for schedule, chunks in self._schedules(mesh, micro)
            for zero in self._zero_stages(mesh)
        ]
        if not rows:
            return
        table = np.array([row[:6] for row in rows], dtype=np.int64)
        names = np.array([row[6] for row in rows])
        bad = self._impossible(structure, table)
        if bad is not None:
            reason, mask = bad
            self.rejected[reason] += int(mask.sum())
            table, names = table[~mask], names[~mask]
        if not len(table):
            return
        costs = self._costs(structure, table)
        ranks_per_host = np.full(len(table), self._ranks_per_host())
        for schedule in dict.fromkeys(names.tolist()):
            mask = names == schedule
            columns = Candidates(*(table[mask, i] for i in range(6)))
            chosen = {name: cost.take(np.flatnonzero(mask)) for name, cost in costs.items()}
            seconds, peak = step_seconds(
                chosen, columns, self.machine, structure, schedule, self.global_batch_size, ranks_per_host[mask]
            )
            self.candidates += len(seconds)
            self.groups.append(_Group(structure, schedule, columns, seconds, peak))

    def _impossible(self, structure: Structure, table: NDArray[np.int64]) -> tuple[str, NDArray[np.bool_]] | None:
        if structure.cp_kind == "ulysses" and structure.cp > 1:
            return "key-value heads that ulysses cannot split", self.model.kv_heads % (table[:, 2] * structure.cp) != 0
        return None

    def _costs(self, structure: Structure, table: NDArray[np.int64]) -> dict[str, BlockCost]:
        """Block costs of every candidate, each (tp, micro-batch) laid out and priced once."""
        pairs, index = np.unique(table[:, [2, 3]], axis=0, return_inverse=True)
        sizes = ArraySizes(self.model, pairs[:, 0], structure.cp, pairs[:, 1])
        costs = StructureCosts(structure, self.machine, sizes, np.full(len(pairs), self._ranks_per_host())).blocks()
        return {name: cost.take(index.reshape(-1)) for name, cost in costs.items()}

    def _ranks_per_host(self) -> int:
        cpu = self.machine.device.kind == "cpu"
        return self.workers if cpu else min(self.workers, self.machine.devices_per_host)

    def _micro_batches(self, mesh: Mesh) -> list[int]:
        if self.micro_batch_size is not None:
            return [self.micro_batch_size]
        replica = -(-self.global_batch_size // mesh.dp)
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size <= replica]
        return sizes if replica in sizes or replica > 128 else [*sizes, replica]

    def _schedules(self, mesh: Mesh, micro: int) -> Iterator[tuple[str, int]]:
        wanted = self.fixed.get("schedule")
        if mesh.pp == 1:
            if wanted in (None, "1f1b", "gpipe"):
                yield wanted or "1f1b", 1
            return
        for name in (wanted,) if wanted else SCHEDULES:
            if self.forward_only and name != "gpipe":
                yield "gpipe", 1
                return
            if name == "interleaved":
                most = self.model.layers // mesh.pp
                chunks = [v for v in range(2, most + 1) if most % v == 0 or v <= 4]
                chosen = self.fixed.get("num_model_chunks")
                yield from ((name, v) for v in chunks if chosen in (None, v))
            else:
                yield name, 1

    def _zero_stages(self, mesh: Mesh) -> tuple[int, ...]:
        if "zero_stage" in self.fixed:
            return (self.fixed["zero_stage"],) if mesh.dp * mesh.cp > 1 or not self.fixed["zero_stage"] else ()
        return (0, 1, 2, 3) if mesh.dp * mesh.cp > 1 and not self.forward_only else (0,)

    # ---- replay ------------------------------------------------------------------------------------------------------

    def best(self) -> Iterator[tuple[_Group, int]]:
        """Candidates that are estimated to fit, fastest first; among equals the one that needs less memory."""
        groups = [i for i, group in enumerate(self.groups) for _ in group.seconds]
        rows = [row for group in self.groups for row in range(len(group.seconds))]
        if not groups:
            return
        seconds = np.concatenate([group.seconds for group in self.groups])
        peak = np.concatenate([group.peak_bytes for group in self.groups])
        margin = 1.1  # an estimate may be a little high; the replay decides
        self.rejected[self.memory_reason()] += int((peak > self.limit_bytes * margin).sum())
        fits = np.flatnonzero(peak <= self.limit_bytes * margin)
        for place in fits[np.lexsort((peak[fits], np.round(seconds[fits], 9)))]:
            yield self.groups[groups[place]], rows[place]

    def memory_reason(self) -> str:
        """The reason under which candidates are counted that do not fit."""
        return f"more memory than the {self.limit_bytes / 2**30:.1f} GiB of a rank"

    def plan(self, group: _Group, row: int) -> Plan:
        """The candidate as a plan, its layers placed so that the slowest stage is as fast as can be."""
        structure, at = group.structure, group.columns
        pp, dp, tp, micro, chunks, zero = (int(getattr(at, f.name)[row]) for f in fields(at))
        mesh = Mesh(pp=pp, dp=dp, cp=structure.cp, tp=tp)
        return make_plan(
            self.model, mesh,
            global_batch_size=self.global_batch_size,
            micro_batch_size=micro,
            schedule=ScheduleRecipe(name=group.schedule, num_model_chunks=chunks),
            stage_layers=self._stage_layers(structure, mesh, micro, chunks),
            sequence_parallel=structure.sequence_parallel,
            cp_kind=structure.cp_kind,
            recompute=structure.recompute,
            zero_stage=zero,
            attention=structure.attention,
            training=self.training,
            forward_only=self.forward_only,
        )  # fmt: skip

    def _stage_layers(self, structure: Structure, mesh: Mesh, micro: int, chunks: int) -> tuple[int, ...]:
        stages = mesh.pp * chunks
        if stages == 1:
            return (self.model.layers,)
        costs = self._costs(structure, np.array([[mesh.pp, mesh.dp, mesh.tp, micro, chunks, 0]]))
        whole = {name: float((c.forward_seconds + c.backward_seconds)[0]) for name, c in costs.items()}
        return balance(self.model.layers, stages, whole["layer"], whole["embedding"], whole["head"])


def default_attention(model: ModelSpec) -> str:
    """Blocked attention where keeping all probabilities would dominate memory."""
    return "blocked" if model.seq_len > 1024 else "plain"


def balance(
    layers: int, stages: int, layer_seconds: float, first_seconds: float, last_seconds: float
) -> tuple[int, ...]:
    """Layers per stage that minimise the slowest stage, the embedding on the first and the head on the last.

    Greedy and exact: each layer goes to the stage that finishes earliest with it; ties to the middle stages.
    """
    extra = [0.0] * stages
    extra[0] += first_seconds
    extra[-1] += last_seconds
    counts = [1] * stages
    for _ in range(layers - stages):
        ends = [(counts[i] + 1) * layer_seconds + extra[i] for i in range(stages)]
        counts[min(range(stages), key=lambda i: (ends[i], i in (0, stages - 1)))] += 1
    return tuple(counts)


def default_memory_limit(machine: Machine, workers: int) -> float:
    """The device's memory; on a CPU the host's over the ranks on it."""
    host = machine.host.memory_bytes
    if machine.device.kind == "cpu" and host is not None:
        return host / workers
    return machine.device.memory_bytes


def suggest(
    model: ModelSpec,
    workers: int,
    machine: Machine,
    *,
    global_batch_size: int,
    micro_batch_size: int | None = None,
    training: Training | None = None,
    fixed: Mapping[str, Any] | None = None,
    top: int = 10,
    memory_limit_bytes: float | None = None,
    forward_only: bool = False,
) -> Suggestion:
    """Search all placements of a model on `workers` ranks and rank the best by predicted step time.

    Args:
        model: the model.
        workers: number of ranks.
        machine: the profile.
        global_batch_size: sequences per step over all ranks.
        micro_batch_size: sequences per forward pass; None searches.
        training: optimizer, dropout, precision.
        fixed: choices that are not searched, by name (tp, pp, dp, cp, schedule, num_model_chunks, recompute,
            zero_stage, sequence_parallel, cp_kind, attention).
        top: how many plans to return.
        memory_limit_bytes: per rank; None takes the machine's.
        forward_only: plan an evaluation instead of training.

    Raises:
        PlanError: no candidate is possible or fits; the message says what stands in the way.
    """
    started = time.perf_counter()
    limit = memory_limit_bytes or default_memory_limit(machine, workers)
    search = _Search(
        model, workers, machine, global_batch_size, micro_batch_size, training or Training(), dict(fixed or {}), limit,
        forward_only,
    )  # fmt: skip
    search.estimate_all()
    ranked: list[Ranked] = []
    replayed = 0
    for group, row in search.best():
        if replayed >= max(ALWAYS_REPLAYED, top) or (
            replayed >= ALWAYS_REPLAYED and time.perf_counter() - started > REPLAY_SECONDS
        ):
            break
        replayed += 1
        try:
            plan = search.plan(group, row)
            prediction = predict(plan, machine)
        except MeshwrightError as error:
            search.rejected[str(error)] += 1
            continue
        if max(prediction.peak_bytes) > limit:
            search.rejected[search.memory_reason()] += 1
            continue
        ranked.append(Ranked(plan, prediction))
    ranked.sort(key=lambda r: (r.prediction.step_seconds, max(r.prediction.peak_bytes)))
    rejected = [Rejection(reason, count) for reason, count in search.rejected.most_common() if count]
    if not ranked:
        raise PlanError(_nothing_fits(search, workers))
    return Suggestion(
        candidates=search.candidates,
        feasible=search.candidates - search.rejected[search.memory_reason()],
        replayed=replayed,
        seconds=time.perf_counter() - started,
        plans=ranked[:top],
        rejected=rejected,
        notes=_notes(model, workers, machine),
    )


def _nothing_fits(search: _Search, workers: int) -> str:
    if not search.rejected:
        return f"no placement on {workers} workers has the fixed choices {dict(search.fixed)}; free one of them"
    reason, count = search.rejected.most_common(1)[0]
    return (
        f"none of the {search.candidates} candidates for {workers} workers is possible: {reason} ({count} times); "
        "use more workers, a smaller batch or model, or a larger --memory-limit"
    )


def _notes(model: ModelSpec, workers: int, machine: Machine) -> list[str]:
    """What the user should know about how sizes fit."""
    notes = []
    if model.heads % workers:
        relation = "fewer heads than workers: tp stops there" if workers > model.heads else "uneven shares are costed"
        notes.append(f"{model.heads} heads do not divide over {workers} workers: {relation}")
    if machine.device.kind == "cpu" and workers > machine.host.cores:
        notes.append(
            f"{workers} ranks share {machine.host.cores} cores of {machine.name}: "
            "they take turns, so no speed-up over fewer ranks is promised"
        )
    return notes
