"""Array estimates: equal to those of single candidates, and close to the predictions that they stand in for."""

import numpy as np
import pytest
from test_search import A100, CPU, searched

from planner.model import with_sizes
from planner.plan import Training
from planner.predict import predict
from planner.search.estimate import ArraySizes, Structure, StructureCosts

MODEL = with_sizes(layers=12)


def costs(tp, batch, **changes):
    structure = Structure(MODEL, Training(), True, False, changes.get("sp", False), "allgather", "none")
    ones = np.ones(len(tp), np.int64)
    sizes = ArraySizes(MODEL, np.array(tp), ones, np.array(batch))
    return StructureCosts(structure, CPU, sizes, 8 * ones).blocks()


@pytest.mark.parametrize("sp", [False, True])
def test_an_array_of_sizes_costs_what_each_size_costs(sp):
    tp, batch = [2, 4, 8, 3, 5], [1, 2, 8, 4, 3]
    together = costs(tp, batch, sp=sp)
    for i, (t, b) in enumerate(zip(tp, batch, strict=True)):
        alone = costs([t], [b], sp=sp)
        for name, block in together.items():
            for field in (
                "forward_seconds",
                "input_seconds",
                "weight_seconds",
                "saved_bytes",
                "scratch_bytes",
                "parameters",
            ):
                assert getattr(block, field)[i] == pytest.approx(getattr(alone[name], field)[0], rel=1e-12), (
                    name,
                    field,
                )


@pytest.mark.parametrize(("machine", "batch"), [(CPU, 16), (A100, 32)], ids=["cpu", "a100"])
def test_estimates_are_close_to_predictions(machine, batch, capsys):
    """What orders the candidates: medians within 5%, nine of ten within 15% of the replay's step time."""
    everything = list(searched(MODEL, 8, machine, batch, micro=2))
    rng = np.random.default_rng(1)
    drawn = [everything[i] for i in rng.permutation(len(everything))[:12]]
    ratios = np.array([seconds / predict(make(), machine).step_seconds for make, seconds in drawn])
    with capsys.disabled():
        low, middle, high = np.quantile(ratios, (0.05, 0.5, 0.95))
        print(f"estimate / prediction on {machine.name}: 5% {low:.3f}, median {middle:.3f}, 95% {high:.3f}")
    assert abs(np.median(ratios) - 1) < 0.05
    assert np.mean(np.abs(ratios - 1) < 0.15) >= 0.9
