"""What the bindings of one rank share, and the table of them by task kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.device import HOST, Device
from executor.precision import Precision
from executor.random import derive_key
from executor.state import UnitState
from planner.placement import Placement
from planner.plan import Plan
from planner.program.tasks import Task
from planner.shard import offsets, shared_kv_heads

Array = NDArray[Any]
Ints = NDArray[np.int64]


@dataclass
class MicroBatch:
    """Arrays of one micro-batch on one stage, by buffer name, and the blocks that hold them, by root."""

    samples: Ints  # indices in the step's global batch
    batch: int
    arrays: dict[str, Array] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What the bindings of one rank share."""

    plan: Plan
    placement: Placement
    units: dict[str, UnitState]  # by parameter name
    precision: Precision
    kernels: Any  # the table of kernels: `executor.kernels`, or what stands in for it
    ends: tuple[int, int]  # pipeline ranks of the first and the last stage
    device: Device = HOST
    step: int = 0
    loss_scale: float = 0.0  # 1 / number of counted tokens in the global batch
    gradient_scale: float = 1.0  # by which float16 multiplies the loss gradient
    loss: Any = 0.0  # a scalar of the device until the step's last task
    keys: dict[tuple[int, str], int] = field(default_factory=dict)
    _index: dict[tuple[str, tuple[str, ...]], Ints] = field(default_factory=dict)
    _constants: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def constant(self, key: tuple[object, ...], make: Callable[[], Array]) -> Array:
        """An array that no step changes, made once on the host and kept on the device."""
        found: Array | None = self._constants.get(key)
        if found is None:
            found = self._constants[key] = self.device.upload(make())
        return found

    def index(self, unit: str, axes: tuple[str, ...]) -> Ints:
        """Global indices of this rank's part of a dimension."""
        found = self._index.get((unit, axes))
        if found is None:
            found = self._index[unit, axes] = self.placement.index(unit, axes)
        return found

    def positions(self, unit: str, axes: tuple[str, ...]) -> Ints:
        """The same on the device."""
        return self.constant(("index", unit, axes), lambda: self.index(unit, axes))

    def rows(self, task: Task) -> Ints:
        """Global positions of the rows that a task works on, on the device."""
        return self.positions("seq", task.attributes["where"]["seq"])

    def tied_ranks(self) -> tuple[int, ...]:
        """This rank and its partner at the other end of the pipeline, if they share the embedding's weight."""
        mesh, at, ends = self.plan.mesh, self.placement.at, self.ends
        if not self.plan.model.tie_embeddings or ends[0] == ends[1] or at.pp not in ends:
            return ()
        return tuple(mesh.rank(at._replace(pp=end)) for end in ends)

    def kv_columns(self) -> slice:
        """Columns of the key (or value) heads that this rank holds, among those of all heads."""
        model, tp, starts = self.plan.model, self.placement.at.tp, offsets(self.plan.parts.heads)
        first, last = shared_kv_heads(model.heads, model.kv_heads, starts[tp], starts[tp + 1])
        return slice(first * model.head_dim, last * model.head_dim)

    def dropout_key(self, name: str) -> int:
        """Key of an operator's dropout mask in this step."""
        key = self.keys.get((self.step, name))
        if key is None:
            if self.keys and next(iter(self.keys))[0] != self.step:
                self.keys.clear()
            key = self.keys[self.step, name] = derive_key(self.plan.training.seed, "dropout", self.step, name)
        return key

    @property
    def rate(self) -> float:
        """Dropout rate; evaluation keeps everything."""
        return 0.0 if self.plan.forward_only else self.plan.training.dropout

    def value(self, task: Task, suffix: str) -> Array | None:
        """The task's parameter with this last name, or None."""
        for name in task.parameters:
            if name.endswith(suffix):
                unit = self.units[name]
                return unit.view(unit.whole, unit.slots[name])
        return None

    def need(self, task: Task, suffix: str) -> Array:
        """The same where the operator always has one."""
        value = self.value(task, suffix)
        assert value is not None, f"{task.key} has no parameter {suffix}"
        return value

    def gradient(self, task: Task, suffix: str) -> Array | None:
        """A gradient that the kernel adds to; zeroed before its first use in the step."""
        for name in task.gradients:
            if name.endswith(suffix):
                array, held = self.units[name].gradient_of(name)
                if not held:
                    array[...] = 0
                return array
        return None

    def rotary(self, task: Task) -> tuple[Array | None, Array | None]:
        """Cosines and sines [S, head_dim/2] of this rank's positions (Su et al. 2021, arXiv:2104.09864)."""
        theta = task.attributes["theta"]
        if theta is None:
            return None, None
        axes = task.attributes["where"]["seq"]

        def table(function: np.ufunc) -> Array:
            half = self.plan.model.head_dim // 2
            angles = np.outer(self.index("seq", axes), theta ** (-np.arange(half) / half))
            values: Array = function(angles).astype(self.precision.master)
            return values

        return (
            self.constant(("cosines", theta, axes), lambda: table(np.cos)),
            self.constant(("sines", theta, axes), lambda: table(np.sin)),
        )


Binding = Callable[[Context, MicroBatch, Task], None]
BINDINGS: dict[str, Binding] = {}


def binding(kind: str) -> Callable[[Binding], Binding]:
    """Register the binding of a task kind."""

    def register(function: Binding) -> Binding:
        BINDINGS[kind] = function
        return function

    return register


def flat(array: Array) -> Array:
    """Tokens as rows."""
    return array.reshape(-1, array.shape[-1])


def first_index(c: Context, task: Task, unit: str) -> int:
    """Global index of the first column or row of this rank's contiguous part."""
    return c.placement.part(unit, task.attributes["where"][unit])[0][0]
