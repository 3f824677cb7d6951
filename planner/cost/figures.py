"""Which figure of a profile prices a task, and a profile with one figure scaled: what calibration turns.

A figure is named by its group and what tells it apart inside: `kernel norm_backward`, `product forward 512 768 768`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from planner.cost.compute import gemm_seconds
from planner.cost.measured import STEP_OF, gemm_error
from planner.cost.price import COLLECTIVES, Pricer, task_precision
from planner.machine import (
    AttentionFigures,
    GemmCurve,
    GemmForm,
    GemmSample,
    KernelFigures,
    Link,
    Machine,
    MeasuredRegime,
)
from planner.mesh import Coordinate
from planner.program import Task

MOST_FRACTION = 1.0


class Figure(NamedTuple):
    """One figure: its group, and what tells it apart there.

    Groups are `kernel` (name), `product` (form, m, n, k: a sample of a measured profile), `curve` (precision),
    `batched_curve` (), `attention` (name), `table` (operation, group size, algorithm) and `link` (name).
    """

    group: str
    name: tuple[Any, ...] = ()


def figure_of(pricer: Pricer, task: Task, at: Coordinate) -> Figure | None:
    """Return the figure that prices a task; None for a task that several share or that none does.

    Args:
        pricer: Of the plan and machine.
        task: The task.
        at: Where the rank stands.
    """
    machine, plan = pricer.machine, pricer.plan
    if task.kind in COLLECTIVES:
        return _collective_figure(pricer, task, at)
    if task.axis is not None:
        return None
    operator, _, way = task.kind.partition(".")
    if operator == "linear":
        if not machine.device.gemm_samples:
            precision = task_precision(task, pricer.precision)
            return Figure("curve", (precision if precision in machine.device.gemm else "default",))
        work = task.work
        alone = plan.training.precision == "float32" and plan.training.threads_per_rank == 1
        return Figure("product", (way, int(work.m), int(work.n), int(work.k))) if alone and work.batch == 1 else None
    name = operator + ("_backward" if way.startswith("backward") else "")
    if operator.startswith("attention"):
        measured = STEP_OF.get(operator, operator) + ("_backward" if way.startswith("backward") else "")
        return Figure("attention", (measured,)) if measured in machine.device.attention else Figure("batched_curve")
    return Figure("kernel", (name,))


def _collective_figure(pricer: Pricer, task: Task, at: Coordinate) -> Figure | None:
    """The measured table of a collective's group size, or the link that its formula reads."""
    machine, place = pricer.machine, pricer.place(task, at)
    if machine.transport_in_use != machine.plain_transport:
        return None  # copies, MPI and synchronisation share its time, and the profile's own links have no part in it
    size, inside = int(place.size), place.on_host >= place.size
    if size == 1:
        return None
    link = "link_in_host" if inside else "link_between_hosts"
    operation = COLLECTIVES[task.kind]
    tables = [t for t in getattr(machine, link).measured if t.operation == operation]
    if not tables:
        return Figure("link", (link,))
    chosen = pricer.plan.collectives
    algorithm = chosen.get(f"{task.axis}.{operation}", chosen.get(operation, "native"))
    known = any(t.group_size == size and t.algorithm == algorithm for t in tables)
    return Figure("table", (link, operation, size, algorithm)) if known else None


def figure_text(figure: Figure) -> str:
    """Return a figure's dotted path in the profile."""
    name = figure.name
    if figure.group == "product":
        return f"device.gemm_samples.{name[0]}.{'x'.join(map(str, name[1:]))}"
    if figure.group == "table":
        link, operation, size, algorithm = name
        return f"{link}.measured.{operation}.{size}.{algorithm}"
    prefix = {"kernel": "device.kernels", "curve": "device.gemm", "attention": "device.attention", "link": ""}
    if figure.group == "batched_curve":
        return "device.batched_gemm.fraction"
    tail = ".fraction" if figure.group == "curve" else ""
    return f"{prefix[figure.group]}.{name[0]}{tail}".strip(".")


def value_of(machine: Machine, figure: Figure) -> float | None:
    """Return a figure's value where it is one number: a fraction of the peak, seconds of a product, a bandwidth."""
    if figure.group == "curve":
        return machine.device.gemm[figure.name[0]].fraction
    if figure.group == "batched_curve":
        return _batched(machine).fraction
    if figure.group == "link":
        return float(getattr(machine, figure.name[0]).bandwidth_bytes_per_second)
    if figure.group == "product":
        found = [s.seconds for s in machine.device.gemm_samples if (s.form, s.m, s.n, s.k) == figure.name]
        return found[0] if found else None
    return None


def scaled(machine: Machine, figure: Figure, factor: float) -> Machine:
    """Return the machine on which what a figure prices takes `factor` times as long (fractions stay at most 1)."""
    device, name = machine.device, figure.name
    if figure.group == "kernel":
        kernels = device.kernels | {name[0]: _scaled_kernel(machine, name[0], factor)}
        return _with_device(machine, kernels=kernels)
    if figure.group == "curve":
        return _with_device(machine, gemm=device.gemm | {name[0]: _scaled_curve(device.gemm[name[0]], factor)})
    if figure.group == "batched_curve":
        return _with_device(machine, batched_gemm=_scaled_curve(_batched(machine), factor))
    if figure.group == "attention":
        scaled_figures = _scaled_attention(device.attention[name[0]], factor)
        return _with_device(machine, attention=device.attention | {name[0]: scaled_figures})
    if figure.group == "product":
        return _with_sample(machine, name, factor)
    if figure.group == "link":
        return msgspec.structs.replace(machine, **{name[0]: _scaled_link(getattr(machine, name[0]), factor)})
    link, *table = name
    return msgspec.structs.replace(machine, **{link: _scaled_table(getattr(machine, link), tuple(table), factor)})


