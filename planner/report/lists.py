"""What is known by name: models and machines; and one schedule."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from planner.machine import Machine, load_machine, machine_names
from planner.model import model_flops, parameters
from planner.model.presets import PRESETS
from planner.report.tables import new_table
from planner.report.timeline import ScheduleTimeline
from planner.report.units import bytes_text, count_text, flops_text, percent_text, seconds_text
from planner.simulate import ScheduleReplay

PATH_ENDS = 10
"""Instructions shown of either end of a critical path."""


def models_document() -> list[dict[str, Any]]:
    """Return the models known by name as JSON."""
    return [
        {
            "name": name,
            "parameters": parameters(preset.spec).total,
            "layers": preset.spec.layers,
            "hidden": preset.spec.hidden,
            "heads": preset.spec.heads,
            "kv_heads": preset.spec.kv_heads,
            "seq_len": preset.spec.seq_len,
            "vocab": preset.spec.vocab,
            "model_flops_per_sequence": model_flops(preset.spec),
            "source": preset.source,
        }
        for name, preset in PRESETS.items()
    ]


def models_view() -> RenderableType:
    """Return the table of models."""
    table = new_table()
    table.add_column("model", no_wrap=True)
    for name in ("parameters", "layers", "hidden", "heads", "kv", "tokens", "vocab"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("source", no_wrap=True)
    for row in models_document():
        sizes = (str(row[key]) for key in ("layers", "hidden", "heads", "kv_heads", "seq_len", "vocab"))
        table.add_row(row["name"], count_text(row["parameters"]), *sizes, shorten(row["source"], 36, placeholder="…"))
    return table


def machines_document(own: str | None) -> list[dict[str, Any]]:
    """Return the machine profiles as JSON; `own` is the path of the profile measured here."""
    names = ([own] if own else []) + list(machine_names())
    return [machine_document(load_machine(name), own if name == own else None) for name in names]


def machine_document(machine: Machine, own: str | None) -> dict[str, Any]:
    """Return what a machine can do, in short, as JSON; `own` is its path if it was measured here."""
    return {
        "name": machine.name,
        "measured_here": own is not None,
        "path": own,
        "device": machine.device.name,
        "devices_per_host": machine.devices_per_host,
        "memory_bytes": machine.device.memory_bytes,
        "peak_flops_per_second": {str(key): value for key, value in machine.device.peak_flops_per_second.items()},
        "transports": sorted({machine.transport_in_use, *machine.transports}),
        "dollars_per_hour": machine.device.dollars_per_hour,
        "price_provenance": machine.device.price_provenance,
        "description": machine.description,
        "provenance": machine.device.provenance,
    }


def machine_view(machine: Machine, path: str) -> RenderableType:
    """Return the main figures of one machine."""
    table = new_table(f"{machine.name} ({path})", header=False)
    device, link = machine.device, machine.link_in_host
    table.add_row("device", device.name)
    for precision, peak in device.peak_flops_per_second.items():
        table.add_row(f"peak, {precision}", flops_text(peak))
    table.add_row("memory", f"{bytes_text(device.memory_bytes)} a rank")
    table.add_row("memory bandwidth", f"{bytes_text(device.memory_bandwidth_bytes_per_second)}/s")
    rate = bytes_text(link.bandwidth_bytes_per_second)
    table.add_row("link inside the host", f"{rate}/s, latency {seconds_text(link.latency_seconds)}")
    if machine.device.kind == "cpu" and machine.hosts > 1:
        network = machine.link_between_hosts
        rate = bytes_text(network.shared_bandwidth_bytes_per_second or network.bandwidth_bytes_per_second)
        table.add_row("hosts", str(machine.hosts))
        table.add_row("link between hosts", f"{rate}/s a host, latency {seconds_text(network.latency_seconds)}")
    table.add_row("figures from", device.provenance)
    return table


def machines_view(own: str | None) -> RenderableType:
    """Return the table of machines."""
    table = new_table()
    table.add_column("machine", no_wrap=True)
    table.add_column("device", no_wrap=True)
    for name in ("per host", "memory", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in machines_document(own):
        peaks = row["peak_flops_per_second"]
        precision = max(peaks, key=lambda key: (key == "bfloat16", peaks[key]))
        peak = f"{flops_text(peaks[precision])} {precision}"
        name = f"{row['name']} (measured here)" if row["measured_here"] else row["name"]
        memory = bytes_text(row["memory_bytes"])
        table.add_row(
            name,
            row["device"],
            str(row["devices_per_host"]),
            memory,
            peak,
            shorten(row["provenance"], 30, placeholder="…"),
        )
    return Group(table, Text("--json adds where the figures come from", style="dim"))


def schedule_document(replay: ScheduleReplay, bound_seconds: float | None = None) -> dict[str, Any]:
    """Return a replayed schedule as JSON: the contract of `planner schedule --json`.

    Args:
        replay: The schedule in time.
        bound_seconds: What no order undercuts, of one that was solved for.
    """
    return {
        "name": replay.schedule.name,
        "programs": [[str(step) for step in program] for program in replay.schedule.programs],
        "makespan": replay.makespan_seconds,
        "bubble_fraction": replay.bubble_fraction,
        "bubble_ratio": replay.bubble_ratio,
        "span_bubble_ratio": replay.span_bubble_ratio,
        "peak_in_flight": replay.peak_in_flight,
        "peak_until_w": replay.peak_until_w,
        "critical_path": [[rank, str(step)] for rank, step in replay.critical_path()],
        **({} if bound_seconds is None else {"bound_seconds": bound_seconds}),
    }


def schedule_view(replay: ScheduleReplay, bound_seconds: float | None = None) -> RenderableType:
    """Return the timeline of a schedule and its figures."""
    schedule = replay.schedule
    title = (
        f"{schedule.name}: {schedule.num_stages} stages on {schedule.num_ranks} ranks, "
        f"{schedule.num_micro_batches} micro-batches"
    )
    figures = new_table(header=False)
    figures.add_row("makespan", f"{replay.makespan_seconds:g}{_proof(replay.makespan_seconds, bound_seconds)}")
    figures.add_row("bubble fraction", f"{percent_text(replay.bubble_fraction)} of all rank time")
    figures.add_row("bubble ratio", f"{percent_text(replay.bubble_ratio)} of the ideal time")
    figures.add_row("span bubble ratio", percent_text(replay.span_bubble_ratio))
    figures.add_row("activations at once, until B or I", ", ".join(map(str, replay.peak_in_flight)))
    figures.add_row("activations at once, until B or W", ", ".join(map(str, replay.peak_until_w)))
    figures.add_row("critical path", _path_text([str(step) for _, step in replay.critical_path()]))
    return Group(Text(title, style="bold"), ScheduleTimeline(replay), Text(), figures)


def _proof(seconds: float, bound_seconds: float | None) -> str:
    """How good an order is that was solved for."""
    if bound_seconds is None:
        return ""
    if seconds <= bound_seconds * (1 + 1e-5):
        return ", the proven optimum"
    return f", at most {percent_text(seconds / bound_seconds - 1)} above the optimum"


def _path_text(names: list[str]) -> str:
    """The instructions that set the makespan, the middle of a long path left out."""
    if len(names) > 2 * PATH_ENDS:
        names = [*names[:PATH_ENDS], f"… {len(names) - 2 * PATH_ENDS} more …", *names[-PATH_ENDS:]]
    return " ".join(names)
