"""Task, Buffer, Work: the vocabulary of a program."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from planner.placement import Count


@dataclass(frozen=True, slots=True)
class Work:
    """What a task asks of the machine, for the cost formulas; sizes may be arrays over candidates.

    A product has `m`, `n`, `k` and a `batch` of them; anything else is bound by `elements` and `bytes` moved through
    memory. A collective's `bytes` are the payload that this rank hands to MPI and `full_bytes` the whole gathered or
    unreduced buffer. `share` is the visible share of an attention's query-key pairs.
    """

    m: Count = 0
    n: Count = 0
    k: Count = 0
    batch: Count = 1
    elements: Count = 0
    bytes: Count = 0
    full_bytes: Count = 0
    share: Any = 1.0


@dataclass(frozen=True, slots=True)
class Buffer:
    """An array of a segment. `root` owns the memory; a buffer with another root is a view of (or replaces) it."""

    shape: tuple[Count, ...]
    root: str
    selector: str | None = None  # which part of the root's packed columns a view shows: "q", "k" or "v"
    category: str = "activations"
    dtype: str = "compute"  # "compute" (the plan's precision) or "statistics" (float32 at least)


@dataclass(slots=True)
class Task:
    """One operator, collective or transfer of a rank; both interpreters read this and nothing else.

    `key` names it in plan, prediction and measurement. `phase` is the part of the pass it belongs to (F, I or W; U
    after the last backward). Names in `reads`, `writes` and `frees` are buffers of the micro-batch in hand;
    `parameters` and `gradients` are the rank's own. An axis names the group of a collective.
    """

    key: str
    kind: str
    name: str
    phase: str = "F"
    stream: str = "compute"
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    frees: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    axis: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
