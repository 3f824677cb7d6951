"""Tuning: plans as predicted and as measured, the regret of trusting the prediction, and what to measure next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.report.suggestion import choices_text, mesh_text, num_micro_batches, plan_text
from planner.report.tables import new_table
from planner.report.units import percent_text, seconds_text
from planner.search.suggest import Ranked
from planner.search.tune import Tuned, Tuning


def tuning_document(found: Tuning, plans: Sequence[Ranked]) -> dict[str, Any]:
    """Return a tuning as JSON; ranks count from 1."""
    return {
        "plans": [
            {**_plan(plans[each.place]), "predicted_rank": each.place + 1, **msgspec.to_builtins(each)}
            for each in found.tuned
        ],
        "regret": found.regret,
        "spearman": found.spearman,
        "noise": found.noise,
        "drift": found.drift,
        "bias": found.bias,
        "next_run": None
        if found.next_run is None
        else _plan(plans[found.next_run.place]) | msgspec.to_builtins(found.next_run),
    }


def _plan(ranked: Ranked) -> dict[str, Any]:
    plan = ranked.plan
    return {
        "mesh": {axis: plan.mesh.size(axis) for axis in ("dp", "tp", "pp", "cp")},
        "choices": choices_text(plan),
        "micro_batch_size": plan.micro_batch_size,
        "plan_hash": plan.hash,
    }


def tuning_view(found: Tuning, plans: Sequence[Ranked], *, oversubscribed: bool) -> RenderableType:
    """Return the table and sentences of a tuning."""
    parts: list[RenderableType] = [_table(found, plans), Text()]
    parts += [Text(sentence) for sentence in sentences(found, plans)]
    if oversubscribed:
        parts.append(Text("note: the ranks outnumber the cores and take turns; times say little about the layout"))
    return Group(*parts)


def _table(found: Tuning, plans: Sequence[Ranked]) -> Table:
    rounds = len(found.tuned[0].round_seconds)
    table = new_table(f"{len(found.tuned)} plans, measured in {rounds} round(s) of turns")
    table.add_column("measured", justify="right")
    table.add_column("predicted", justify="right")
    table.add_column("plan")
    for name in ("micro×m", "predicted", "measured", "80% within", "error", "regret"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found.tuned:
        table.add_row(f"#{each.measured_rank}", f"#{each.place + 1}", *_cells(each, plans[each.place]))
    return table


def _cells(each: Tuned, ranked: Ranked) -> Iterator[str]:
    plan = ranked.plan
    yield plan_text(plan)
    yield f"{plan.micro_batch_size}×{num_micro_batches(plan)}"
    yield seconds_text(each.predicted_seconds)
    yield seconds_text(each.measured_seconds)
    yield f"{seconds_text(each.low_seconds)}–{seconds_text(each.high_seconds)}"
    yield percent_text(each.predicted_seconds / each.measured_seconds - 1, signed=True)
    yield percent_text(each.regret)


def sentences(found: Tuning, plans: Sequence[Ranked]) -> Iterator[str]:
    """Yield the verdict on the prediction's order, the noise, and the next measurement."""
    best = found.tuned[0]
    name = mesh_text(plans[best.place].plan)
    if best.place == 0:
        yield f"The plan predicted best, {name}, is the best measured too."
    else:
        yield (
            f"Best measured is {name}, predicted #{best.place + 1}; to trust the prediction's first would have cost "
            f"{percent_text(found.regret)}."
        )
    if found.spearman is not None:
        yield f"Predicted and measured order correlate by {found.spearman:.2f} (Spearman)."
    noise = "" if found.noise is None else f"runs of one plan spread by {percent_text(found.noise)}, "
    yield f"Taken out or shown as intervals: {noise}rounds drifted by {percent_text(found.drift)}."
    more = found.next_run
    if more is None:
        yield "No plan that was not run could, by its interval, be as fast as the best measured."
        return
    plan = plans[more.place].plan
    low, high = seconds_text(more.low_seconds), seconds_text(more.high_seconds)
    yield (
        f"Next to measure: #{more.place + 1}, {plan_text(plan)}; it should take {low} to {high}, "
        f"which overlaps with the best by {seconds_text(more.overlap_seconds)}, the most of those not run."
    )
