"""Fitting: many plans priced at once as one by one, known figures found again, only shared figures changed."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from planner.cli.frame import run
from planner.cost.bulk import Bulk
from planner.cost.skeleton import Skeleton, unit_seconds
from planner.errors import DataError
from planner.machine import base_profile, dump_machine, load_machine, machine_names
from planner.published.figures import FIGURES, fittable
from planner.published.fit import LOSSES, Problem, fit_machine, operating_point, with_priors
from planner.published.rows import read_published
from planner.published.validate import Predictor

DATA = Path(__file__).parents[1] / "data" / "validation"
FITTED = ("selene-a100-80gb", "vtrain-a100-80gb", "jean-zay-a100-80gb", "zero-bubble-a100-80gb", "eos-h100-80gb",
          "simumax-b200", "torchtitan-h100-96gb")  # fmt: skip


def rows_of(name):
    return [row for row in read_published(DATA / name)[0] if row.measured_seconds is not None]


@pytest.mark.parametrize(
    "name", ["simumax_b200.csv", "vtrain_sample.csv", "zero_bubble_sample.csv", "bigscience_sample.csv"]
)
def test_many_plans_priced_at_once_cost_what_each_costs_alone(name):
    rows = rows_of(name)
    machine = load_machine(rows[0].machine)
    skeletons = [Skeleton.of(row.plan, machine) for row in rows]
    bulk = Bulk(skeletons, machine)
    other = machine.with_figures({"device.gemm.default.fraction": 0.5, "overheads.dispatch_seconds": 1e-4})
    for changed in (machine, other):
        together = bulk.unit_seconds(changed)
        for skeleton, first in zip(skeletons, bulk.offsets[:-1], strict=True):
            alone = unit_seconds(skeleton, changed)
            np.testing.assert_allclose(together[first : first + len(alone)], alone, rtol=1e-9, atol=1e-12)


def with_true_times(rows, machine):
    """The rows, with the times that a machine would have taken."""
    times = Problem(machine, rows).predict(machine)
    return [
        type(row)(**{**{f: getattr(row, f) for f in row.__dataclass_fields__}, "measured_seconds": float(time)})
        for row, time in zip(rows, times, strict=True)
    ]


def test_a_fit_finds_the_figures_that_made_the_times():
    rows = rows_of("simumax_b200.csv")
    start = with_priors(load_machine("simumax-b200"), load_machine("b200"))
    truth = {"device.gemm.default.fraction": 0.58, "device.attention_fraction.default": 0.45}
    made = with_true_times(rows, start.with_figures(truth))
    before = Problem(start, made).predict(start)
    fit = fit_machine(start, made, ["made.csv"], "2026-01-01", cross_validate=False)
    measured = np.array([row.measured_seconds for row in made])
    assert np.mean(np.abs(before / measured - 1)) > 0.04
    assert np.mean(np.abs(fit.predicted_seconds / measured - 1)) < 0.005
    assert fit.machine.figure("device.gemm.default.fraction") == pytest.approx(0.58, rel=0.05)


def test_one_loss_lets_go_of_rows_that_ran_something_else():
    """Three of fourteen rows take 1.5 times as long: Cauchy's loss finds the figures of the others, soft-L1 less so."""
    rows = rows_of("simumax_b200.csv")
    start = with_priors(load_machine("simumax-b200"), load_machine("b200"))
    made = with_true_times(rows, start.with_figures({"device.gemm.default.fraction": 0.55}))
    made = [
        replace(row, measured_seconds=row.measured_seconds * (1.5 if i % 5 == 0 else 1)) for i, row in enumerate(made)
    ]
    found = []
    for loss in LOSSES:
        problem = Problem(start, made, loss)
        fitted = problem.fit(np.ones(len(made), bool))
        found.append(np.median(np.abs(problem.predict(fitted) / problem.measured - 1)))
    soft_l1, cauchy = found
    assert cauchy < 0.01
    assert cauchy < 0.5 * soft_l1


def test_rows_of_every_technique_are_priced_on_the_machine_as_they_used_it():
    rows = [r for r in read_published(DATA.parent / "published" / "torchtitan_llama3.csv")[0] if r.plan.mesh.pp == 1][
        :8
    ]
    machine = load_machine("torchtitan-h100-96gb")
    predictor = Predictor()
    one_by_one = [predictor.predict(row).score.predicted_seconds for row in rows]
    assert len({row.variants for row in rows}) >= 3
    np.testing.assert_allclose(Problem(machine, rows).predict(machine), one_by_one, rtol=1e-6)


