"""Does this layout train the model that one rank trains? Loss, gradients and one update, tensor by tensor.

The reference is the plainest plan there is: one rank, plain attention, nothing recomputed, nothing sharded, nothing
overlapped. Parameters, tokens and dropout depend on (seed, name, global index) only, so the two runs must agree to
rounding. What counts is the norm of a tensor's difference over the norm of the tensor, with these provisos:

* Tensors whose gradient is below a share of the global gradient norm are zero in theory and hold nothing but rounding:
  they are compared absolutely, on the scale of the global norm, and their update is not compared.
* AdamW's first step divides each gradient by its own size, which blows rounding up without bound where a gradient is
  near zero (every key bias inside a packed query-key-value bias). The update on one rank therefore takes one rank's
  initial parameters and the gradients that this layout found, once those have been compared themselves.
* A plan in tf32, float16 or bfloat16 is compared with one rank in *float32*, at the same rounded parameters: one rank
  in the same precision would share whatever that precision's own road does wrong (a gradient accumulated in 16 bits, a
  loss scale left in). Its gradients may then differ by what rounding does. What mixed precision keeps in float32 is
  held to float32's limit all the same: the update of the master parameters, and the copies that ranks hold of them.
  (ReLU's gradient jumps where rounding takes an element across its kink; very small models may fail by that.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from executor.collect import Collected, TrainingState, collect
from executor.comm import Communicator
from executor.comm.fabric import Fabric
from executor.comm.loopback import LoopbackTransport
from executor.data import Batches
from executor.device import HOST, Device
from executor.optim import learning_rate
from executor.precision import Precision
from executor.runtime import Runtime
from planner.mesh import Mesh
from planner.plan import Plan, Training, make_plan

Array = NDArray[Any]
DType = Literal["float32", "float64", "tf32", "float16", "bfloat16"]


class Limits(NamedTuple):
    """What counts as equal, and as nothing but rounding."""

    difference: float
    negligible: float  # share of the global gradient norm


LIMITS: dict[str, Limits] = {
    "float32": Limits(1e-5, 1e-6),
    "float64": Limits(1e-12, 1e-14),
    "tf32": Limits(5e-3, 1e-3),
    "float16": Limits(5e-3, 1e-3),
    "bfloat16": Limits(2e-2, 4e-3),
}
"""The lower three are ten unit roundoffs of tf32 and float16 (2^-11) and five of bfloat16 (2^-8): a gradient gathers
some from every tensor that is rounded on its way. torch.testing.assert_close grants a single operation two of float16's
(1e-3) and four of bfloat16's (1.6e-2).
"""

ALWAYS_FLOAT32 = ("update", "copies")
"""What mixed precision keeps, or finds, in float32 or bit for bit."""


class Difference(msgspec.Struct, frozen=True):
    """How far one tensor is off.

    Attributes:
        quantity: what was compared; "copies" are elements that several ranks hold.
        tensor: the parameter's name.
        difference: 2-norm of the difference over the tensor's norm, or over the global norm where `absolute`.
        absolute: the tensor's own gradient is nothing but rounding.
        limit: the largest difference that counts as equal.
    """

    quantity: Literal["loss", "gradient_norm", "gradient", "update", "copies"]
    tensor: str
    difference: float
    absolute: bool = False
    limit: float = 0.0

    @property
    def severity(self) -> float:
        """The difference over its limit; what is not a number is as bad as can be."""
        return np.inf if np.isnan(self.difference) else self.difference / self.limit


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict; `differences` has those nearest to their limit, or furthest above it, first."""

    plan_hash: str
    dtype: DType
    limit: float
    loss: float
    reference_loss: float
    passed: bool
    largest: Difference
    differences: list[Difference]


class _Outcome(NamedTuple):
    """One step of one layout, as rank 0 sees it."""

    loss: float
    gradient_norm: float
    state: TrainingState


def with_dtype(plan: Plan, dtype: DType) -> Plan:
    """The same plan in another precision."""
    return msgspec.structs.replace(plan, training=msgspec.structs.replace(plan.training, precision=dtype))


def reference_plan(plan: Plan) -> Plan:
    """The plan's training run on one rank, in the plainest way; micro-batches as large as the plan's.

    Precisions below float32 are compared with float32.
    """
    narrow = plan.training.precision not in ("float32", "float64")
    training = msgspec.structs.replace(plan.training, precision="float32") if narrow else plan.training
    return make_plan(
        plan.model,
        Mesh(),
        global_batch_size=plan.global_batch_size,
        micro_batch_size=min(plan.micro_batch_size, plan.global_batch_size),
        forward_only=plan.forward_only,
        training=training,
    )


