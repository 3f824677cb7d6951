"""Durations: how long each op of each stage takes, and how long its messages travel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.errors import ScheduleError

PerStage = float | Sequence[float]


@dataclass(frozen=True)
class Durations:
    """Seconds per op (one figure for all stages, or one per stage) and the cost of a message between ranks.

    Attributes:
        forward_seconds: F, of one micro-batch.
        backward_input_seconds: I.
        backward_weight_seconds: W.
        backward_seconds: B; None for I + W.
        overlap_factor: What OVERLAP_F_B takes, as a share of its F plus its B; 1 for no gain from overlapping.
        latency_seconds: Time a message travels without occupying its link.
        message_bytes: Bytes of a message that leaves a stage, forward or backward.
        bytes_per_second: Bandwidth of the link, one per (source, destination, direction); messages queue on it.
    """

    forward_seconds: PerStage = 1.0
    backward_input_seconds: PerStage = 1.0
    backward_weight_seconds: PerStage = 1.0
    backward_seconds: PerStage | None = None
    overlap_factor: float = 1.0
    latency_seconds: float = 0.0
    message_bytes: PerStage = 0.0
    bytes_per_second: float = math.inf

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            values = value if isinstance(value, Sequence) else (0.0 if value is None else value,)
            for figure in values:
                if not figure >= 0.0 or (math.isinf(figure) and key != "bytes_per_second"):
                    raise ScheduleError(f"{key} is {figure}; give a finite number of at least 0")
        if self.bytes_per_second == 0.0:
            raise ScheduleError(
                "bytes_per_second is 0; give a positive bandwidth, or message_bytes=0 for free messages"
            )

    @classmethod
    def from_keys(cls, keys: Mapping[str, float]) -> Durations:
        """Return durations from the keys F, I, W, B and comm of the command line.

        B defaults to I + W, I and W to B/2 (to 1 without B), F to 1, comm (the latency) to 0.

        Raises:
            ScheduleError: an unknown key, or a negative figure.
        """
        if unknown := set(keys) - {"F", "I", "W", "B", "comm"}:
            raise ScheduleError(f"unknown duration {min(unknown)!r}; the keys are F, I, W, B and comm")
        half = keys["B"] / 2 if "B" in keys else 1.0
        return cls(
            forward_seconds=keys.get("F", 1.0),
            backward_input_seconds=keys.get("I", half),
            backward_weight_seconds=keys.get("W", half),
            backward_seconds=keys.get("B"),
            latency_seconds=keys.get("comm", 0.0),
        )

    def of(self, op: str, num_stages: int) -> list[float]:
        """Return the seconds of F, I, W or B on each stage, a list of num_stages.

        Raises:
            ScheduleError: there is one figure per stage, but for another number of stages.
        """
        if op == "B" and self.backward_seconds is None:
            pairs = zip(self.of("I", num_stages), self.of("W", num_stages), strict=True)
            return [input_part + weight_part for input_part, weight_part in pairs]
        key = {
            "F": "forward_seconds",
            "I": "backward_input_seconds",
            "W": "backward_weight_seconds",
            "B": "backward_seconds",
        }[op]
        return self._spread(key, num_stages)

    def transfer_seconds(self, num_stages: int) -> list[float]:
        """Return how long the message that leaves each stage occupies its link, a list of num_stages."""
        return [size / self.bytes_per_second for size in self._spread("message_bytes", num_stages)]

    def _spread(self, key: str, num_stages: int) -> list[float]:
        value: PerStage = getattr(self, key)
        if not isinstance(value, Sequence):
            return [float(value)] * num_stages
        if len(value) != num_stages:
            raise ScheduleError(
                f"{key} has {len(value)} figures for {num_stages} stages; give one figure or {num_stages}"
            )
        return [float(figure) for figure in value]


UNIT = Durations()
"""The paper's unit costs: F = I = W = 1, no communication."""
