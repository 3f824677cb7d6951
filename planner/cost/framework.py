"""What a framework leaves of a task: outputs that recomputation finds kept, collectives that run inside products."""

from __future__ import annotations

from planner.machine import Machine
from planner.program.tasks import Task

PIPELINED = ("all_gather", "reduce_scatter")
"""Collectives of sequence parallelism, which asynchronous tensor parallelism takes apart and runs inside products."""


def done_fraction(machine: Machine, task: Task) -> float:
    """Share of a task that is done at all: less than 1 where a framework's recomputation has kept some outputs.

    torchtitan's selective policy saves every second product, attention and reduce-scatters (Liang et al. 2024,
    arXiv 2410.06511, section 2.2.2), so that half of the products and none of the others run a second time. Unscaling
    float16 gradients is in the fitted figure of a framework's optimizer already.
    """
    framework = machine.framework
    if task.kind == "gradient_unscale" and framework.optimizer_bytes is not None:
        return 0.0
    kept = framework.recomputed_fraction
    if not (kept or framework.recompute_stops_early) or not task.key.endswith(".recompute"):
        return 1.0
    if framework.recompute_stops_early and ".ffn_out." in task.key:
        return 0.0
    return next((share for kind, share in kept.items() if task.kind.startswith(kind)), 1.0)


def exposed_fraction(machine: Machine, task: Task, operation: str) -> float:
    """Share of a collective that takes time of its own.

    Asynchronous tensor parallelism hides the rest of a gather or scatter in the product beside it (Wang et al. 2023,
    doi:10.1145/3567955.3567959); the gather of updated parameters can run beside the next forward pass, unit by unit
    (Rajbhandari et al. 2020, arXiv 1910.02054, section 7.2.1, in NeMo's distributed optimizer).
    """
    framework = machine.framework
    if task.axis == "tp" and operation in PIPELINED:
        return (1 - framework.hidden_tp_fraction) * done_fraction(machine, task)
    return 1 - framework.hidden_parameter_gather if task.kind == "parameter_all_gather" else 1.0
