"""The explanation of a suggestion: what bounds it, what would change it, and its signatures beside the usual ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.compare import key_seconds
from planner.report.suggestion import bounds, choices_text, gain_sentence, mesh_text, plan_text
from planner.report.tables import new_table
from planner.report.units import bytes_text, percent_text, rate_text, seconds_text
from planner.search.explain import Crossing, Variation
from planner.search.suggest import Ranked, Suggestion
from planner.trace import Prediction

if TYPE_CHECKING:
    from planner.search.assign import Assignment

_NAMES = {"network": "network bandwidth", "memory": "memory limit", "batch": "global batch"}
_SAME = 5e-4  # changes below this share are none
LARGEST = 3


def explanation_document(
    found: Suggestion,
    changes: Sequence[Variation],
    signatures: Assignment | None,
    transports: Sequence[Crossing] = (),
) -> dict[str, Any]:
    """Return the explanation as JSON."""
    best = found.plans[0].prediction
    return {
        "runner_up": gain_sentence(found, 1) if len(found.plans) > 1 else None,
        "bounds": list(_bounds(best)),
        "variations": [_change_document(each, best) for each in changes],
        "transports": [msgspec.to_builtins(each) for each in transports],
        "signatures": None
        if signatures is None
        else {
            "usual": signatures.is_usual,
            "seconds": signatures.seconds,
            "usual_seconds": signatures.usual_seconds,
            "by_role": signatures.signatures,
        },
    }


def _change_document(change: Variation, before: Prediction) -> dict[str, Any]:
    best = change.best
    return {
        "what": change.what,
        "factor": change.factor,
        "same": change.same,
        "mesh": None if best is None else mesh_text(best.plan),
        "choices": None if best is None else choices_text(best.plan),
        "step_seconds": None if best is None else best.prediction.step_seconds,
        "tokens_per_second": None if best is None else best.prediction.tokens_per_second,
        "gain": None if best is None else best.prediction.tokens_per_second / before.tokens_per_second - 1,
        "kept_seconds": change.kept_seconds,
        "reason": change.reason,
    }


def explanation_view(
    found: Suggestion,
    changes: Sequence[Variation],
    signatures: Assignment | None,
    ties: int = 1,
    transports: Sequence[Crossing] = (),
) -> RenderableType:
    """Return the explanation for people."""
    best = found.plans[0]
    parts: list[RenderableType] = [Text(sentence) for sentence in _bounds(best.prediction)]
    parts += [Text(sentence) for sentence in transport_sentences(transports)]
    if ties > 1:  # else the suggestion has said so
        parts.append(Text(f"The runner-up, though tied: {gain_sentence(found, 1)}"))
    if signatures is not None:
        parts.append(Text(signature_sentence(signatures, best)))
    return Group(*parts, Text(), _changes(changes, best))


def _bounds(best: Prediction) -> Iterator[str]:
    yield from bounds(best)
    totals: dict[str, float] = defaultdict(float)
    for key, seconds in key_seconds(best).items():
        stage, _, rest = key.partition(".")
        totals[rest if stage.isdigit() else key] += seconds
    largest = sorted(totals, key=lambda key: -totals[key])[:LARGEST]
    told = ", ".join(f"{key} {percent_text(totals[key] / best.step_seconds)}" for key in largest)
    yield f"What a rank spends most of the step on, over all its layers: {told}."


def transport_sentences(crossings: Sequence[Crossing]) -> Iterator[str]:
    """Yield what of the communication is staging, and what the plan would take over the other transports."""
    for each in crossings:
        if each.used and each.staging_seconds:
            share = percent_text(each.staging_seconds / each.communication_seconds)
            copies = f"{seconds_text(each.staging_seconds)} ({share})"
            whole = seconds_text(each.communication_seconds)
            yield f"Of the {whole} that a rank communicates, {copies} are copies between GPU and host, and sums there."
    others = [f"{seconds_text(each.step_seconds)} over {each.transport}" for each in crossings if not each.used]
    if others:
        used = next(each for each in crossings if each.used)
        taken = seconds_text(used.step_seconds)
        yield f"The step of #1 takes {taken} over {used.transport}; it would take {' and '.join(others)}."


def signature_sentence(found: Assignment, best: Ranked) -> str:
    """Return whether the usual tensor-parallel signatures are the cheapest, and what others would gain."""
    if found.is_usual:
        return "The usual tensor-parallel signatures are the cheapest of all that the algebra allows."
    differ = ", ".join(
        f"{role} {chosen} (usual {best.plan.layouts[role]['tp']})"
        for role, chosen in sorted(found.signatures.items())
        if role in best.plan.layouts and best.plan.layouts[role]["tp"] != chosen
    )
    gain = percent_text(1 - found.seconds / found.usual_seconds)
    changed = f" with {differ}" if differ else ", and the plan has them"
    return f"On the tensor axis the cheapest signatures take {gain} less than the usual ones{changed}."


def _changes(changes: Sequence[Variation], before: Ranked) -> Table:
    table = new_table("if one thing were different")
    for name in ("change", "best plan then"):
        table.add_column(name)
    for name in ("step", "tokens/s", "against now", "peak", "#1 kept"):
        table.add_column(name, justify="right", no_wrap=True)
    rate = before.prediction.tokens_per_second
    for each in changes:
        title = f"{'half' if each.factor < 1 else 'double'} the {_NAMES[each.what]}"
        kept = "–" if each.kept_seconds is None else seconds_text(each.kept_seconds)
        if each.best is None:
            table.add_row(title, f"none: {each.reason}", "–", "–", "–", "–", kept)
            continue
        plan, prediction = each.best.plan, each.best.prediction
        gain = prediction.tokens_per_second / rate - 1
        name = "the same" if each.same else plan_text(plan)
        table.add_row(
            title,
            f"{name}, micro {plan.micro_batch_size}",
            seconds_text(prediction.step_seconds),
            rate_text(prediction.tokens_per_second),
            "no change" if abs(gain) < _SAME else percent_text(gain, signed=True),
            bytes_text(max(prediction.peak_bytes)),
            kept,
        )
    return table
