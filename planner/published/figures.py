"""The figures of a profile that a fit may move: steps' and memory's, each with the width of its prior."""

from __future__ import annotations

import math
from typing import NamedTuple

from planner.errors import MachineError
from planner.machine import Machine


class Figure(NamedTuple):
    """A figure that may be fitted: its dotted path, the width of its prior (natural logarithm), its largest value.

    The prior is the value of the profile that is extended; `typical` where that one lacks the figure.
    """

    path: str
    log_sigma: float
    largest: float = math.inf
    typical: float | None = None


FIGURES = (
    Figure("device.gemm.default.fraction", 0.15, 0.97),
    Figure("device.gemm.default.half_depth", 1.0),
    Figure("device.gemm.default.misaligned_rate", 0.7, 1.0),
    Figure("device.gemm.fp8.fraction", 0.25, 0.97),
    Figure("device.batched_gemm.fraction", 0.4, 0.97),
    Figure("device.batched_gemm.misaligned_rate", 0.7, 1.0),
    Figure("device.attention_fraction.default", 0.3, 0.97),
    Figure("device.attention_backward_fraction.default", 0.3, 0.97),
    Figure("device.kernels.default.bandwidth_fraction", 0.2, 1.0),
    Figure("device.kernels.softmax.bandwidth_fraction", 0.3, 1.0),
    Figure("device.kernels.optimizer.bandwidth_fraction", 0.3, 1.0),
    Figure("device.kernels.cast.bandwidth_fraction", 0.3, 1.0),
    Figure("link_in_host.efficiency.default", 0.25, 1.0),
    Figure("link_in_host.latency_seconds", 1.0),
    Figure("link_in_host.call_seconds", 0.8),
    Figure("link_between_hosts.efficiency.default", 0.3, 1.0),
    Figure("link_between_hosts.latency_seconds", 0.8),
    Figure("overheads.dispatch_seconds", 0.8),
    Figure("overheads.collective_dispatch_seconds", 1.0),
    Figure("overheads.micro_batch_seconds", 1.0),
    Figure("overheads.step_seconds", 1.0),
    Figure("overheads.exchange_seconds", 1.0),
    Figure("overheads.host_speed_sigma", 0.3),
    Figure("overheads.overlap_fraction", 0.3, 1.0),
    Figure("variants.ngc23-09.device.gemm.fp8.fraction", 0.2, 0.97, 0.75),
    Figure("variants.ngc23-09.framework.hidden_parameter_gather", 0.3, 1.0, 0.8),
    Figure("variants.async-tp.framework.hidden_tp_fraction", 0.4, 0.95, 0.5),
    Figure("variants.eager.device.kernels.default.bandwidth_fraction", 0.4, 1.0, 0.4),
)
"""What a fit may move; a figure that the profile lacks, or has at zero, is left out."""


class MemoryFigure(NamedTuple):
    """A memory figure that may be fitted, and the kind of measurement that first shows it."""

    path: str
    log_sigma: float
    kind: str


MEMORY_FIGURES = (
    MemoryFigure("memory.activation_fraction", 0.3, "allocated"),
    MemoryFigure("memory.workspace_bytes", 1.0, "allocated"),
    MemoryFigure("memory.fragmentation_fraction", 0.7, "reserved"),
    MemoryFigure("memory.context_bytes", 0.5, "nvidia-smi"),
)


def fittable(machine: Machine) -> list[Figure]:
    """The figures of FIGURES that the machine has, above zero."""
    found = []
    for figure in FIGURES:
        try:
            value = machine.figure(figure.path)
        except MachineError:
            continue
        if value > 0:
            found.append(figure)
    return found
