"""The staged-MPI experiment: its published times, why they come about, and what contradicts them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from planner import load_machine
from planner.cli import frame
from planner.experiments.experiment import Sizes, conduct
from planner.experiments.staged import (
    FITTED_FIGURES,
    GPUS,
    PROFILE,
    PUBLISHED_SECONDS,
    contradiction,
    fit_node,
    implied_gather_seconds,
    residuals,
    staged_attention,
)

NODE = load_machine(PROFILE)
TOLERANCE = 0.02
"""Of each published time; two figures are fitted to the three."""


@pytest.fixture(scope="module")
def outcome():
    return conduct(staged_attention(Sizes()), NODE, cores=2, max_ranks=0, run=None, explain=True)


@pytest.fixture(scope="module")
def figures(outcome):
    return {row.label: row.figures for row in outcome.predicted}


@pytest.mark.parametrize(("gpus", "speedup"), [(1, 1.0), (2, 1.16), (4, 0.94)])
def test_the_published_times_are_reproduced(figures, gpus, speedup) -> None:
    row = figures["1 GPU, staged" if gpus == 1 else f"{gpus} GPUs, staged"]
    assert row["seconds"] == pytest.approx(PUBLISHED_SECONDS[gpus], rel=TOLERANCE)
    assert row["speedup"] == pytest.approx(speedup, rel=TOLERANCE)
    assert row["compute"] + row["communication"] == pytest.approx(row["seconds"])


def test_compute_shrinks_and_communication_grows(figures) -> None:
    rows = [figures[f"{p} GPU{'s' * (p > 1)}, staged"] for p in GPUS]
    assert [row["compute"] for row in rows] == pytest.approx([rows[0]["compute"] / p for p in GPUS], rel=0.01)
    assert rows[0]["communication"] == 0
    # (3p-1) n bytes a gather through one host's memory: 5n at 2 GPUs, 11n at 4
    assert rows[2]["communication"] / rows[1]["communication"] == pytest.approx(11 / 5, rel=0.01)
    staging = NODE.over("staged").staging
    assert staging is not None
    key_bytes = 4 * 4096 * 5120 * 4
    expected = 2 * 5 * key_bytes / staging.shared_bandwidth_bytes_per_second
    assert rows[1]["communication"] == pytest.approx(expected, rel=0.01)


def test_other_transports_gain_at_both(figures) -> None:
    for gpus in (2, 4):
        nccl, aware, staged = (
            figures[f"{gpus} GPUs, {transport}"]["seconds"] for transport in ("nccl", "cuda-aware", "staged")
        )
        assert nccl <= aware < staged
        assert figures[f"{gpus} GPUs, nccl"]["speedup"] > 0.9 * gpus


def test_the_shipped_figures_are_what_the_fit_finds() -> None:
    fitted = fit_node(NODE)
    paths = ("device.gemm.default.fraction", "transports.staged.staging.shared_bandwidth_bytes_per_second")
    assert len(paths) == FITTED_FIGURES < len(PUBLISHED_SECONDS)
    for path in paths:
        assert NODE.figure(path) == pytest.approx(fitted.figure(path), rel=0.005)
    shared = NODE.figure("transports.staged.link_in_host.shared_bandwidth_bytes_per_second")
    assert shared == pytest.approx(NODE.figure(paths[1]) / 2)

    def squares(machine) -> float:
        return sum(off**2 for off in residuals(machine).values())

    for path in paths:
        for factor in (0.97, 1.03):
            assert squares(fitted) < squares(fitted.with_figures({path: fitted.figure(path) * factor}))
    for group in (NODE.device, NODE.over("staged").staging):
        assert "fitted on the published 0.947, 0.816 and 1.010 s" in group.provenance


def test_a_node_with_a_wider_memory_would_gain_at_four() -> None:
    wide = NODE.with_figures(
        {
            "transports.staged.staging.shared_bandwidth_bytes_per_second": 4e10,
            "transports.staged.link_in_host.shared_bandwidth_bytes_per_second": 2e10,
        }
    )
    found = conduct(staged_attention(Sizes()), wide, cores=2, max_ranks=0, run=None, explain=True)
    rows = {row.label: row.figures["speedup"] for row in found.predicted}
    assert rows["4 GPUs, staged"] > rows["2 GPUs, staged"] > 1
    assert any("4 GPUs gain" in sentence for sentence in found.explanation)


def test_the_source_contradicts_itself() -> None:
    assert implied_gather_seconds(2) == pytest.approx(0.171, abs=0.001)
    assert implied_gather_seconds(4) == pytest.approx(0.387, abs=0.001)
    said = contradiction()
    for words in ("5 to 15 ms", "336 MB", "171 ms at 2 (0.98 GB/s", "387 ms at 4 (0.65 GB/s"):
        assert words in said


def test_the_explanation(outcome) -> None:
    said = " ".join(outcome.explanation)
    for words in (
        "compute shrinks, 944 -> 472 -> 236 ms",
        "2 GPUs gain: they save 472 ms",
        "4 GPUs lose: they save 708 ms",
        "5n at 2 GPUs and 11n at 4",
        "Over cuda-aware on the same node",
        "Over nccl on the same node",
        "2 figures (the rate of products, the host's memory) fitted to 3 times, 1 degree of freedom left",
    ):
        assert words in said


def test_the_command_uses_its_own_profile_and_runs_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["sweep", "--measure", "staged-attention", "--explain", "--svg", "bars.svg", "--json"]
    assert frame.run(line) == 0
    shown = capsys.readouterr()
    assert "none of which runs here" in shown.err
    assert PROFILE in shown.err
    document = json.loads(shown.out)
    assert document["measured"] == []
    assert document["notes"] == [contradiction()]
    rows = {row["label"]: row["figures"]["seconds"] for row in document["rows"]}
    assert rows["4 GPUs, staged"]["published"] == 1.010
    assert any("4 GPUs lose" in sentence for sentence in document["explanation"])
    assert ET.parse(tmp_path / "bars.svg").getroot() is not None


def test_other_sizes_have_no_published_times(capsys) -> None:
    line = [
        "sweep",
        "--measure",
        "staged-attention",
        "--seq-len",
        "512",
        "--hidden",
        "256",
        "--heads",
        "4",
        "--explain",
    ]
    assert frame.run([*line, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["notes"] == []
    assert all("published" not in row["figures"]["seconds"] for row in document["rows"])
    assert not any("fitted to" in sentence for sentence in document["explanation"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--measure", "threads", "--explain"], "--explain has nothing to say about threads; it explains staged"),
        (["--measure", "staged-attention", "--transport", "nccl"], "an experiment's plans have their own"),
        (["--measure", "staged-attention", "--machine", "cpu-generic"], "staged-attention is about GPUs"),
    ],
)
def test_what_an_experiment_cannot_be_asked(options, message, capsys) -> None:
    assert frame.run(["sweep", *options]) == 2
    assert message in capsys.readouterr().err
