"""The commands that decide: suggest, plan, predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group

from planner.cli.commands import PlanOptions, PredictOptions, SuggestOptions
from planner.cli.frame import Answer, say
from planner.errors import DataError, PlanError
from planner.options import parse_bytes, parse_fixed
from planner.plan import dump_plan, load_plan
from planner.predict import predict
from planner.report.plan import algebra_view, plan_document, plan_view
from planner.report.record import record_document, record_view
from planner.report.suggestion import suggestion_document, suggestion_view
from planner.resolve import (
    MachineChoice,
    fixed_choices,
    global_batch_size,
    hand_plan,
    machine_choice,
    micro_batch_size,
    model_spec,
    training,
    world_size,
)
from planner.search import suggest
from planner.trace import dump_record


def suggest_plans(options: SuggestOptions) -> Answer:
    """Search, write the winner and its prediction, explain."""
    for name, value in (("workers", options.workers), ("top", options.top)):
        if value < 1:
            raise PlanError(f"--{name} {value} is too few; use at least 1")
    fixed = fixed_choices(parse_fixed(options.fix))
    limit = None if options.memory_limit is None else parse_bytes(options.memory_limit)
    folder = Path(options.out)
    if not folder.is_dir():
        raise DataError(f"-o {folder} is no folder; make it first, or name another")
    model, choice = model_spec(options), machine_choice(options)
    say(choice.sentence)
    found = suggest(
        model,
        options.workers,
        choice.machine,
        global_batch_size=global_batch_size(options, options.workers),
        micro_batch_size=micro_batch_size(options),
        training=training(options, choice, options.workers),
        fixed=fixed,
        top=options.top,
        memory_limit_bytes=limit,
        forward_only=options.forward_only,
    )
    best = found.plans[0]
    files = folder / "plan.json", folder / "predicted.json"
    dump_plan(best.plan, files[0])
    dump_record(best.prediction, files[1])
    say(f"wrote {files[0]} and {files[1]}")

    def document() -> dict[str, Any]:
        more = {"machine": machine_document(choice), "files": [str(path) for path in files]}
        return suggestion_document(found) | more

    def view() -> Any:
        shown = suggestion_view(found, explain=options.explain)
        return Group(shown, algebra_view()) if options.explain else shown

    return Answer(document, view)


def machine_document(choice: MachineChoice) -> dict[str, str]:
    """Return which profile was used, as JSON."""
    return {"name": choice.machine.name, "origin": choice.origin, "path": choice.path}


def plan_by_hand(options: PlanOptions) -> Answer:
    """Make a plan from the options and write it."""
    workers = world_size(options)
    choice = machine_choice(options)
    settings = training(options, choice, workers)
    plan = hand_plan(options, model_spec(options), options, settings, choice.machine)
    path = Path(options.out)
    dump_plan(plan, path)
    say(f"wrote {path}")
    return Answer(lambda: {**plan_document(plan), "file": str(path)}, lambda: plan_view(plan))


def predict_plan(options: PredictOptions) -> Answer:
    """Predict a plan and write the prediction."""
    plan = load_plan(Path(options.plan))
    choice = machine_choice(options)
    say(choice.sentence)
    prediction = predict(plan, choice.machine)
    path = Path(options.out or "predicted.json")
    dump_record(prediction, path)
    say(f"wrote {path}")
    return Answer(lambda: record_document(prediction), lambda: record_view(prediction, str(path)))
