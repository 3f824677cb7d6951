"""The table that `gpu.py` prints: values beside their goals."""

from __future__ import annotations

from statistics import median
from typing import Any, NamedTuple

TORCH_GOALS = {"eager": 0.95, "compiled": 1.10}
SHARE_GOAL = 0.65
"""Of the rate of large products: what a step should reach."""


class Row(NamedTuple):
    """One line of the table; `met` is None where no goal is set."""

    what: str
    value: float | None
    goal: str
    met: bool | None
    note: str = ""

    def as_text(self) -> str:
        """The row for the table."""
        figure = "-" if self.value is None else f"{self.value:.3g}"
        verdict = {True: "yes", False: "NO", None: ""}[self.met]
        return f"{self.what:58s} {figure:>10s}  {self.goal:>9s} {verdict:4s} {self.note}"


def at_most(what: str, value: float, goal: float, note: str = "") -> Row:
    """A row that should not exceed its goal."""
    return Row(what, value, f"<= {goal:g}", value <= goal, note)


def missed(what: str, goal: str, why: str) -> Row:
    """A row of a goal that nothing was measured for."""
    return Row(what, None, goal, False, why)


def torch_rows(precision: str, found: dict[str, Any] | None, *, has_goal: bool) -> list[Row]:
    """Ratios and the share of the product rate of one precision."""
    seconds = found["seconds"] if found else {}
    rows = []
    for side, goal in TORCH_GOALS.items():
        what = f"{precision} step over PyTorch {side}"
        if seconds.get(side) and seconds.get("ours"):
            pairs = zip(seconds["ours"], seconds[side], strict=True)
            ratio = median(ours / theirs for ours, theirs in pairs)
            note = f"{median(seconds['ours']) * 1e3:.2f} ms over {median(seconds[side]) * 1e3:.2f}"
            rows.append(at_most(what, ratio, goal, note) if has_goal else Row(what, ratio, "", None, note))
        elif has_goal:
            rows.append(missed(what, f"<= {goal:g}", "not measured"))
    what = f"{precision} step: share of the measured product rate"
    if seconds.get("ours"):
        facts = found["facts"]["ours"] if found else {}
        share = facts["step_flops"] / median(seconds["ours"]) / facts["gemm_flops_per_second"]
        note = f"{facts['gemm_flops_per_second'] / 1e12:.0f} TFLOP/s, {found['attention'] if found else ''} attention"
        rows.append(
            Row(what, share, f">= {SHARE_GOAL:g}" if has_goal else "", share >= SHARE_GOAL if has_goal else None, note)
        )
    elif has_goal:
        rows.append(missed(what, f">= {SHARE_GOAL:g}", "not measured"))
    return rows
