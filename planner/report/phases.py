"""Phases: what kind of thing a span is, its letter and its colour; the same in terminal, SVG and trace."""

from __future__ import annotations

from typing import NamedTuple

from planner.trace import Span, is_communication, is_pipeline_wait


class Phase(NamedTuple):
    """A kind of span: the letter that shows it without colours, and a colour that reads on black and white."""

    name: str
    letter: str
    colour: str


FORWARD = Phase("forward", "F", "#4e79a7")
BACKWARD = Phase("backward", "B", "#59a14f")
WEIGHT = Phase("backward for weights", "W", "#8cd17d")
RECOMPUTE = Phase("recompute", "R", "#a0cbe8")
UPDATE = Phase("update", "U", "#b07aa1")
TENSOR = Phase("tp communication", "t", "#e15759")
CONTEXT = Phase("cp communication", "c", "#ff9d9a")
DATA = Phase("dp communication", "d", "#f28e2b")
PIPELINE = Phase("pp communication", "p", "#edc948")
WAIT = Phase("waiting for a slower rank", "·", "#bab0ac")
BUBBLE = Phase("pipeline bubble", " ", "#e8e8e8")

PHASES = (FORWARD, BACKWARD, WEIGHT, RECOMPUTE, UPDATE, TENSOR, CONTEXT, DATA, PIPELINE, WAIT, BUBBLE)

_BY_AXIS = {"tp": TENSOR, "cp": CONTEXT, "pp": PIPELINE, "tie": PIPELINE}
_BY_DIRECTION = {
    "forward": FORWARD,
    "F": FORWARD,
    "backward_weight": WEIGHT,
    "W": WEIGHT,
    "recompute": RECOMPUTE,
    "update": UPDATE,
}


def phase_of(span: Span) -> Phase:
    """Return the phase of a span, by its key."""
    if span.kind == "wait":
        return BUBBLE if is_pipeline_wait(span.key) else WAIT
    if is_communication(span.key):
        return _BY_AXIS.get(span.key.partition(".")[0], DATA)
    return _BY_DIRECTION.get(span.key.rpartition(".")[2], BACKWARD)
