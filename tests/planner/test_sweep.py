"""Sweeps: scaling curves over workers, and the classic experiments read alike off predictions and measurements."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from records import measurement_of
from small_plans import plan

from planner.cli import frame
from planner.compare import decompose
from planner.errors import PlanError
from planner.experiments.classics import EXPERIMENTS, PUBLISHED_PIPELINE, Sizes, experiment
from planner.experiments.experiment import block_of, block_seconds, conduct, joined, phase_shares, with_cores
from planner.machine import load_machine
from planner.model import with_sizes
from planner.predict import predict
from planner.report.chart import bars, log_scale, log_ticks
from planner.search.request import SearchRequest
from planner.search.sweep import parse_workers, sweep

MACHINE = load_machine("cpu-generic")
GPU = load_machine("a100-80gb")
TINY = {"hidden": 64, "heads": 8, "seq_len": 32, "ffn_hidden": 128}
OUTSIDE = dict(os.environ)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


# ---- scaling curves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("8..64", (8, 16, 32, 64)),
        ("6..40", (6, 8, 16, 32, 40)),
        ("4..4", (4,)),
        ("12,8,12", (8, 12)),
        ("1", (1,)),
        ("1..3", (1, 2, 3)),
    ],
)
def test_ranges_of_workers(text, counts):
    assert parse_workers(text) == counts


@pytest.mark.parametrize("text", ["", "8..", "16..8", "0..4", "a,b", "8,-1", "2.5"])
def test_ranges_that_are_refused(text):
    with pytest.raises(PlanError, match="--workers"):
        parse_workers(text)


@pytest.fixture(scope="module")
def request_of_gpus():
    model = with_sizes(layers=8, hidden=1024, heads=16, seq_len=512)
    fixed = {"schedule": "1f1b", "recompute": "none", "zero_stage": 0, "tp": 1, "cp": 1}
    return SearchRequest(
        model=model, workers=1, machine=GPU, global_batch_size=32, micro_batch_size=2, fixed=fixed, top=1
    )


def test_strong_scaling(request_of_gpus):
    found = sweep(request_of_gpus, (2, 4, 8), tokens=1e12, dollars_per_hour=2.0)
    assert [point.global_batch_size for point in found.points] == [32] * 3
    first, _, last = found.points
    assert (first.speedup, first.efficiency) == (1.0, 1.0)
    assert last.speedup == pytest.approx(
        last.best.prediction.tokens_per_second / first.best.prediction.tokens_per_second
    )
    assert last.efficiency == pytest.approx(last.speedup / 4)
    assert 1 < last.speedup <= 4 * 1.05
    assert last.days == pytest.approx(1e12 / last.best.prediction.tokens_per_second / 86400)
    assert last.dollars == pytest.approx(last.days * 24 * 8 * 2.0)


def test_weak_scaling_keeps_the_batch_of_a_worker(request_of_gpus):
    found = sweep(request_of_gpus, (2, 4, 8), weak=True)
    assert [point.global_batch_size for point in found.points] == [32, 64, 128]
    assert all(point.days is None and point.dollars is None for point in found.points)
    strong = sweep(request_of_gpus, (2, 4, 8))
    assert found.points[-1].efficiency >= strong.points[-1].efficiency


def test_counts_on_which_nothing_fits_say_why(request_of_gpus):
    model = with_sizes(layers=8, hidden=8192, heads=64, seq_len=512)
    request = request_of_gpus.but(model=model, memory_limit_bytes=60e9, fixed={"schedule": "1f1b", "dp": 1, "cp": 1})
    found = sweep(request, (1, 4))
    assert found.points[0].best is None
    assert "memory" in found.points[0].reason
    assert found.points[1].speedup == 1.0
    with pytest.raises(PlanError, match="nothing fits on any of 1, 2 workers"):
        sweep(request.but(memory_limit_bytes=1e6), (1, 2))


@pytest.mark.parametrize("wrong", [{"tokens": 0.0}, {"tokens": -1.0}, {"dollars_per_hour": 0.0}])
def test_budgets_that_are_none(request_of_gpus, wrong):
    with pytest.raises(PlanError, match="out of range"):
        sweep(request_of_gpus, (2,), **wrong)


def test_the_command_prints_and_draws(folder, capsys):
    line = (
        "sweep --workers 2..8 --layers 4 --hidden 256 --heads 4 --machine a100-80gb --fix recompute=none,cp=1,tp=1 "
        "--global-batch-size 16 --micro-batch-size 2 --tokens 1e9 --svg curve.svg --json"
    )
    assert frame.run(line.split()) == 0
    document = json.loads(capsys.readouterr().out)
    assert [point["workers"] for point in document["points"]] == [2, 4, 8]
    assert all(point["step_seconds"] > 0 and point["days"] > 0 for point in document["points"])
    assert document["dollars_per_hour"] == load_machine("a100-80gb").device.dollars_per_hour
    assert "p4de.24xlarge" in document["price_provenance"]
    first = document["points"][0]
    assert first["dollars"] == pytest.approx(first["days"] * 24 * 2 * document["dollars_per_hour"])
    assert sum(first["breakdown_seconds"].values()) == pytest.approx(first["step_seconds"])
    assert frame.run([*line.split()[:-1], "--explain"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"price: ${document['dollars_per_hour']:.2f} a device and hour; AWS p4de.24xlarge" in shown
    assert all(f" {workers} workers: " in shown for workers in (2, 4, 8))
    figure = ET.parse(folder / "curve.svg").getroot()
    dots = figure.findall("{http://www.w3.org/2000/svg}circle")
    assert len(dots) == 3 * 3  # speedup, efficiency, MFU at three numbers of workers
    assert frame.run(["sweep", "--layers", "2"]) == 2
    assert "--workers is missing" in capsys.readouterr().err


def test_scales_hold_what_they_are_of():
    scale = log_scale([8, 16384], 100.0, 300.0)
    assert 100 < scale.at(8) < scale.at(16384) < 400
    ticks = log_ticks(scale)
    assert ticks
    assert all(scale.low <= tick <= scale.high for tick in ticks)
    assert len(ticks) <= 8
    single = log_scale([4.0], 0.0, 10.0)
    assert single.at(4.0) == pytest.approx(5.0)


# ---- experiments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_reads_predictions_and_measurements_alike(name):
    found = experiment(name, Sizes(TINY | ({"layers": 8} if "pipeline" in name else {}), 8, cores=2))
    outcome = conduct(
        found, MACHINE, cores=2, max_ranks=2, run=lambda _place, candidate, _round: measurement_of(candidate, MACHINE)
    )
    ran = {case.name for case in found.cases if case.plan.mesh.world_size <= 2}
    assert set(outcome.ran) == ran
    assert outcome.predicted
    assert outcome.measured
    predicted = {row.label: row.figures for row in outcome.predicted}
    for row in outcome.measured:
        assert row.figures == pytest.approx(predicted[row.label])
        assert set(row.figures) <= set(found.columns)
    assert found.chart in found.columns
    table = joined(outcome)
    assert any("measured" in figures.get(found.chart, {}) for figures in table.values())
    assert ET.fromstring(bars(found.title, [("a", {"predicted": (1.0, "1")})])) is not None


def test_names_that_are_no_experiment_are_refused(folder, capsys):
    assert frame.run(["sweep", "--measure", "nonsense"]) == 2
    assert "layer-blocks" in capsys.readouterr().err
    assert frame.run(["sweep", "--measure", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in EXPERIMENTS)
    assert frame.run(["sweep", "--measure", "threads", "--max-ranks", "-1"]) == 2


def test_blocks_hold_the_whole_layer_and_nothing_else():
    model = with_sizes(layers=1, **TINY)
    for axes in ({}, {"tp": 2}, {"cp": 2}, {"tp": 2, "sequence_parallel": True}):
        record = predict(plan(model, batch=4, micro=4, **axes), MACHINE)
        layer = sum(
            seconds
            for term, seconds in decompose(record).items()
            if term.name.startswith("layer.") and term.cause == "compute" and not term.name.endswith("update")
        )
        total = sum(block_seconds(record).values())
        assert layer <= total * (1 + 1e-9)
        assert total <= record.step_seconds
        if not axes:
            assert total == pytest.approx(layer)


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ("0.layer.qkv.forward", "attention"),
        ("0.layer.attention_residual.backward", "attention"),
        ("cp.all_gather.layer.k.forward", "attention"),
        ("tp.all_reduce.layer.attention_out.forward", "attention"),
        ("tp.all_reduce.embedding.normed.backward", "attention"),
        ("tp.all_reduce.layer.middle_normed.backward", "feed-forward"),
        ("3.layer.ffn_in.backward_weight", "feed-forward"),
        ("0.head.vocab.forward", None),
        ("tp.all_reduce.embedding.token.forward", None),
        ("data.gradient_all_reduce.layer.update", None),
        ("update.layer.adamw.update", None),
        ("world.all_reduce.loss.update", None),
    ],
)
def test_which_block_a_key_belongs_to(key, block):
    assert block_of(key) == block


def test_phases_share_the_step_and_an_own_core_each_takes_the_turns_away():
    two = predict(plan(with_sizes(layers=2, **TINY), dp=2, batch=4, micro=2), MACHINE)
    shares = phase_shares(two)
    assert sum(shares.values()) <= 1 + 1e-9
    assert shares["backward"] > shares["forward"] > 0
    assert shares["communication"] > 0
    many = 4 * MACHINE.host.cores
    wide = with_cores(MACHINE, many)
    assert (wide.host.cores, with_cores(MACHINE, 1), with_cores(GPU, 64)) == (many, MACHINE, GPU)
    crowded = plan(with_sizes(layers=2, **TINY), dp=many, batch=many, micro=1)
    assert predict(crowded, wide).step_seconds < 0.5 * predict(crowded, MACHINE).step_seconds


def test_data_parallel_scales_by_rings_and_not_through_a_root():
    found = experiment("data-parallel", Sizes(TINY, 8))
    rows = {row.label: row.figures for row in found.simulate({"1": predict(found.cases[0].plan, MACHINE)}, MACHINE)}
    ring, root = rows["200 workers, all-reduce"], rows["200 workers, root"]
    assert ring["efficiency"] > 3 * root["efficiency"]
    assert root["waiting"] > 0.5 > ring["waiting"]
    for each in rows.values():
        assert sum(each[phase] for phase in ("forward", "backward", "update", "communication", "waiting")) <= 1 + 1e-9
    # Through a root the time grows with the ranks: twice as many take twice the messages.
    overhead = [1 / rows[f"{p} workers, root"]["efficiency"] - 1 for p in (100, 200)]
    assert overhead[1] / overhead[0] == pytest.approx(199 / 99)


def test_published_pipeline_speedups_lie_above_the_ideal():
    found = experiment("pipeline-forward", Sizes())
    model = found.cases[0].plan.model
    assert (model.layers, model.seq_len, model.hidden, model.heads) == (24, 100, 768, 12)
    for workers, speedups in PUBLISHED_PIPELINE.items():
        for count, speedup in zip((4, 8, 16, 32), speedups, strict=True):
            known = found.references[f"{workers} workers, {count} micro-batches"]
            assert known["published"] == speedup
            assert 1.01 < speedup / known["ideal"] < 1.12
    assert (
        "published" not in experiment("pipeline-forward", Sizes({"layers": 4})).references["4 workers, 4 micro-batches"]
    )


@pytest.mark.mpi
def test_an_experiment_runs(tmp_path):
    sizes = ["--layers", "1", "--hidden", "32", "--heads", "2", "--seq-len", "16"]
    command = ["sweep", "--measure", "layer-blocks", *sizes, "--steps", "2", "--max-ranks", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "planner", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=OUTSIDE,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["measured"] == ["1", "2"]
    rows = {row["label"]: row["figures"] for row in document["rows"]}
    assert rows["1 workers"]["layer"]["measured"] == 1.0
    assert rows["2 workers"]["layer"]["measured"] > 0
    assert rows["2 workers"]["layer seconds"]["predicted"] > 0