def check(plan: Plan, comm: Communicator, dtype: DType, device: Device = HOST) -> CheckReport | None:
    """Compare one step of the plan with one rank's; collective, the report is rank 0's.

    Args:
        plan: the layout to check.
        comm: this rank's communicator; its size must be the plan's.
        dtype: precision of the layout; see `reference_plan` for the other's.
        device: where the layout's ranks compute; the one rank computes on the host, with other kernels.
    """
    plan = with_dtype(plan, dtype)
    runtime = _runtime(plan, comm, device)
    found = _first_step(runtime)
    if found is None:
        return None
    alone = _runtime(reference_plan(plan), Communicator(LoopbackTransport(Fabric(1), 0)), HOST)
    initial = {
        name: unit.view(unit.whole, slot).copy() for unit in alone.units.values() for name, slot in unit.slots.items()
    }
    _round_parameters(alone, runtime.precision)
    reference = _first_step(alone)
    assert reference is not None
    differences = [*_outcome_differences(plan, found, reference)]
    differences += _tensor_differences(plan, found.state, reference.state, initial)
    limits = dict.fromkeys(ALWAYS_FLOAT32, min(LIMITS[dtype].difference, LIMITS["float32"].difference))
    limit = LIMITS[dtype].difference
    differences = [msgspec.structs.replace(one, limit=limits.get(one.quantity, limit)) for one in differences]
    differences.sort(key=lambda one: one.severity, reverse=True)
    return CheckReport(
        plan_hash=plan.hash, dtype=dtype, limit=limit, loss=found.loss, reference_loss=reference.loss,
        passed=differences[0].severity <= 1, largest=differences[0], differences=differences,
    )  # fmt: skip


def _round_parameters(alone: Runtime, precision: Precision) -> None:
    """Give the reference the values that kernels of a precision read."""
    for unit in alone.units.values():
        if precision.mixed and unit.whole is not None:
            unit.whole[...] = unit.whole.astype(precision.storage)


def _runtime(plan: Plan, comm: Communicator, device: Device) -> Runtime:
    """A rank on synthetic tokens, which any vocabulary can hold."""
    batches = Batches("synthetic", plan.model, plan.global_batch_size, plan.training.seed)
    return Runtime(plan, comm, batches, measure_wait=False, device=device)


def _first_step(runtime: Runtime) -> _Outcome | None:
    """Run the first step and gather its results on rank 0; again while float16's first loss scales are too large."""
    while (result := runtime.run_step(0)).skipped:
        pass
    if runtime.plan.forward_only:
        nothing = Collected({}, {})
        return None if runtime.comm.rank else _Outcome(result.loss, 0.0, TrainingState(nothing, nothing))
    state = collect(runtime)
    return None if state is None else _Outcome(result.loss, result.gradient_norm, state)


def _outcome_differences(plan: Plan, found: _Outcome, reference: _Outcome) -> Iterator[Difference]:
    """Compare the scalars of a step."""
    yield Difference("loss", "loss", _relative(found.loss - reference.loss, reference.loss))
    if plan.training.clip_norm is not None and not plan.forward_only:
        difference = found.gradient_norm - reference.gradient_norm
        yield Difference("gradient_norm", "gradients", _relative(difference, reference.gradient_norm))


def _tensor_differences(
    plan: Plan, found: TrainingState, reference: TrainingState, initial: dict[str, Array]
) -> Iterator[Difference]:
    """Compare gradients and updated parameters, and the copies that ranks hold of them."""
    wanted = reference.gradients.tensors
    assert found.gradients.tensors.keys() == wanted.keys(), "both runs train the same parameters"
    global_norm = float(np.sqrt(sum(_norm(gradient) ** 2 for gradient in wanted.values())))
    for name, gradient in wanted.items():
        own, updated = found.gradients.tensors[name], found.parameters.tensors[name]
        norm = _norm(gradient)
        absolute = norm <= LIMITS[plan.training.precision].negligible * global_norm
        scale = global_norm if absolute else norm
        yield Difference("gradient", name, _relative(_norm(own - gradient), scale), absolute)
        yield Difference("copies", name, _relative(found.gradients.disagreement[name], scale), absolute)
        if absolute:
            continue
        expected = updated_on_one_rank(plan.training, initial[name], own)
        scale = _norm(expected)
        yield Difference("update", name, _relative(_norm(updated - expected), scale))
        yield Difference("copies", name, _relative(found.parameters.disagreement[name], scale))


def updated_on_one_rank(training: Training, parameter: Array, gradient: Array) -> Array:
    """A parameter after the first update, in double precision and by the formula.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2): at the first step the bias-corrected moments are
    the gradient and its square.
    """
    rate, g = learning_rate(training, 0), gradient.astype(np.float64)
    if training.optimizer == "sgd":
        return parameter - rate * g
    decay = training.weight_decay if parameter.ndim > 1 else 0.0
    return parameter * (1.0 - rate * decay) - rate * g / (np.abs(g) + training.epsilon)


def _norm(array: Array) -> float:
    """2-norm in double precision, whatever the array's."""
    return float(np.linalg.norm(array.astype(np.float64, copy=False)))


def _relative(difference: float, scale: float) -> float:
    """|difference| / scale; two zeros are equal."""
    return abs(difference) / scale if scale else (0.0 if difference == 0 else np.inf)
