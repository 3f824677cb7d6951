"""The space of a search: every placement of a model on workers as arrays, estimated, the best made into plans.

Every combination of axis sizes, micro-batch, model chunks, schedule, recomputation, ZeRO stage, sequence parallelism
and kind of context parallelism is a candidate. All are estimated at once by array formulas, structure by structure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.admissible import ContextKind
from planner.cost.algorithms import fix_collectives
from planner.machine import Machine
from planner.mesh import Mesh, factorizations
from planner.model import ModelSpec
from planner.plan import Plan, Recompute, ScheduleRecipe, Training, make_plan
from planner.schedule import model_chunks
from planner.search.balance import balance, replica_speeds, split_batch, stage_speeds
from planner.search.candidates import UPDATES, Candidates, Question, Update, estimate
from planner.search.estimate import ArraySizes, BlockCost, Structure, StructureCosts

BEST_KEPT = 256
"""Estimates that are put in order; so many candidates at most can be replayed."""
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb-h1", "zb-h2")
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
CONTEXT_KINDS: tuple[ContextKind, ...] = ("allgather", "ring", "ulysses")


@dataclass
class Group:
    """Placements of one structure and schedule, estimated: arrays [placements, updates]."""

    structure: Structure
    schedule: str
    columns: Candidates
    updates: tuple[Update, ...]
    seconds: NDArray[np.float64]
    peak_bytes: NDArray[np.float64]

    def family(self, row: int) -> tuple[object, ...]:
        """What decides how far a memory estimate is off: placement, schedule, recomputation."""
        at, structure = self.columns, self.structure
        placement = tuple(int(getattr(at, f.name)[row]) for f in fields(at))
        return (placement, self.schedule, structure.recompute, structure.sequence_parallel)


@dataclass
class Space:
    """All placements of one question: enumerated, estimated, put in order, and made into plans."""

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
    groups: list[Group] = field(default_factory=list)

    def estimate_all(self) -> None:
        """Estimate every candidate, structure by structure."""
        meshes = [Mesh(dp=d, tp=t, pp=p, cp=c) for d, t, p, c in factorizations(self.workers, 4)]
        by_shape: dict[tuple[bool, bool], list[Mesh]] = {}
        for mesh in meshes:
            if self._possible(mesh):
                by_shape.setdefault((mesh.tp > 1, mesh.cp > 1), []).append(mesh)
        for (tp, cp), members in by_shape.items():
            tables = self._tables(members)
            for structure in self._structures(tp=tp, cp=cp):
                self._estimate(structure, tables)

    def _possible(self, mesh: Mesh) -> bool:
        """Whether a mesh has the fixed axes and the model can be laid out on it; counts the reasons if not."""
        if any(self.fixed.get(axis, getattr(mesh, axis)) != getattr(mesh, axis) for axis in ("dp", "tp", "pp", "cp")):
            return False
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
        return True

    def _structures(self, *, tp: bool, cp: bool) -> Iterator[Structure]:
        fixed = self.fixed
        sequence = [fixed["sequence_parallel"]] if "sequence_parallel" in fixed else [False, True]
        kinds = [fixed["cp_kind"]] if "cp_kind" in fixed else CONTEXT_KINDS
        recompute = [fixed["recompute"]] if "recompute" in fixed else RECOMPUTE
        attention = fixed.get("attention", default_attention(self.model))
        for sp, kind, again in product(sequence, kinds if cp else kinds[:1], recompute):
            if (
                (sp and not tp)
                or (self.forward_only and again != "none")
                or (again == "selective" and attention != "plain")
            ):
                continue
            core = "plain" if kind == "ring" and cp else attention
            yield Structure(self.model, self.training, tp, cp, sp, kind, again, core, self.forward_only)

    def _tables(self, meshes: list[Mesh]) -> dict[str, Candidates]:
        """The placements of meshes by schedule: every micro-batch with every number of chunks."""
        found: dict[str, list[NDArray[np.int64]]] = {}
        for mesh in meshes:
            micro = np.array(self._micro_batches(mesh))
            by_name: dict[str, list[int]] = {}
            for name, chunks in self._schedules(mesh):
                by_name.setdefault(name, []).append(chunks)
            for name, chunks_of in by_name.items():
                rows = np.empty((len(micro) * len(chunks_of), 6), np.int64)
                rows[:, :4] = mesh.pp, mesh.dp, mesh.cp, mesh.tp
                rows[:, 4], rows[:, 5] = np.repeat(micro, len(chunks_of)), np.tile(chunks_of, len(micro))
                found.setdefault(name, []).append(rows)
        return {name: Candidates(*np.concatenate(rows).T) for name, rows in found.items()}

    def _estimate(self, structure: Structure, tables: dict[str, Candidates]) -> None:
        updates = self._updates()
        kept = {name: self._possible_rows(structure, at, len(updates)) for name, at in tables.items()}
        kept = {name: at for name, at in kept.items() if len(at.pp)}
        if not kept:
            return
        every = np.concatenate([np.stack([at.tp, at.cp, at.micro_batch], axis=1) for at in kept.values()])
        costs, place = self._costs(structure, every)
        start = 0
        for schedule, at in kept.items():
            index = place[start : start + len(at.pp)]
            start += len(at.pp)
            question = Question(
                self.machine, structure, schedule, self.global_batch_size, self._ranks_per_host(), updates
            )
            seconds, peak = estimate(question, {name: cost.take(index) for name, cost in costs.items()}, at)
            self.candidates += int(np.isfinite(seconds).sum())
            self.groups.append(Group(structure, schedule, at, updates, seconds, peak))

    def _possible_rows(self, structure: Structure, at: Candidates, updates: int) -> Candidates:
        """The placements that the structure's context parallelism can split."""
        if structure.cp_kind != "ulysses" or not structure.cp:
            return at
        good = self.model.kv_heads % (at.tp * at.cp) == 0
        self.rejected["key-value heads that ulysses cannot split"] += int((~good).sum()) * updates
        return Candidates(*(getattr(at, f.name)[good] for f in fields(at)))

    def _costs(self, structure: Structure, sizes: NDArray[np.int64]) -> tuple[dict[str, BlockCost], NDArray[np.int64]]:
        """Block costs of every distinct (tp, cp, micro-batch), each priced once, and the one of every row."""
        distinct, place = np.unique(sizes, axis=0, return_inverse=True)
        arrays = ArraySizes(self.model, *distinct.T)
        per_host = np.full(len(distinct), self._ranks_per_host())
        return StructureCosts(structure, self.machine, arrays, per_host).blocks(), place.reshape(-1)

    def _ranks_per_host(self) -> int:
        return self.machine.ranks_per_host(self.workers)

    def _micro_batches(self, mesh: Mesh) -> list[int]:
        """Powers of two, and whatever divides a replica's batch, up to 128 sequences."""
        if self.micro_batch_size is not None:
            return [self.micro_batch_size]
        replica = -(-self.global_batch_size // mesh.dp)
        powers = {1, 2, 4, 8, 16, 32, 64, 128}
        return [n for n in range(1, min(replica, 128) + 1) if n in powers or replica % n == 0]

    def _schedules(self, mesh: Mesh) -> Iterator[tuple[str, int]]:
        wanted, chosen = self.fixed.get("schedule"), self.fixed.get("num_model_chunks")
        if mesh.pp == 1:
            if wanted in (None, "1f1b", "gpipe"):
                yield wanted or "1f1b", 1
            return
        for name in ("gpipe",) if self.forward_only else (wanted,) if wanted else SCHEDULES:
            usual = model_chunks(name)
            most = self.model.layers // mesh.pp
            several = [v for v in range(2, most + 1) if most % v == 0 or v <= 4]
            options = several if usual is None else [usual] if usual <= most else []
            yield from ((name, v) for v in options if chosen in (None, v))

    def _updates(self) -> tuple[Update, ...]:
        if self.forward_only:
            return (Update(0, overlap=False),)
        zero, overlap = self.fixed.get("zero_stage"), self.fixed.get("overlap_gradients")
        chosen = tuple(u for u in UPDATES if zero in (None, u.zero) and overlap in (None, u.overlap))
        return chosen or (Update(int(zero or 0), overlap=False),)

    def best(self) -> Iterator[tuple[Group, int, Update]]:
        """Candidates that are estimated to fit, fastest first; among equals the one that needs less memory."""
        margin = 1.0  # estimates lie within a few percent of what the replay finds, which decides
        short: list[tuple[float, float, int, int]] = []
        for number, group in enumerate(self.groups):
            seconds, peak = group.seconds.ravel(), group.peak_bytes.ravel()
            possible = np.isfinite(seconds)
            fits = np.flatnonzero(possible & (peak <= self.limit_bytes * margin))
            self.rejected[self.memory_reason()] += int(possible.sum()) - len(fits)
            if len(fits) > BEST_KEPT:
                fits = fits[np.argpartition(seconds[fits], BEST_KEPT)[:BEST_KEPT]]
            short += [(round(float(seconds[i]), 9), float(peak[i]), number, int(i)) for i in fits]
        for _, _, number, place in sorted(short)[:BEST_KEPT]:
            group = self.groups[number]
            row, column = divmod(place, len(group.updates))
            yield group, row, group.updates[column]

    def memory_reason(self) -> str:
        """The reason under which candidates are counted that do not fit."""
        limit = self.limit_bytes / 2**30
        return f"more memory than the {f'{limit:.1f}' if limit >= 0.1 else f'{limit:.2g}'} GiB of a rank"

    def plan(self, group: Group, row: int, update: Update) -> Plan:
        """The candidate as a plan, its layers placed so that the slowest stage is as fast as can be."""
        structure, at = group.structure, group.columns
        pp, dp, cp, tp, micro, chunks = (int(getattr(at, f.name)[row]) for f in fields(at))
        mesh = Mesh(pp=pp, dp=dp, cp=cp, tp=tp)
        plan = make_plan(
            self.model, mesh,
            global_batch_size=self.global_batch_size,
            micro_batch_size=micro,
            schedule=ScheduleRecipe(name=group.schedule, num_model_chunks=chunks),
            stage_layers=self._stage_layers(structure, mesh, micro, group.schedule, chunks),
            parts=self._parts(mesh),
            sequence_parallel=structure.sequence_parallel,
            cp_kind=structure.cp_kind,
            recompute=structure.recompute,
            zero_stage=update.zero,
            overlap_gradients=update.overlap,
            attention=structure.attention,
            transport=self.machine.transport_in_use,
            training=self.training,
            forward_only=self.forward_only,
        )  # fmt: skip
        return fix_collectives(plan, self.machine)

    def _parts(self, mesh: Mesh) -> dict[str, tuple[int, ...]]:
        """Part sizes that are not even: the batch over replicas of different speeds."""
        if not self.machine.relative_speeds or mesh.dp == 1:
            return {}
        return {"batch": split_batch(self.global_batch_size, replica_speeds(self.machine, mesh))}

    def _stage_layers(
        self, structure: Structure, mesh: Mesh, micro: int, schedule: str, chunks: int
    ) -> tuple[int, ...]:
        stages = mesh.pp * chunks
        if stages == 1:
            return (self.model.layers,)
        costs, _ = self._costs(structure, np.array([[mesh.tp, mesh.cp, micro]]))
        whole = {name: float((c.forward_seconds + c.backward_seconds)[0]) for name, c in costs.items()}
        speeds = stage_speeds(self.machine, mesh, schedule, chunks) if self.machine.relative_speeds else None
        return balance(self.model.layers, stages, whole["layer"], whole["embedding"], whole["head"], speeds)


def default_attention(model: ModelSpec) -> str:
    """Blocked attention where keeping all probabilities would dominate memory."""
    return "blocked" if model.seq_len > 1024 else "plain"