def _with_device(machine: Machine, **changes: Any) -> Machine:
    return msgspec.structs.replace(machine, device=msgspec.structs.replace(machine.device, **changes))


def _batched(machine: Machine) -> GemmCurve:
    return machine.device.batched_gemm or machine.device.gemm["default"]


def _scaled_curve(curve: GemmCurve, factor: float) -> GemmCurve:
    return msgspec.structs.replace(curve, fraction=min(MOST_FRACTION, curve.fraction / factor))


def _scaled_attention(figures: AttentionFigures, factor: float) -> AttentionFigures:
    fields = ("call_seconds", "product_seconds", "pair_seconds", "multiply_add_seconds", "element_seconds")
    return msgspec.structs.replace(figures, **{name: getattr(figures, name) * factor for name in fields})


def _scaled_kernel(machine: Machine, name: str, factor: float) -> KernelFigures:
    """The entry that prices a kernel, under its own name from now on, `factor` times as slow."""
    device = machine.device
    names = (name, "default") if device.gemm_samples else (name, name.removesuffix("_backward"), "default")
    before = next((device.kernels[each] for each in names if each in device.kernels), KernelFigures())
    if before.regimes:
        return msgspec.structs.replace(before, regimes=_scaled_regimes(before.regimes, factor))
    call = device.call_seconds if before.call_seconds is None else before.call_seconds
    changes: dict[str, Any] = {
        "seconds_per_element": before.seconds_per_element * factor,
        "call_seconds": call * factor,
    }
    fraction = before.bandwidth_fraction / factor
    if before.seconds_per_byte is not None:
        changes["seconds_per_byte"] = before.seconds_per_byte * factor
    elif fraction <= MOST_FRACTION:
        changes["bandwidth_fraction"] = fraction
    else:  # faster than the device's memory: what it moves stays in caches
        changes["seconds_per_byte"] = 1 / (device.memory_bandwidth_bytes_per_second * fraction)
    return msgspec.structs.replace(before, **changes)


def _scaled_regimes(regimes: tuple[MeasuredRegime, ...], factor: float) -> tuple[MeasuredRegime, ...]:
    return tuple(
        msgspec.structs.replace(
            each, latency_seconds=each.latency_seconds * factor, seconds_per_byte=each.seconds_per_byte * factor
        )
        for each in regimes
    )


def _scaled_link(link: Link, factor: float) -> Link:
    shared = link.shared_bandwidth_bytes_per_second
    return msgspec.structs.replace(
        link,
        latency_seconds=link.latency_seconds * factor,
        call_seconds=link.call_seconds * factor,
        bandwidth_bytes_per_second=link.bandwidth_bytes_per_second / factor,
        shared_bandwidth_bytes_per_second=None if shared is None else shared / factor,
    )


def _scaled_table(link: Link, name: tuple[Any, ...], factor: float) -> Link:
    tables = tuple(
        msgspec.structs.replace(table, regimes=_scaled_regimes(table.regimes, factor))
        if (table.operation, table.group_size, table.algorithm) == name
        else table
        for table in link.measured
    )
    return msgspec.structs.replace(link, measured=tables)


def _with_sample(machine: Machine, name: tuple[Any, ...], factor: float) -> Machine:
    """The machine with a sample of one product at `factor` times what is predicted of it now.

    Predictions smooth over the samples around a shape, so that they move by less than the sample does.
    """
    form: GemmForm
    form, m, n, k = name
    others = tuple(s for s in machine.device.gemm_samples if (s.form, s.m, s.n, s.k) != name)
    sample = GemmSample(form=form, m=m, n=n, k=k, seconds=_product_seconds(machine, form, m, n, k) * factor)
    return _with_device(machine, gemm_samples=(*others, sample))


def _product_seconds(machine: Machine, form: str, m: int, n: int, k: int) -> float:
    """What the profile now says of a product alone on the machine, in float32 on one thread."""
    return float(gemm_seconds(machine, m, n, k) * gemm_error(machine, form, m, n, k))


def attach_provenance(machine: Machine, note: str, figures: Sequence[Figure]) -> Machine:
    """Return the machine whose changed groups say so in their provenance."""
    groups = {"overheads"} | {figure.name[0] for figure in figures if figure.group in ("link", "table")}
    groups |= {"device"} if any(figure.group not in ("link", "table") for figure in figures) else set()
    changed = {}
    for group in sorted(groups):
        before = getattr(machine, group)
        plain = str(before.provenance).partition("; calibrated ")[0]
        changed[group] = msgspec.structs.replace(before, provenance=f"{plain}; {note}")
    return msgspec.structs.replace(machine, **changed)
