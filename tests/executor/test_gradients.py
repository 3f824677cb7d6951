"""One rank's loss and gradients are right: against finite differences, and against PyTorch's stored values."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from equivalence_plans import MODELS, model, plan

from executor.comm import Communicator
from executor.comm.fabric import Fabric
from executor.comm.loopback import LoopbackTransport
from executor.data import Batch, Batches
from executor.runtime import Runtime
from planner.model import ModelSpec

TESTS = Path(__file__).resolve().parents[1]
FROZEN = {"optimizer": "sgd", "learning_rate": 0.0, "clip_norm": None}


def alone(candidate, batches):
    """One rank's runtime."""
    comm = Communicator(LoopbackTransport(Fabric(1), 0))
    return Runtime(candidate, comm, batches)


def tensors(runtime, flat):
    """Views of all parameters or gradients by name."""
    return {
        name: unit.view(getattr(unit, flat), slot)
        for unit in runtime.units.values()
        for name, slot in unit.slots.items()
    }


@pytest.mark.parametrize("attention", ["plain", "blocked"])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_gradients_equal_finite_differences(kind, attention):
    """Central differences along a random direction of each tensor, dropout on, two micro-batches.

    With step h the error is O(h²) + rounding/h: 1e-7 of the slope leaves two digits to spare.
    """
    spec = model(kind)
    candidate = plan(spec, attention=attention, batch=3, training=FROZEN | {"dropout": 0.1})
    runtime = alone(candidate, Batches("synthetic", spec, 3, 0))
    parameters, rng = tensors(runtime, "whole"), np.random.default_rng(0)
    for value in parameters.values():  # away from the starting point, where biases are zero and gains one
        np.add(value, 0.1 * rng.standard_normal(value.shape), out=value)
    runtime.run_step(0)
    gradients = {name: value.copy() for name, value in tensors(runtime, "gradient").items()}
    scale = np.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
    for name, value in parameters.items():
        direction = rng.standard_normal(value.shape)
        direction /= np.linalg.norm(direction)
        start, step, losses = value.copy(), 1e-5, []
        for sign in (1, -1):
            value[...] = start + sign * step * direction
            losses.append(runtime.run_step(0).loss)
        value[...] = start
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(float((gradients[name] * direction).sum()), abs=1e-7 * scale), name
    assert scale > 1e-3


class StoredBatch:
    """One batch from a file, by the interface of `Batches`."""

    def __init__(self, values):
        self.values = values

    def batch(self, step, samples, positions):
        at = np.ix_(np.asarray(positions), np.asarray(samples))
        return Batch(*(self.values[name][at] for name in ("ids", "targets", "weights")))

    def loss_scale(self, step):
        return 1.0 / float(self.values["weights"].sum())


def stored(family):
    """PyTorch's values of a family, without the prefix."""
    with np.load(TESTS / "data" / "torch_model_values.npz") as content:
        return {
            name.removeprefix(f"{family}/"): content[name] for name in content.files if name.startswith(f"{family}/")
        }


@pytest.mark.parametrize("attention", ["plain", "blocked"])
@pytest.mark.parametrize("family", ["bert", "gpt", "llama", "qwen3"])
def test_loss_and_gradients_equal_pytorch(family, attention, torch_families):
    values = stored(family)
    spec = ModelSpec(**torch_families[family])
    candidate = plan(spec, attention=attention, batch=3, micro=2, training=FROZEN | {"dropout": 0.0})
    runtime = alone(candidate, StoredBatch(values))
    parameters = tensors(runtime, "whole")
    theirs = {name.removeprefix("parameter/") for name in values if name.startswith("parameter/")}
    assert parameters.keys() == theirs
    for name, value in parameters.items():
        value[...] = values[f"parameter/{name}"]
    assert runtime.run_step(0).loss == pytest.approx(float(values["loss"]), rel=1e-13)
    for name, gradient in tensors(runtime, "gradient").items():
        wanted = values[f"gradient/{name}"]
        np.testing.assert_allclose(gradient, wanted, rtol=1e-11, atol=1e-13 * (1 + np.abs(wanted).max()), err_msg=name)


@pytest.mark.parametrize("attention", ["plain", "blocked"])
@pytest.mark.parametrize("family", ["bert", "gpt", "llama", "qwen3"])
def test_gradients_are_as_near_the_truth_as_pytorchs(family, attention, torch_families):
    """All gradients against PyTorch's in float64: in bfloat16 no further than PyTorch's own bfloat16 is.

    float16 and tf32, with three bits more, are eight times nearer, give or take a factor of two.
    """
    values, spec = stored(family), ModelSpec(**torch_families[family])
    theirs = json.loads((TESTS / "data" / "torch_bfloat16_errors.json").read_text())["errors"][family]
    for precision, limit in (("bfloat16", 1.1 * theirs), ("float16", theirs / 4), ("tf32", theirs / 4)):
        training = FROZEN | {"dropout": 0.0, "precision": precision}
        runtime = alone(plan(spec, attention=attention, batch=3, micro=2, training=training), StoredBatch(values))
        for unit in runtime.units.values():
            unit.set_parameters(np.concatenate([values[f"parameter/{name}"].ravel() for name in unit.slots]))
        assert runtime.run_step(0).loss == pytest.approx(float(values["loss"]), rel=limit)
        wrong = right = 0.0
        for unit in runtime.units.values():
            for name, slot in unit.slots.items():
                wanted = values[f"gradient/{name}"]
                wrong += float(((unit.view(unit.gradient, slot) - wanted) ** 2).sum())
                right += float((wanted**2).sum())
        assert 0 < (wrong / right) ** 0.5 < limit, (precision, (wrong / right) ** 0.5, theirs)


@pytest.fixture(scope="module")
def torch_families():
    """The sizes of the stored models, read from the script that made them without importing PyTorch."""
    source = (TESTS / "make_torch_model_values.py").read_text()
    start, stop = source.index("LAYERS, HIDDEN"), source.index("class Model")
    names = {}
    exec(compile(source[start:stop], "make_torch_model_values.py", "exec"), names)
    assert "torch" not in sys.modules
    return names["FAMILIES"]
