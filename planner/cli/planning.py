"""The commands that decide: suggest, plan, predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from rich.console import Group

from planner.cli.commands import PlanOptions, PredictOptions, SearchOptions, SuggestOptions
from planner.cli.frame import Answer, say
from planner.errors import PlanError
from planner.files import output_folder
from planner.machine import Transport
from planner.mesh import check_world_size
from planner.options import parse_bytes, parse_fixed
from planner.plan import dump_plan, load_plan
from planner.predict import predict
from planner.report.explanation import explanation_document, explanation_view
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
    with_transport,
    world_size,
)
from planner.search.explain import cheapest_signatures, crossings, variations
from planner.search.request import SearchRequest
from planner.search.ties import count_ties
from planner.trace import dump_record


def suggest_plans(options: SuggestOptions) -> Answer:
    """Search, write the winner and its prediction, explain."""
    folder = output_folder(options.out)
    choice, asked = search_request(options, options.workers, options.top)
    say(choice.sentence)
    found = asked.ask()
    best = found.plans[0]
    files = folder / "plan.json", folder / "predicted.json"
    dump_plan(best.plan, files[0])
    dump_record(best.prediction, files[1])
    say(f"wrote {files[0]} and {files[1]}")
    ties = count_ties([each.prediction for each in found.plans], choice.machine.residuals)
    changes = list(variations(asked, found)) if options.explain else []
    signatures = cheapest_signatures(found, choice.machine) if options.explain else None
    transports = crossings(best.plan, choice.machine) if options.explain else []

    def document() -> dict[str, Any]:
        more: dict[str, Any] = {"machine": machine_document(choice), "files": [str(path) for path in files]}
        if options.explain:
            more["explanation"] = explanation_document(found, changes, signatures, transports)
        return suggestion_document(found, ties) | more

    def view() -> Any:
        shown = suggestion_view(found, ties=ties)
        if not options.explain:
            return shown
        return Group(shown, explanation_view(found, changes, signatures, ties, transports), algebra_view())

    return Answer(document, view)


def search_request(options: SearchOptions, workers: int, top: int) -> tuple[MachineChoice, SearchRequest]:
    """Return the machine and the request that the options of a search ask about so many workers.

    Raises:
        MeshwrightError: an option outside its range.
    """
    for name, value in (("workers", workers), ("top", top)):
        if value < 1:
            raise PlanError(f"--{name} {value} is too few; use at least 1")
    check_world_size(workers)
    fixed = fixed_choices(parse_fixed(options.fix))
    limit = None if options.memory_limit is None else parse_bytes(options.memory_limit)
    model, choice = model_spec(options), with_transport(machine_choice(options), options, workers)
    asked = SearchRequest(
        model=model,
        workers=workers,
        machine=choice.machine,
        global_batch_size=global_batch_size(options, workers),
        micro_batch_size=micro_batch_size(options),
        training=training(options, choice, workers),
        fixed=fixed,
        top=top,
        memory_limit_bytes=limit,
        forward_only=options.forward_only,
    )
    return choice, asked


def machine_document(choice: MachineChoice) -> dict[str, str]:
    """Return which profile was used, as JSON."""
    return {"name": choice.machine.name, "origin": choice.origin, "path": choice.path}


def plan_by_hand(options: PlanOptions) -> Answer:
    """Make a plan from the options and write it."""
    workers = world_size(options)
    choice = with_transport(machine_choice(options), options, workers)
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
    machine = choice.machine
    if plan.mesh.world_size > 1 and not machine.suits(cast(Transport, plan.transport)):
        kind = machine.device.kind.upper()
        say(
            f"warning: the plan's transport {plan.transport} is none of {kind} ranks; predicted over "
            f"{machine.transport_in_use}, for a plan that runs there give 'planner plan' this machine"
        )
    prediction = predict(plan, machine)
    path = Path(options.out or "predicted.json")
    dump_record(prediction, path)
    say(f"wrote {path}")
    return Answer(lambda: record_document(prediction), lambda: record_view(prediction, str(path)))
