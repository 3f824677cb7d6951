"""SearchRequest: what `planner.suggest` is asked, as a value, so that it can be asked again with one thing changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from planner.machine import Machine
from planner.model import ModelSpec
from planner.plan import Training
from planner.search.suggest import Suggestion, default_memory_limit, suggest


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """A model, a number of ranks, a machine, and what of the plan is decided already.

    Attributes:
        model: The model.
        workers: Number of ranks.
        machine: The profile.
        global_batch_size: Sequences per step over all ranks.
        micro_batch_size: Sequences per forward pass; None searches.
        training: Optimizer, dropout, precision.
        fixed: Choices that are not searched, by name.
        top: How many plans to return.
        memory_limit_bytes: Per rank; None takes the machine's.
        forward_only: Plan an evaluation instead of training.
    """

    model: ModelSpec
    workers: int
    machine: Machine
    global_batch_size: int
    micro_batch_size: int | None = None
    training: Training = field(default_factory=Training)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    top: int = 10
    memory_limit_bytes: float | None = None
    forward_only: bool = False

    @property
    def limit_bytes(self) -> float:
        """Memory that a rank may use."""
        return self.memory_limit_bytes or default_memory_limit(self.machine, self.workers)

    def ask(self) -> Suggestion:
        """Search.

        Raises:
            PlanError: no candidate is possible or fits.
        """
        return suggest(
            self.model,
            self.workers,
            self.machine,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            training=self.training,
            fixed=self.fixed,
            top=self.top,
            memory_limit_bytes=self.memory_limit_bytes,
            forward_only=self.forward_only,
        )

    def but(self, **changes: Any) -> SearchRequest:
        """The same request with some of its fields changed."""
        return replace(self, **changes)
