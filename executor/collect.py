"""Whole tensors on rank 0, put together from what the ranks hold: by the same index ranges that split them.

Nothing here knows tensor parallelism or ZeRO. A rank sends the range of each unit's flat buffer that it owns; rank 0
lays the ranges of a data group side by side, cuts the unit into parameters, and writes each to its global indices.
Elements that several ranks hold must agree, and by how much they do not is part of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from executor.comm import Communicator, wait_all
from executor.runtime import Runtime
from executor.state import UnitState, global_size
from planner.mesh import Coordinate
from planner.placement import Placement
from planner.plan import Plan
from planner.program import lower
from planner.program.units import Slot, Unit

Array = NDArray[Any]


class Collected(NamedTuple):
    """Whole tensors by parameter name.

    Attributes:
        tensors: global arrays.
        disagreement: for each tensor, the 2-norm of the largest difference between copies of its elements.
    """

    tensors: dict[str, Array]
    disagreement: dict[str, float]


class TrainingState(NamedTuple):
    """Every gradient of the last step, as the optimizer saw it (summed and clipped), and every parameter after it."""

    gradients: Collected
    parameters: Collected


def collect(runtime: Runtime) -> TrainingState | None:
    """Gather gradients and parameters; collective, the result is rank 0's."""
    plan, comm = runtime.plan, runtime.comm
    download = runtime.device.download
    own = [download(array) for unit in runtime.units.values() for array in (unit.reduced(), _held(unit))]
    if comm.rank:
        wait_all([comm.world.isend(array, 0, tag, key="collect") for tag, array in enumerate(own) if array.size])
        return None
    dtype, mixed = runtime.precision.master, runtime.precision.mixed
    wholes = _Whole(plan, dtype), _Whole(plan, dtype)
    sharded = plan.zero_stage > 0, plan.zero_stage == 3 or (mixed and plan.zero_stage > 0)  # gradients; parameters
    for at in (at for at in plan.mesh.coordinates() if at.dp == at.cp == 0):
        # Units depend on the pipeline and tensor coordinates only.
        for position, unit in enumerate(lower(plan, plan.mesh.rank(at)).units):
            for i, whole in enumerate(wholes):
                copies = _replicas(plan, comm, at, (2 * position + i, unit), own, sharded=sharded[i])
                whole.add(at, unit, [np.concatenate(copies)] if sharded[i] else copies)
    return TrainingState(wholes[0].finish(), wholes[1].finish())


def _held(unit: UnitState) -> Array:
    """The parameters that a rank has between steps: whole wherever it has them whole, so that copies are compared.

    Under mixed precision the master copy counts, of which `UnitState.whole` is a rounded one.
    """
    return unit.shard if unit.whole is None or unit.has_master else unit.whole


def _replicas(
    plan: Plan, comm: Communicator, at: Coordinate, tagged: tuple[int, Unit], own: Sequence[Array], *, sharded: bool
) -> list[Array]:
    """What each data rank holds of a unit: its shard, or the whole."""
    tag, unit = tagged
    found = []
    for peer, shard_size in zip(plan.mesh.group("data", at), unit.shard_sizes, strict=True):
        size = shard_size if sharded else unit.size
        part = own[tag] if peer == 0 else np.empty(size, own[0].dtype)
        if peer and size:
            comm.world.irecv(part, peer, tag, key="collect").wait()
        found.append(part)
    return found


class _Whole:
    """Global arrays being filled, each element once; further copies are compared with the first."""

    def __init__(self, plan: Plan, dtype: np.dtype[Any]) -> None:
        self.plan, self.dtype = plan, dtype
        self.tensors: dict[str, Array] = {}
        self.disagreement: dict[str, float] = {}
        self._seen: dict[str, NDArray[np.bool_]] = {}

    def add(self, at: Coordinate, unit: Unit, copies: list[Array]) -> None:
        placement = Placement(self.plan, at)
        for flat in copies:
            for slot in unit.slots:
                self._add_slot(placement, slot, flat[slot.offset : slot.offset + slot.size].reshape(slot.shape))

    def _add_slot(self, placement: Placement, slot: Slot, values: Array) -> None:
        name, dims = slot.parameter.name, slot.parameter.dims
        if name not in self.tensors:
            shape = tuple(global_size(placement, dim) for dim in dims)
            self.tensors[name], self._seen[name] = np.zeros(shape, self.dtype), np.zeros(shape, bool)
            self.disagreement[name] = 0.0
        at = np.ix_(*(placement.index(dim, slot.axes) for dim in dims))
        seen, held = self._seen[name][at], self.tensors[name][at]
        difference = float(np.linalg.norm((values - held)[seen]))
        # A NaN is a disagreement too, and max() would lose it.
        self.disagreement[name] = max(self.disagreement[name], np.inf if np.isnan(difference) else difference)
        self.tensors[name][at] = np.where(seen, held, values)
        self._seen[name][at] = True

    def finish(self) -> Collected:
        missing = [name for name, seen in self._seen.items() if not seen.all()]
        assert not missing, f"no rank holds some elements of {', '.join(missing)}"
        return Collected(self.tensors, self.disagreement)


def gather_bytes(comm: Communicator, content: bytes) -> list[bytes]:
    """Gather byte strings of any length; rank 0 gets those of all ranks in order, the others nothing."""
    sizes = comm.world.gather_words(len(content))
    if comm.rank:
        buffer = np.frombuffer(content, np.uint8)
        if buffer.size:
            comm.world.isend(buffer, 0, key="gather_bytes").wait()
        return []
    received = [content]
    for peer, size in enumerate(sizes[1:], 1):
        buffer = np.empty(size, np.uint8)
        if size:
            comm.world.irecv(buffer, peer, key="gather_bytes").wait()
        received.append(buffer.tobytes())
    return received
