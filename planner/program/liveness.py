"""When the buffers of a micro-batch are born and die, from what its tasks read and write.

A buffer is saved for the backward pass exactly when a backward task reads it before any backward task has written it
anew; so recomputation needs no rule of its own: what is recomputed is not saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from planner.program.tasks import Buffer, Task

Segment = tuple[Task, ...]


def needed(tasks: Iterable[Task], buffers: dict[str, Buffer]) -> set[str]:
    """Roots that a segment reads before it has written them."""
    defined: set[str] = set()
    wanted: set[str] = set()
    for task in tasks:
        wanted |= {buffers[name].root for name in task.reads if name in buffers} - defined
        defined |= {buffers[name].root for name in task.writes if name in buffers}
    return wanted


def with_frees(
    segments: Sequence[Sequence[Task]], buffers: dict[str, Buffer], live_out: Sequence[set[str]]
) -> list[Segment]:
    """Give every task of consecutive segments the roots that die with it.

    `live_out[i]` names buffers that leave segment i by a send and are freed when that has completed.
    """
    finished: list[Segment] = []
    for i, tasks in enumerate(segments):
        later = needed(chain.from_iterable(segments[i + 1 :]), buffers)  # what a segment writes, the next need not keep
        keep = later | {buffers[name].root for name in live_out[i]}
        last: dict[str, int] = {}
        for index, task in enumerate(tasks):
            for name in (*task.reads, *task.writes):
                last[buffers[name].root] = index
        dying: dict[int, list[str]] = {}
        for root, index in last.items():
            if root not in keep:
                dying.setdefault(index, []).append(root)
        finished.append(tuple(replace(task, frees=tuple(dying.get(n, ()))) for n, task in enumerate(tasks)))
    return finished
