"""Machine: what a cluster can do, as measured or published figures that each say where they come from.

A profile is a TOML file. It may extend another one (`extends = "a100-80gb"`) and then states only what differs; the
figures of one group carry one `provenance` line. Nothing here computes a time: `planner.cost` holds the formulas.
"""

from planner.machine.figures import (
    Algorithm,
    Collective,
    Device,
    Framework,
    GemmCurve,
    GemmTile,
    Host,
    KernelFigures,
    Machine,
    MemoryOverhead,
    MemoryRegime,
    Overheads,
    Precision,
    PrecisionFigures,
    Residuals,
)
from planner.machine.links import (
    TRANSPORTS,
    Link,
    MeasuredCollective,
    MeasuredRegime,
    Staging,
    Transport,
    TransportFigures,
)
from planner.machine.measured import AttentionFigures, GemmForm, GemmSample
from planner.machine.profile import (
    GENERIC_PROFILE,
    base_profile,
    dump_machine,
    load_machine,
    machine_names,
    render_machine,
    user_profile_path,
)

__all__ = [
    "Algorithm",
    "AttentionFigures",
    "Collective",
    "Device",
    "Framework",
    "GENERIC_PROFILE",
    "GemmCurve",
    "GemmForm",
    "GemmSample",
    "GemmTile",
    "Host",
    "KernelFigures",
    "Link",
    "Machine",
    "MeasuredCollective",
    "MeasuredRegime",
    "MemoryOverhead",
    "MemoryRegime",
    "Overheads",
    "Precision",
    "PrecisionFigures",
    "Residuals",
    "Staging",
    "TRANSPORTS",
    "Transport",
    "TransportFigures",
    "base_profile",
    "dump_machine",
    "load_machine",
    "machine_names",
    "render_machine",
    "user_profile_path",
]
