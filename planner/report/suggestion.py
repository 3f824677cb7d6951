"""The answer of a search: the best plans with where their time goes, why the first won, what was rejected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.admissible import distinct_operators
from planner.compare import PLACES, breakdown
from planner.plan import Plan, standard_layouts
from planner.report.tables import new_table
from planner.report.units import bytes_text, count_text, percent_text, rate_text, seconds_text
from planner.search.suggest import Ranked, Suggestion
from planner.trace import Prediction

PLACE_NAMES = {
    "compute": "compute",
    "tp": "tp communication",
    "cp": "cp communication",
    "dp": "dp communication",
    "pp": "pp communication",
    "waiting": "waiting for slower ranks",
    "bubble": "pipeline bubble",
    "overhead": "overhead",
}
MATTERS = 0.005  # differences below this share of the step are not told
_SHOWN = 0.0005  # places that take less than this share in every plan have no column


def suggestion_document(found: Suggestion, ties: int = 1) -> dict[str, Any]:
    """Return the suggestion as JSON: the contract of `planner suggest --json`; the first `ties` plans are tied."""
    return {
        "candidates": found.candidates,
        "feasible": found.feasible,
        "replayed": found.replayed,
        "seconds": found.seconds,
        "plans": [_plan_document(rank, each) | {"tie": 1 < ties >= rank} for rank, each in enumerate(found.plans, 1)],
        "rejected": [{"reason": each.reason, "count": each.count} for each in found.rejected],
        "notes": found.notes,
    }


def _plan_document(rank: int, ranked: Ranked) -> dict[str, Any]:
    plan, prediction = ranked.plan, ranked.prediction
    return {
        "rank": rank,
        "mesh": {axis: plan.mesh.size(axis) for axis in ("dp", "tp", "pp", "cp")},
        "schedule": plan.schedule.name,
        "num_model_chunks": plan.schedule.num_model_chunks,
        "micro_batch_size": plan.micro_batch_size,
        "num_micro_batches": num_micro_batches(plan),
        "recompute": plan.recompute,
        "zero_stage": plan.zero_stage,
        "sequence_parallel": plan.sequence_parallel,
        "cp_kind": plan.cp_kind,
        "overlap_gradients": plan.overlap_gradients,
        "attention": plan.attention,
        "transport": plan.transport,
        "stage_layers": list(plan.stage_layers),
        "plan_hash": prediction.plan_hash,
        "step_seconds": prediction.step_seconds,
        "low_seconds": prediction.low_seconds,
        "high_seconds": prediction.high_seconds,
        "tokens_per_second": prediction.tokens_per_second,
        "mfu": prediction.mfu,
        "bubble_fraction": prediction.bubble_fraction,
        "exposed_communication_seconds": prediction.exposed_communication_seconds,
        "peak_bytes": max(prediction.peak_bytes),
        "breakdown_seconds": breakdown(prediction),
        "warnings": prediction.warnings,
    }


def num_micro_batches(plan: Plan) -> int:
    """Return the micro-batches of the replica that has most."""
    return max(len(plan.micro_batches(replica)) for replica in range(plan.mesh.dp))


def mesh_text(plan: Plan) -> str:
    """Return the axes that have more than one rank, as `dp=2 tp=4`."""
    axes = [f"{axis}={plan.mesh.size(axis)}" for axis in ("dp", "tp", "pp", "cp") if plan.mesh.size(axis) > 1]
    return " ".join(axes) or "one rank"


def choices_text(plan: Plan) -> str:
    """Return the choices of a plan that differ from the plain ones."""
    words = []
    if plan.mesh.pp > 1:
        chunks = plan.schedule.num_model_chunks
        words.append(plan.schedule.name + (f" v={chunks}" if chunks > 1 else ""))
    if plan.zero_stage:
        words.append(f"zero={plan.zero_stage}")
    if plan.overlap_gradients:
        words.append("overlap")
    if plan.sequence_parallel:
        words.append("seq-parallel")
    if plan.mesh.cp > 1:
        words.append(plan.cp_kind)
    if plan.recompute != "none":
        words.append(f"recompute={plan.recompute}")
    if plan.attention != "plain":
        words.append(f"{plan.attention} attention")
    if plan.layouts != _usual_layouts(plan):
        words.append("assigned signatures")
    if plan.forward_only:
        words.append("forward only")
    return ", ".join(words) or "–"


def plan_text(plan: Plan) -> str:
    """The mesh, and what else tells the plan from others on the same mesh."""
    choices = choices_text(plan)
    return mesh_text(plan) if choices == "–" else f"{mesh_text(plan)}, {choices}"


def _usual_layouts(plan: Plan) -> dict[str, dict[str, str]]:
    return standard_layouts(
        distinct_operators(plan.model), sequence_parallel=plan.sequence_parallel, cp_kind=plan.cp_kind
    )


def suggestion_view(found: Suggestion, *, ties: int = 1) -> RenderableType:
    """Return the tables and sentences of a suggestion whose first `ties` plans are tied."""
    parts: list[RenderableType] = [_table(found, ties), Text()]
    parts += [Text(sentence) for sentence in reasons(found, ties)]
    parts += [Text(f"warning: {warning}") for warning in found.plans[0].prediction.warnings]
    if found.rejected:
        total = sum(each.count for each in found.rejected)
        parts.append(Text(f"rejected {count_text(total)}:"))
        parts += [Text(f"  {count_text(each.count):>9}  {each.reason}") for each in found.rejected]
    parts += [Text(f"note: {note}") for note in found.notes]
    return Group(*parts)


def _table(found: Suggestion, ties: int) -> Table:
    title = (
        f"best {len(found.plans)} of {count_text(found.candidates)} candidates; {count_text(found.feasible)} fit, "
        f"{count_text(found.replayed)} replayed, {seconds_text(found.seconds)}"
    )
    table = new_table(title)
    shares = [_shares(each.prediction) for each in found.plans]
    shown = [place for place in PLACES if any(share[place] >= _SHOWN for share in shares)]
    table.add_column("#", justify="right")
    table.add_column("plan", min_width=22)
    table.add_column("micro×m", justify="right", no_wrap=True)
    for name in ("step", "80% within", "tokens/s", "MFU", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for place in shown:
        table.add_column({"waiting": "wait", "overhead": "other"}.get(place, place), justify="right", no_wrap=True)
    for rank, (each, share) in enumerate(zip(found.plans, shares, strict=True), 1):
        plan, prediction = each.plan, each.prediction
        table.add_row(
            f"{rank}=" if 1 < ties >= rank else str(rank),
            plan_text(plan),
            f"{plan.micro_batch_size}×{num_micro_batches(plan)}",
            seconds_text(prediction.step_seconds),
            f"{seconds_text(prediction.low_seconds)}–{seconds_text(prediction.high_seconds)}",
            rate_text(prediction.tokens_per_second),
            percent_text(prediction.mfu),
            bytes_text(max(prediction.peak_bytes)),
            *(percent_text(share[place]) for place in shown),
            style="bold" if rank == 1 else "",
        )
    return table


def _shares(prediction: Prediction) -> dict[str, float]:
    return {place: seconds / prediction.step_seconds for place, seconds in breakdown(prediction).items()}


def reasons(found: Suggestion, ties: int = 1) -> Iterator[str]:
    """Yield why the first plan won over the runner-up, what it ties with, and how sure its time is."""
    if len(found.plans) < 2:
        yield "Only one plan was found that can be carried out and fits."
        return
    first = found.plans[0]
    if ties > 1:
        yield tie_sentence(found, ties)
    if ties < len(found.plans):
        yield gain_sentence(found, ties)
    seconds = first.prediction.high_seconds
    within = sum(each.prediction.step_seconds < seconds for each in found.plans)
    low, high = seconds_text(first.prediction.low_seconds), seconds_text(seconds)
    yield f"#1 takes {low} to {high} with 80% confidence; {within} of the plans shown lie below that end."


def tie_sentence(found: Suggestion, ties: int) -> str:
    """Return which plans tie, and why the first of them is preferred."""
    plans = found.plans[:ties]
    fastest = min(each.prediction.step_seconds for each in plans)
    spread = max(each.prediction.step_seconds for each in plans) / fastest - 1
    needs, most = (bytes_text(size) for size in (_peak(plans[0]), max(map(_peak, plans))))
    why = "which leaves most memory free" if _peak(plans[0]) < max(map(_peak, plans)) else "the fastest of them"
    return (
        f"#1 to #{ties} are a tie: their steps lie {percent_text(spread)} apart, less than the model can tell. "
        f"Preferred is #1, {why} ({needs} a rank; the others need up to {most})."
    )


def _peak(ranked: Ranked) -> int:
    return max(ranked.prediction.peak_bytes)


def gain_sentence(found: Suggestion, place: int) -> str:
    """Return what the best plan gains over another one, counted from 0, and where."""
    first, second = found.plans[0], found.plans[place]
    step, other = first.prediction.step_seconds, second.prediction.step_seconds
    names = f"#1 ({plan_text(first.plan)}) over #{place + 1} ({plan_text(second.plan)})"
    ours, theirs = breakdown(first.prediction), breakdown(second.prediction)
    gains = {place: theirs[place] - ours[place] for place in PLACES}
    told = sorted((p for p in PLACES if abs(gains[p]) >= MATTERS * step), key=lambda p: -abs(gains[p]))
    less = [f"{seconds_text(gains[p])} less {PLACE_NAMES[p]}" for p in told if gains[p] > 0]
    more = [f"{seconds_text(-gains[p])} more {PLACE_NAMES[p]}" for p in told if gains[p] < 0]
    reasons = [", ".join(each) for each in (less, more) if each]
    why = f": {', though '.join(reasons)}" if reasons else ""
    way = "faster" if other >= step else "slower"
    return f"{names}: {seconds_text(abs(other - step))} ({percent_text(abs(other - step) / other)}) {way}{why}."


def bounds(prediction: Prediction) -> Iterator[str]:
    """Yield what bounds a plan: its largest terms, and its memory."""
    places = breakdown(prediction)
    step = prediction.step_seconds
    largest = sorted((place for place in PLACES if places[place] > MATTERS * step), key=lambda p: -places[p])
    told = ", ".join(f"{PLACE_NAMES[p]} {seconds_text(places[p])} ({percent_text(places[p] / step)})" for p in largest)
    yield f"The step of #1 is {told}."
    peak = max(range(len(prediction.peak_bytes)), key=prediction.peak_bytes.__getitem__)
    parts = {part: sizes[peak] for part, sizes in prediction.peak_parts.items() if sizes[peak]}
    told = ", ".join(f"{part} {bytes_text(size)}" for part, size in sorted(parts.items(), key=lambda each: -each[1]))
    yield f"Its fullest rank, {peak}, holds {bytes_text(prediction.peak_bytes[peak])}: {told}."