def test_priors_of_variants_do_not_drift_with_repeated_fits():
    base, machine = load_machine("h100-80gb"), load_machine("torchtitan-h100-96gb")
    path = "variants.async-tp.framework.hidden_tp_fraction"
    moved = machine.with_figures({path: 0.9})
    assert with_priors(moved, base).figure(path) == with_priors(machine, base).figure(path) == 0.5


def test_a_fit_changes_figures_of_the_machine_only_and_says_so():
    rows = rows_of("korthikanti2022_table5_iteration_time.csv")[:4]
    start = with_priors(load_machine("selene-a100-80gb"), load_machine("a100-80gb"))
    fit = fit_machine(start, rows, ["table5.csv"], "2026-01-01", cross_validate=False)
    before, after = (msgspec.to_builtins(machine) for machine in (start, fit.machine))
    allowed = {figure.path for figure in FIGURES} | {f"memory.{name}" for name in (
        "activation_fraction", "workspace_bytes", "fragmentation_fraction", "context_bytes")}  # fmt: skip
    for path in changed_paths(before, after):
        assert path in allowed or path.endswith("provenance") or path.startswith("residuals."), path
    assert fit.machine.residuals.provenance == "fitted on table5.csv, 4 rows, 2026-01-01"
    assert fit.machine.residuals.ranges["hidden"] == (6144.0, 12288.0)
    assert load_round_trip(fit.machine) == fit.machine


def changed_paths(before, after, path=""):
    if isinstance(before, dict) and isinstance(after, dict):
        keys = before.keys() | after.keys()
        return [p for k in keys for p in changed_paths(before.get(k), after.get(k), f"{path}.{k}".strip("."))]
    return [] if before == after else [path]


def load_round_trip(machine):
    import tomllib

    from planner.machine import render_machine
    from planner.machine.check import check_machine

    return check_machine(tomllib.loads(render_machine(machine)), "round trip")


def test_priors_hold_what_the_rows_do_not_determine():
    """No row of this file leaves its host, so the network's figures stay where they were."""
    rows = rows_of("simumax_b200.csv")
    start = with_priors(load_machine("simumax-b200"), load_machine("b200"))
    fit = fit_machine(start, rows, ["simumax.csv"], "2026-01-01", cross_validate=False)
    for path in ("link_between_hosts.efficiency.default", "device.kernels.softmax.bandwidth_fraction"):
        assert fit.machine.figure(path) == pytest.approx(start.figure(path), rel=0.02)


def test_rows_of_one_operating_point_share_their_weight():
    rows = rows_of("vtrain_sample.csv")
    problem = Problem(load_machine("vtrain-a100-80gb"), [*rows, *rows])
    alone = Problem(load_machine("vtrain-a100-80gb"), rows)
    assert len(set(problem.points)) == len(set(alone.points))
    total = {
        p: sum(w**2 for q, w in zip(problem.points, problem.weights, strict=True) if q == p) for p in problem.points
    }
    counts = {p: problem.points.count(p) for p in problem.points}
    for point, weight in total.items():
        assert weight == pytest.approx(counts[point] ** 0.5)
    assert operating_point(rows[0]) == operating_point(rows[0])


def test_too_few_rows_are_refused():
    with pytest.raises(DataError, match="a fit needs at least 3"):
        fit_machine(load_machine("simumax-b200"), rows_of("simumax_b200.csv")[:2], ["x.csv"], "2026-01-01")


@pytest.mark.parametrize("name", FITTED)
def test_shipped_profiles_say_what_they_were_fitted_on(name):
    machine = load_machine(name)
    assert name in machine_names()
    assert "fitted on" in machine.residuals.provenance
    for group in (machine.device, machine.link_in_host, machine.overheads):
        assert "figures fitted on" in group.provenance
    assert 0.01 <= machine.residuals.step_log_sigma < 0.25
    for figure in fittable(machine):
        assert machine.figure(figure.path) <= figure.largest


def test_a_fitted_profile_is_written_as_its_difference_from_the_one_it_extends(tmp_path):
    machine = load_machine("selene-a100-80gb")
    path = tmp_path / "selene.toml"
    dump_machine(machine, path, extends="a100-80gb")
    assert load_machine(path) == machine
    assert base_profile(path) == "a100-80gb"
    assert "memory_bytes" not in path.read_text()


def test_the_command_fits_and_writes(tmp_path, capsys):
    target = tmp_path / "fitted.toml"
    arguments = ["fit", str(DATA / "simumax_b200.csv"), "--machine", "simumax-b200", "--quick", "-o", str(target)]
    assert run([*arguments, "--json"]) == 0
    assert '"mape"' in capsys.readouterr().out
    assert "fitted on simumax_b200.csv, 14 rows" in target.read_text()
    assert run(["fit", str(DATA / "simumax_b200.csv")]) == 2
