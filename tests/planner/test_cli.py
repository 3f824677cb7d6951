"""The command line: its contract, its answers, its errors."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from planner.cli import frame
from planner.cli.commands import COMMANDS
from planner.errors import MeshwrightError
from planner.plan import load_plan
from planner.trace import load_prediction

OUTSIDE = dict(os.environ)
"""The environment of the test run: its cache folder has the executor's compiled kernels."""

SMALL = ["--layers", "2", "--hidden", "64", "--heads", "4", "--seq-len", "32"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in its own folder, on a machine that nobody has measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def planner(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that must succeed, given as pieces of its line; its output."""

    def run(*pieces: str) -> str:
        status = frame.run(" ".join(pieces).split())
        out, talk = capsys.readouterr()
        assert status == 0, talk
        return out

    return run


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that must be refused with exit status 2, one message and no output; the message."""

    def run(*pieces: str) -> str:
        status = frame.run(" ".join(pieces).split())
        out, talk = capsys.readouterr()
        assert (status, out) == (2, ""), talk
        lines = [line for line in talk.splitlines() if not line.startswith("machine cpu-generic")]
        assert len(lines) == 1
        assert lines[0].startswith("planner")
        return lines[0]

    return run


# ---- every command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_with_an_example_and_json(command: Any, planner: Any) -> None:
    text = planner(command.name, "--help")
    for line in command.example.splitlines():
        assert line in text
    assert "--json" in text


def test_help_lists_the_commands_and_is_the_answer_to_nothing(planner: Any) -> None:
    text = planner("--help")
    assert all(command.name in text for command in COMMANDS)
    assert planner() == text


def test_version(planner: Any) -> None:
    assert re.fullmatch(r"planner \d+\.\d+\.\d+\n", planner("--version"))


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from planner.cli import frame; frame.run(['suggest', '--help']); "
        "print([m for m in ('numpy', 'scipy', 'networkx', 'rich', 'msgspec') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_public_names_are_functions_whatever_was_imported_before() -> None:
    code = (
        "import planner, planner.predict, planner.compare\n"
        "from planner.predict import predict\n"
        "assert planner.predict is predict and callable(planner.compare) and callable(planner.suggest)\n"
        "missing = [name for name in planner.__all__ if getattr(planner, name, None) is None]\n"
        "assert not missing, missing\n"
        "assert set(planner.__all__) <= set(dir(planner))\n"
        "try:\n    planner.nonsense\nexcept AttributeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "module 'planner' has no attribute 'nonsense'\n"


# ---- suggest, plan, predict ------------------------------------------------------------------------------------------

PLAN_KEYS = {
    *("rank", "mesh", "schedule", "num_model_chunks", "micro_batch_size", "num_micro_batches", "recompute"),
    *("zero_stage", "sequence_parallel", "step_seconds", "tokens_per_second", "mfu", "bubble_fraction"),
    *("exposed_communication_seconds", "peak_bytes"),
}


def test_suggest_writes_the_winner_and_keeps_its_contract(planner: Any) -> None:
    found = json.loads(planner("suggest", "--workers", "4", *SMALL, "--top", "3", "--json"))
    planner("suggest", "--workers", "2", *SMALL, "-o", "made/here")
    assert {path.name for path in Path("made/here").iterdir()} == {"plan.json", "predicted.json"}
    assert {"candidates", "feasible", "seconds", "plans", "rejected"} <= found.keys()
    assert found["candidates"] >= found["feasible"] >= len(found["plans"]) == 3
    for rank, plan in enumerate(found["plans"], 1):
        assert plan.keys() >= PLAN_KEYS
        assert plan["rank"] == rank
        sizes = plan["mesh"]
        assert sizes.keys() == {"dp", "tp", "pp", "cp"}
        assert sizes["dp"] * sizes["tp"] * sizes["pp"] * sizes["cp"] == 4
        assert sum(plan["breakdown_seconds"].values()) == pytest.approx(plan["step_seconds"])
    # Ties come first, the one with most memory headroom leading; the others follow by time.
    ties = [plan["peak_bytes"] for plan in found["plans"] if plan["tie"]]
    steps = [plan["step_seconds"] for plan in found["plans"] if not plan["tie"]]
    assert (ties, steps) == (sorted(ties), sorted(steps))
    assert all(each.keys() == {"reason", "count"} for each in found["rejected"])
    assert found["machine"]["origin"] == "generic"
    plan, prediction = load_plan(Path("plan.json")), load_prediction(Path("predicted.json"))
    assert prediction.plan_hash == plan.hash == found["plans"][0]["plan_hash"]
    assert prediction.step_seconds == found["plans"][0]["step_seconds"]
    assert plan.global_batch_size == 8


def test_suggest_tells_people_why(planner: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    text = planner("suggest --workers 4", *SMALL, "--memory-limit 16MiB --explain -o out")
    assert Path("out/plan.json").is_file()
    assert re.search(r"#1 \(.*\) over #\d+ \(.*\): |#1 to #\d+ are a tie: ", text)
    assert re.search(r"rejected \d+:\n +\d+  ", text)
    assert "The step of #1 is compute" in text
    assert "2·Cout·Cin" in text


def test_suggest_keeps_what_was_fixed(planner: Any) -> None:
    fixed = "tp=2,pp=2,schedule=gpipe,zero=0,sequence-parallel=false"
    found = json.loads(planner("suggest", "--workers", "4", *SMALL, "--fix", fixed, "--json"))
    for plan in found["plans"]:
        assert plan["mesh"] == {"dp": 1, "tp": 2, "pp": 2, "cp": 1}
        assert (plan["schedule"], plan["zero_stage"], plan["sequence_parallel"]) == ("gpipe", 0, False)


def test_a_plan_by_hand_is_what_the_options_say(planner: Any) -> None:
    planner(
        "plan --dp 2 --pp 2 --tp 2 --sequence-parallel --recompute selective --zero 1 --stage-layers 1,2",
        "--layers 3 --hidden 64 --heads 4 --seq-len 32 --causal --pre-norm --norm rms --no-tie-embeddings",
        "--positions rotary --gated-ffn --vocab 99 --kv-heads 2 --ffn-hidden 100 --global-batch-size 6",
        "--micro-batch-size 2 --optimizer sgd --lr 0.5 --dropout 0 --clip-norm 2 --precision float64 --seed 7",
        "--threads-per-rank 3 -o hand.json",
    )
    plan = load_plan(Path("hand.json"))
    assert (plan.mesh.dp, plan.mesh.tp, plan.mesh.pp, plan.mesh.cp) == (2, 2, 2, 1)
    assert (plan.sequence_parallel, plan.recompute, plan.zero_stage) == (True, "selective", 1)
    assert (plan.stage_layers, plan.global_batch_size, plan.micro_batch_size) == ((1, 2), 6, 2)
    model = plan.model
    assert (model.layers, model.hidden, model.kv_heads, model.ffn_hidden, model.vocab) == (3, 64, 2, 100, 99)
    assert (model.causal, model.norm_position, model.norm, model.tie_embeddings) == (True, "pre", "rms", False)
    assert (model.positions, model.gated_ffn) == ("rotary", True)
    training = plan.training
    assert (training.optimizer, training.learning_rate, training.dropout) == ("sgd", 0.5, 0.0)
    assert (training.clip_norm, training.precision, training.seed, training.threads_per_rank) == (2.0, "float64", 7, 3)


def test_defaults_of_the_contract(planner: Any) -> None:
    planner("plan", "--dp", "2")
    plan = load_plan(Path("plan.json"))
    assert (plan.model.layers, plan.model.hidden, plan.model.seq_len, plan.model.vocab) == (12, 768, 128, 260)
    assert plan.global_batch_size == 4
    training = plan.training
    assert (training.optimizer, training.learning_rate, training.dropout) == ("adamw", 1e-3, 0.1)
    assert (training.clip_norm, training.precision, training.seed) == (None, "float32", 0)
    assert training.threads_per_rank >= 1
    planner("plan", "--dp", "2", "--machine", "a100-80gb")
    assert load_plan(Path("plan.json")).training.precision == "bfloat16"


def test_a_micro_batch_left_to_the_planner(planner: Any) -> None:
    planner("plan", *SMALL, "--dp", "2", "--global-batch-size", "20")
    assert load_plan(Path("plan.json")).micro_batch_size == 10
    planner("plan", *SMALL, "--pp", "2", "--global-batch-size", "20", "--micro-batch-size", "auto")
    assert load_plan(Path("plan.json")).micro_batch_size == 3


@pytest.mark.parametrize("name", ["zb-1p", "zb-2p", "v-half", "v-min"])
def test_schedules_that_depend_on_durations_are_stored_whole(name: str, planner: Any) -> None:
    planner("plan", *SMALL, "--layers", "4", "--pp", "2", "--global-batch-size", "6", "--schedule", name)
    plan = load_plan(Path("plan.json"))
    assert plan.schedule.programs is not None
    rows = list(csv.reader(plan.schedule.programs))
    counts = len(plan.micro_batches(0)) * plan.schedule.num_model_chunks
    assert [len([cell for cell in row if "F" in cell]) for row in rows] == [counts, counts]
    planner("predict", "plan.json", "--json")


def test_the_best_order_under_a_memory_limit_is_solved_for_and_planned_with(planner: Any) -> None:
    asked = ["schedule", "custom", "--ranks", "2", "--micro-batches", "4", "--durations", "F=1,I=1.1,W=0.6,comm=0.1"]
    found = {limit: json.loads(planner(*asked, "--memory-limit", str(limit), "--json")) for limit in (1, 2, 4)}
    assert found[1]["makespan"] > found[2]["makespan"] >= found[4]["makespan"]
    for limit, each in found.items():
        assert max(each["peak_until_w"]) <= limit
        assert each["bound_seconds"] == pytest.approx(each["makespan"], rel=1e-4)
        path = [[rank, step] for rank, step in each["critical_path"]]
        assert all(step in each["programs"][rank] for rank, step in path)
        assert path[0] == [0, "0F0"]
    assert "the proven optimum" in planner(*asked)
    best = json.loads(planner("schedule", "zb-1p", *asked[2:], "--memory-limit", "2", "--json"))
    assert found[2]["makespan"] <= best["makespan"]
    assert "bound_seconds" not in best
    Path("best.csv").write_text(planner(*asked, "--memory-limit", "2", "--csv"))
    planner(
        "plan",
        *SMALL,
        *["--pp", "2", "--global-batch-size", "4", "--micro-batch-size", "1"],
        "--schedule",
        "custom",
        *("--schedule-csv", "best.csv"),
    )
    assert list(csv.reader(load_plan(Path("plan.json")).schedule.programs or ())) == found[2]["programs"]


def test_a_schedule_of_ones_own(planner: Any) -> None:
    Path("own.csv").write_text(planner("schedule", "gpipe", "--ranks", "2", "--micro-batches", "2", "--csv"))
    planner(
        *["plan", *SMALL, "--pp", "2", "--global-batch-size", "4", "--micro-batch-size", "2"],
        *["--schedule", "custom", "--schedule-csv", "own.csv"],
    )
    assert load_plan(Path("plan.json")).schedule.programs == ("0F0,0F1,0B0,0B1", "1F0,1F1,1B0,1B1")


def test_predict_prints_what_it_writes(planner: Any) -> None:
    planner("plan", *SMALL, "--tp", "2")
    printed = json.loads(planner("predict", "plan.json", "--json", "-o", "other.json"))
    written = json.loads(Path("other.json").read_text(encoding="utf-8"))
    assert {key: printed[key] for key in written} == written
    assert printed["kind"] == "prediction"
    Path("printed.json").write_text(json.dumps(printed), encoding="utf-8")  # what a shell's > would have written
    assert json.loads(planner("compare", "printed.json", "other.json", "--json"))


# ---- show, compare, schedule -----------------------------------------------------------------------------------------


def test_show_a_plan(planner: Any) -> None:
    planner("plan", *SMALL, "--layers 4 --tp 2 --pp 2 --sequence-parallel --global-batch-size 4")
    text = planner("show", "plan.json")
    assert re.search(r"layer\.qkv +column +tp\.all_gather", text)
    assert re.search(r"layer\.attention_residual +seq +tp\.reduce_scatter 8\.00 KiB +tp\.reduce_scatter", text)
    document = json.loads(planner("show", "plan.json", "--json"))
    layouts = {each["role"]: each for each in document["layouts"]}
    # Gathering what is split over the sequence: forward for the product, backward for its weights' gradient.
    assert [move[0] for move in layouts["layer.qkv"]["forward"]] == ["tp.all_gather"]
    assert [move[0] for move in layouts["layer.ffn_residual"]["backward"]] == ["tp.reduce_scatter"]


def test_show_two_predictions_over_each_other(planner: Any) -> None:
    planner("plan", *SMALL, "--pp", "2", "--global-batch-size", "8")
    planner("predict", "plan.json", "-o", "one.json")
    planner("plan", *SMALL, "--dp", "2", "--global-batch-size", "8")
    planner("predict", "plan.json", "-o", "two.json")
    text = planner("show", "one.json", "two.json", "--svg", "both.svg", "--trace", "both-trace.json")
    rows = [line for line in text.splitlines() if line.startswith("rank ")]
    assert [row[:6] for row in rows] == ["rank 0", "rank 1"] * 2
    assert all(set(row[8:]) <= set("FBWUdp· ") for row in rows)
    records = [load_prediction(Path(name)) for name in ("one.json", "two.json")]
    longest = max(record.step_seconds for record in records)
    for row, record in zip(rows[1::2], records, strict=True):
        last = max(span.end for span in record.spans() if span.rank == 1 and span.kind == "work")
        assert len(row[8:].rstrip()) == pytest.approx((frame.WIDTH - 8) * last / longest, abs=1.5)
    figure = ElementTree.parse("both.svg").getroot()
    texts = [element.text or "" for element in figure.iter("{http://www.w3.org/2000/svg}text")]
    assert sum(text.startswith("rank ") for text in texts) == 4
    trace = json.loads(Path("both-trace.json").read_text(encoding="utf-8"))["traceEvents"]
    spans = [event for event in trace if event["ph"] == "X"]
    assert len(spans) == sum(len(record.trace) for record in records)
    assert {event["pid"] for event in spans} == {0, 1}
    one = next(event for event in spans if event["pid"] == 0 and event["ts"] > 0)
    assert any(one["ts"] == pytest.approx(span.start * 1e6) and one["name"] == span.key for span in records[0].spans())


def test_compare_two_predictions(planner: Any) -> None:
    for name, axis in (("one", "--dp"), ("two", "--tp")):
        planner("plan", *SMALL, axis, "2")
        planner("predict", "plan.json", "-o", f"{name}.json")
    document = json.loads(planner("compare", "one.json", "two.json", "--json"))
    assert document["pair"] == "two predictions"
    step = next(each for each in document["figures"] if each["name"] == "step_seconds")
    total = sum(term["error_seconds"] for term in document["contributions"])
    assert total == pytest.approx(step["predicted"] - step["measured"])
    assert 1 <= len(document["largest"]) <= 4
    text = planner("compare", "one.json", "two.json")
    assert "two predictions of different plans" in text


def test_a_schedule_as_json_and_as_people_see_it(planner: Any) -> None:
    arguments = "schedule 1f1b --stages 3 --ranks 3 --micro-batches 4 --durations F=1,B=2"
    document = json.loads(planner(arguments, "--json"))
    assert document["programs"][2] == ["2F0", "2B0", "2F1", "2B1", "2F2", "2B2", "2F3", "2B3"]
    assert document["makespan"] == 18
    assert document["bubble_fraction"] == pytest.approx(2 / 6)
    assert document["bubble_ratio"] == pytest.approx(2 / 4)
    assert document["peak_in_flight"] == document["peak_until_w"] == [3, 2, 1]
    rows = [line.rstrip() for line in planner(arguments).splitlines() if line.startswith("rank ")]
    assert rows == [
        "rank 0  F0F1F2        B0  F3B1    B2    B3",
        "rank 1    F0F1    B0  F2B1  F3B2    B3",
        "rank 2      F0B0  F1B1  F2B2  F3B3",
    ]


def test_stages_and_ranks_of_interleaved_schedules(planner: Any) -> None:
    document = json.loads(planner("schedule interleaved --stages 4 --ranks 2 --micro-batches 2 --json"))
    assert {cell[0] for cell in document["programs"][0]} == {"0", "2"}
    document = json.loads(planner("schedule zb-v --ranks 2 --micro-batches 4 --json"))
    assert {cell[0] for cell in document["programs"][0]} == {"0", "3"}


def test_the_algebra_gives_the_three_costs_of_a_linear_layer(planner: Any) -> None:
    (rows,) = (json.loads(planner("show", "--algebra", "--json"))["linear"],)
    assert {row["choice"]: (row["forward"], row["backward"], row["gradient_sync"]) for row in rows} == {
        "data parallel": ({}, {}, {"Cout·Cin": 2}),
        "partition output": ({"B·Cin": 1}, {"B·Cin": 1}, {}),
        "reduce output": ({"B·Cout": 2}, {}, {}),
        "naive model parallelism": ({"B·Cout": 1}, {"B·Cin": 1}, {}),
    }
    lines = [line.rstrip() for line in planner("show", "--algebra").splitlines()]
    assert lines[3:7] == [
        "data parallel            0         0         2·Cout·Cin",
        "partition output         B·Cin     B·Cin     0",
        "reduce output            2·B·Cout  0         0",
        "naive model parallelism  B·Cout    B·Cin     0",
    ]


def test_the_algebra_gives_the_collectives_of_a_layer(planner: Any) -> None:
    """Published volumes: Shoeybi 2019 (4 all-reduces), Korthikanti 2022 §4.2.2 (as much, in halves, and two gathers
    again in the backward pass), Rajbhandari 2020 §7 (ZeRO: 2P, stage 3: 3P), Liu 2023 and Jacobs 2023 (context).
    """
    rows = {row.pop("choice"): row for row in json.loads(planner("show --algebra --json"))["layer"]}
    reduce, gather, scatter = "data.gradient_all_reduce", "data.parameter_gather", "data.gradient_reduce_scatter"
    assert rows["data parallel"] == {"forward": {}, "backward": {}, "update": {reduce: {"P": 2}}}
    zero1, zero2, zero3 = (rows[f"data parallel, ZeRO {stage}"] for stage in (1, 2, 3))
    assert zero1["update"] == {scatter: {"P": 1}, "data.parameter_all_gather": {"P": 1}}
    assert zero2["backward"] == {scatter: {"P": 1}}
    assert zero3 == {"forward": {gather: {"P": 1}}, "backward": {gather: {"P": 1}, scatter: {"P": 1}}, "update": {}}
    tensor, sequence = rows["tensor parallel"], rows["tensor and sequence parallel"]
    assert tensor["forward"] == tensor["backward"] == {"tp.all_reduce": {"A": 4}}
    assert sequence["forward"] == {"tp.all_gather": {"A": 2}, "tp.reduce_scatter": {"A": 2}}
    assert sequence["backward"] == {"tp.all_gather": {"A": 4}, "tp.reduce_scatter": {"A": 2}}
    gathered, ring, ulysses = (rows[f"context parallel, {kind}"] for kind in ("all-gather", "ring", "Ulysses"))
    assert (gathered["forward"], gathered["backward"]) == ({"cp.all_gather": {"A": 2}}, {"cp.reduce_scatter": {"A": 2}})
    assert (ring["forward"], ring["backward"]) == ({"cp.ring_shift": {"A": 2}}, {"cp.ring_shift": {"A": 4}})
    assert ulysses["forward"] == ulysses["backward"] == {"cp.all_to_all": {"A/p": 4}}


def test_models_and_machines_are_listed(planner: Any) -> None:
    models = {row["name"]: row for row in json.loads(planner("models", "--json"))}
    assert models["gpt2"]["parameters"] == 124_439_808
    assert "gpt3-175b" in planner("models")
    machines = json.loads(planner("machines", "--json"))
    assert {"cpu-generic", "a100-80gb"} <= {row["name"] for row in machines}
    assert "a100-80gb" in planner("machines")


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plan --tp 16", "tp=16 exceeds the 12 attention heads; use tp<=12 or put the factor on dp, cp or pp"),
        ("plan --dp 3 --global-batch-size 2", "dp=3 exceeds the 2 sequences of the global batch; use a larger"),
        ("plan --dp 2 --workers 8", "is 2 ranks and --workers is 8; make the product"),
        ("plan --pp 13", "stages=13 exceeds the 12 layers"),
        ("plan --dp 0", "dp=0 is not an axis size; use dp>=1"),
        ("plan --zero 4", "--zero 4 is no ZeRO stage; use 0, 1, 2 or 3"),
        ("plan --schedule nope", "--schedule nope is not known; use one of gpipe, 1f1b"),
        ("plan --schedule custom", "--schedule custom and --schedule-csv FILE belong together"),
        ("plan --chunks 0 --schedule interleaved", "--chunks 0 is no number of stages per rank"),
        ("plan --stage-layers 6,x", "--stage-layers 6,x has the entry 'x'; write positive integers"),
        ("plan --lr nan", "--lr nan is not finite"),
        ("plan --dropout 2", "dropout=2.0 is not a probability below 1"),
        ("plan --precision int8", "--precision int8 is not known; use one of float64"),
        ("plan --precision float16", "no figure device.peak_flops_per_second.float16"),
        ("plan --norm batch", "--norm batch is not known; use one of layer, rms"),
        ("plan --model bert-bas", "model 'bert-bas' is unknown: did you mean bert-base"),
        ("plan --machine nowhere", "no machine 'nowhere'"),
        ("plan --micro-batch-size 2.5", "--micro-batch-size '2.5' is no size; give a positive integer or auto"),
        ("plan -o nowhere/plan.json", "cannot write nowhere/plan.json"),
        ("suggest", "Missing option '--workers'"),
        ("suggest --workers 0", "--workers 0 is too few; use at least 1"),
        ("suggest --workers 2 --fix tp", "--fix has the entry 'tp'; write KEY=VALUE"),
        ("suggest --workers 2 --fix tp=2,tp=3", "--fix names tp twice"),
        ("suggest --workers 2 --fix dq=2", "--fix dq is not a choice of the search; use one of dp, tp, pp, cp"),
        ("suggest --workers 2 --fix tp=0", "--fix tp=0 is out of range; use an integer of at least 1"),
        ("suggest --workers 2 --fix zero=x", "--fix zero=x is out of range; use 0, 1, 2 or 3"),
        ("suggest --workers 2 --memory-limit 80", "--memory-limit '80' is not a positive size with a unit"),
        ("suggest --workers 2 -o /dev/null", "-o /dev/null cannot be a folder"),
        ("predict nothing.json", "cannot read plan file nothing.json"),
        ("show nothing.json", "cannot read nothing.json"),
        ("show", "planner show needs a plan, prediction or measurement file, or --algebra"),
        ("run nothing.json", "cannot read plan file nothing.json"),
        ("run nothing.json --steps 0", "--steps 0 is too few; use at least 1"),
        ("schedule nope --ranks 2 --micro-batches 2", "'nope' is not a schedule that can be generated"),
        ("schedule 1f1b --stages 5 --ranks 2 --micro-batches 2", "--stages 5 is no multiple of --ranks 2; use 6"),
        ("schedule 1f1b --ranks 2", "--micro-batches is missing"),
        ("schedule 1f1b --micro-batches 2", "--stages and --ranks are both missing"),
        ("schedule 1f1b --ranks 2 --micro-batches 2 --durations F=x", "--durations F=x has the entry 'F=x'"),
        ("schedule gpipe --ranks 2 --micro-batches 4 --memory-limit 2", "more than the limit of 2"),
        ("schedule 1f1b --ranks 2 --micro-batches 2 --durations F=1e308", "F=1e308 is out of range; give 0, or 1e-15"),
        ("schedule 1f1b --ranks 2 --micro-batches 2 --durations F=1e-320", "F=1e-320 is out of range; give 0, or"),
        ("sweep --workers 1..999999999999", "999999999999 ranks exceed the 1048576 that can be planned for; use fewer"),
        ("plan -o .", "cannot write .: it is a folder; name a file with -o"),
        (f"schedule {'x' * 300} --ranks 2 --micro-batches 2", "File name too long; give a shorter name"),
        (f"plan --machine {'x' * 300}", "neither a shipped profile nor a readable file"),
        ("plan --nonsense", "No such option: --nonsense"),
        ("plan --dp two", "'planner plan --help' lists what it takes"),
        ("nonsense", "No such command 'nonsense'"),
    ],
)
def test_a_mistake_gets_one_message_and_status_two(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.run(line.split()) == 2
    out, talk = capsys.readouterr()
    assert out == ""
    assert message in talk
    assert talk.startswith("planner")


def test_errors_are_no_json(refuse: Any) -> None:
    assert "tp=16 exceeds" in refuse("plan", "--tp", "16", "--json")


def test_malformed_files_are_refused_by_name(planner: Any, refuse: Any) -> None:
    planner("plan", *SMALL)
    whole = Path("plan.json").read_text(encoding="utf-8")
    cases = {
        "not a whole JSON": whole[:300],
        "extra": whole.replace('"seq_order"', '"extra": 1, "seq_order"'),
        "newer than": whole.replace('"schema": 1', '"schema": 99'),
        "micro_batch_size": whole.replace('"micro_batch_size": 2', '"micro_batch_size": "two"'),
        "kind 'soup'": whole.replace('"kind": "plan"', '"kind": "soup"'),
    }
    for message, text in cases.items():
        assert text != whole
        Path("bad.json").write_text(text, encoding="utf-8")
        assert message in refuse("show", "bad.json")
    assert "plan.json is a plan, not a prediction or measurement" in refuse("compare", "plan.json", "plan.json")


def test_a_record_whose_plan_was_edited_is_refused(planner: Any, refuse: Any) -> None:
    planner("plan", *SMALL)
    planner("predict", "plan.json")
    text = Path("predicted.json").read_text(encoding="utf-8")
    Path("edited.json").write_text(text.replace('"seed": 0', '"seed": 1'), encoding="utf-8")
    assert "it was edited" in refuse("show", "edited.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"operators": {"0.layer.qkv.forward": {"seconds": [], "count": 1}}},
            "operators.0.layer.qkv.forward.seconds is",
        ),
        ({"rank_classes": [[0, 0]]}, "rank_classes do not name each of the 1 ranks once"),
        ({"rank_seconds": [1.0, 2.0]}, "rank_seconds is not 1 figures of at least 0"),
        ({"peak_parts": {"parameters": [1]}}, "peak_parts has parameters and not parameters, gradients"),
        ({"step_seconds": 0.0}, "step_seconds=0.0 is no length of a step"),
        ({"trace": [[7, "compute", "0.layer.qkv.forward", 0.0, 1.0, "work"]]}, "span 0.layer.qkv.forward of rank 7"),
        ({"trace": [[0, "compute", "0.layer.qkv.forward", 1e308, 1e308, "work"]]}, "rank 0, 1e+308 to 1e+308, is none"),
    ],
)
def test_a_record_whose_figures_do_not_fit_is_refused(
    planner: Any, refuse: Any, change: dict[str, Any], message: str
) -> None:
    planner("plan", *SMALL)
    planner("predict", "plan.json")
    whole = json.loads(Path("predicted.json").read_text(encoding="utf-8"))
    Path("odd.json").write_text(json.dumps(whole | change), encoding="utf-8")
    for line in ("show odd.json", "compare predicted.json odd.json"):
        told = refuse(line)
        assert message in told and told.endswith("; write it again from its plan")


def test_our_own_mistakes_exit_with_status_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(frame, "application", broken)
    assert frame.run(["models"]) == 1
    talk = capsys.readouterr().err
    assert "Traceback" in talk
    assert "internal error: oops" in talk
    assert not issubclass(ZeroDivisionError, MeshwrightError)


# ---- run -------------------------------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_run_trains_and_compares() -> None:
    arguments = ["plan", *SMALL, "--dp", "2", "-o", "mine.json"]
    subprocess.run([sys.executable, "-m", "planner", *arguments], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "planner", "run", "mine.json", "--steps", "2", "--warmup", "1", "--json"],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        env=OUTSIDE,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["pair"] == "prediction and measurement"
    assert document["plan_hashes"][0] == load_plan(Path("mine.json")).hash
    assert re.search(r"3 steps on 2 ranks: about [\d.]+ \w+", done.stderr)
    assert Path("measured.json").is_file()
