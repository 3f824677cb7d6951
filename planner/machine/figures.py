"""The figures that describe a machine, group by group, each group saying where its figures come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, get_args

import msgspec

from planner.errors import MachineError
from planner.machine.measured import AttentionFigures, GemmSample

Precision: TypeAlias = Literal["float64", "float32", "tf32", "float16", "bfloat16", "fp8"]
Collective: TypeAlias = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]
Algorithm: TypeAlias = Literal["ring", "tree", "recursive_doubling", "halving_doubling", "hierarchical", "auto"]
Positive: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
NonNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]
Fraction: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1)]
Slowdown: TypeAlias = Annotated[float, msgspec.Meta(ge=1)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]
Provenance: TypeAlias = Annotated[str, msgspec.Meta(min_length=8)]  # datasheet, paper, or what it was fitted on

DATASHEET_LOG_SIGMA = 0.25  # what separates a datasheet figure from a run, when nothing was fitted


class GemmTile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One output tile that the matrix-multiply library can choose, and its rate relative to the best one."""

    rows: Count
    columns: Count
    relative_rate: Fraction = 1.0


class GemmCurve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Efficiency of a matrix product as a function of its shape.

    The rate is `fraction` of the peak for large shapes. `half_rows`, `half_columns` and `half_depth` are the sizes of
    m, n and k at which edges and start-up halve it. `tiles` (with the device's multiprocessors) adds tile and wave
    quantization; without tiles the curve is smooth. `misaligned_rate` is the relative rate of shapes with a dimension
    that is not a multiple of 16 bytes, which tensor cores load in smaller pieces.
    """

    fraction: Fraction
    half_rows: NonNegative = 0.0
    half_columns: NonNegative = 0.0
    half_depth: NonNegative = 0.0
    misaligned_rate: Fraction = 1.0
    tiles: tuple[GemmTile, ...] = ()


class MemoryRegime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bandwidth of working sets that fit into a cache of `up_to_bytes`."""

    up_to_bytes: Positive
    bandwidth_bytes_per_second: Positive


class KernelFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cost of one kind of memory-bound kernel: the larger of arithmetic and traffic, plus the call.

    `seconds_per_element` is for float32 and scales with the element size; `seconds_per_byte`, where measured, replaces
    the device's bandwidth; `calls` counts the launches that one operator of the kind makes. `regimes`, where measured,
    replace all of these: seconds of a whole task by the bytes it moves. `concurrent_slowdown` is what they gain when as
    many ranks are at work as there are cores.
    """

    seconds_per_element: NonNegative = 0.0
    seconds_per_byte: NonNegative | None = None
    bandwidth_fraction: Fraction = 1.0
    call_seconds: NonNegative | None = None
    calls: Count = 1
    regimes: tuple[MeasuredRegime, ...] = ()
    concurrent_slowdown: Slowdown = 1.0


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One accelerator, or the share of a CPU that one rank has.

    `gemm` holds a curve by precision and one under "default"; `attention` the same for fused attention. `kernels` is
    keyed by operator kind, with "default" for the rest.
    """

    provenance: Provenance
    name: str
    kind: Literal["gpu", "cpu"]
    peak_flops_per_second: dict[Precision, Positive]
    gemm: dict[str, GemmCurve]
    batched_gemm: GemmCurve | None = None  # of plain attention's products; None: as all others
    gemm_samples: tuple[GemmSample, ...] = ()  # what the curve's error is interpolated from
    attention: dict[str, AttentionFigures] = {}  # by task kind, such as attention_plain_backward
    attention_fraction: dict[str, Fraction] = {}
    attention_backward_fraction: dict[str, Fraction] = {}
    memory_bytes: Positive
    memory_bandwidth_bytes_per_second: Positive
    memory_regimes: tuple[MemoryRegime, ...] = ()
    kernels: dict[str, KernelFigures] = {}
    call_seconds: NonNegative = 0.0
    multiprocessors: Count | None = None
    dollars_per_hour: Positive | None = None


class Overheads(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the framework adds around the kernels.

    `dispatch_seconds` is host time per kernel, `collective_dispatch_seconds` per collective: a stretch of work takes at
    least their sum. `queue_sharpness` is the order of the smooth maximum of host and device time (None: the maximum).
    `host_speed_sigma` is the relative spread of speed between equal hosts, of which a step waits for the slowest.
    """

    provenance: Provenance
    dispatch_seconds: NonNegative = 0.0
    collective_dispatch_seconds: NonNegative = 0.0
    queue_sharpness: Annotated[float, msgspec.Meta(ge=1)] | None = None
    host_speed_sigma: NonNegative = 0.0
    micro_batch_seconds: NonNegative = 0.0
    step_seconds: NonNegative = 0.0
    exchange_seconds: NonNegative = 0.0  # host time of one pipeline send or receive
    overlap_slowdown: Slowdown = 1.0  # of compute while a collective runs beside it
    overlap_fraction: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0  # of a collective that can hide behind compute


class Framework(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the training program on this cluster stores its state and passes messages; by default as our executor does.

    The bytes are per parameter, in mixed precision (16 bits or fp8): Megatron-LM keeps 2 + 2 + 12 or 2 + 4 + 12
    (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1). `scattered_messages` splits a pipeline message over the
    tensor axis and gathers it on the other host (Narayanan et al. 2021, section 4.1). `blocking_messages` are waited
    for on the compute stream, so that nothing hides them.
    """

    provenance: Provenance = "the executor of this distribution"
    parameter_bytes: Positive | None = None
    gradient_bytes: Positive | None = None
    optimizer_bytes: Positive | None = None  # moments and master parameters
    accumulated_gradient_bytes: dict[Precision, NonNegative] = {}  # kept beside the gradients to sum micro-batches in
    probability_bytes: Positive | None = None  # per attention probability saved: softmax, dropout mask, dropout
    logit_bytes: Positive | None = None  # per logit, where the loss is taken in another precision than the layers
    scattered_messages: bool = False
    blocking_messages: bool = False


class MeasuredRegime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Latency plus bandwidth, valid up to a message size (the last regime has none: it goes on)."""

    up_to_bytes: Positive | None = None
    latency_seconds: NonNegative
    seconds_per_byte: NonNegative


class MeasuredCollective(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured time of one collective (or "send") on one group size, with the algorithm that was timed.

    `ranks_per_host` says, on a link between hosts, how many of the group sit on each host.
    """

    operation: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"]
    group_size: Annotated[int, msgspec.Meta(ge=2)]
    algorithm: str = "library"
    ranks_per_host: Count = 1
    regimes: Annotated[tuple[MeasuredRegime, ...], msgspec.Meta(min_length=1)]


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tier of the interconnect, inside a host or between hosts.

    `bandwidth_bytes_per_second` is what one rank can send in one direction; `shared_bandwidth_bytes_per_second` what
    all ranks of a host together can (its network cards). `efficiency` is the reached share of it per collective, or
    "send", or "default". Where `measured` holds an operation its regimes replace the formulas.
    """

    provenance: Provenance
    latency_seconds: NonNegative
    bandwidth_bytes_per_second: Positive
    shared_bandwidth_bytes_per_second: Positive | None = None
    call_seconds: NonNegative = 0.0
    efficiency: dict[str, Fraction] = {}
    measured: tuple[MeasuredCollective, ...] = ()
    in_place: dict[str, MeasuredRegime] = {}  # by collective: what a step adds to `measured`, operands being cold


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the ranks of one host share."""

    provenance: Provenance
    devices: Count
    cores: Count = 1
    memory_bytes: Positive | None = None
    memory_bandwidth_bytes_per_second: Positive | None = None
    thread_speedup: tuple[Positive, ...] = (1.0,)  # of a matrix product with 1, 2, ... threads
    oversubscription_slowdown: Slowdown = 1.0  # on top of sharing the cores, when ranks outnumber them
    concurrent_gemm_slowdown: Slowdown = 1.0  # of a rank's matrix products while all other cores compute too


class MemoryOverhead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a process holds beyond the tensors that the plan names."""

    provenance: Provenance
    context_bytes: NonNegative = 0.0  # driver, libraries, communicators: seen by nvidia-smi only
    communicator_bytes: NonNegative = 0.0  # per process group
    fragmentation_fraction: NonNegative = 0.0  # reserved over allocated, minus one
    workspace_bytes: NonNegative = 0.0  # matrix-multiply workspaces and the like, inside the allocator
    activation_fraction: Positive = 1.0  # activations that the framework saves, relative to those the program names


class Residuals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Spread of log(measured / predicted) over the rows that the figures were fitted on, and their range."""

    provenance: Provenance
    step_log_sigma: NonNegative = DATASHEET_LOG_SIGMA
    memory_log_sigma: NonNegative = 0.1
    kernel_log_sigma: NonNegative = 0.1
    collective_log_sigma: NonNegative = 0.15
    ranges: dict[str, tuple[float, float]] = {}  # smallest and largest value calibrated, by ModelSpec or mesh field


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cluster of equal hosts: its device, its two link tiers, and what the framework costs on it.

    Ranks fill hosts in order. GPU hosts take as many as they have devices, and there are as many hosts as that needs;
    on CPUs, which take any number, the ranks of a job are split evenly over `hosts`.
    """

    schema: Literal[1] = 1
    name: str
    description: str = ""
    hosts: Count = 1
    host: Host
    device: Device
    link_in_host: Link
    link_between_hosts: Link
    overheads: Overheads
    memory: MemoryOverhead
    residuals: Residuals
    framework: Framework = Framework()
    algorithms: dict[str, Algorithm] = {}  # by collective; "default" for the rest
    relative_speeds: tuple[Positive, ...] = ()  # by rank, 1 being this profile's figures; empty: all equal

    @property
    def devices_per_host(self) -> int:
        """Ranks that one host takes before work goes to the next host."""
        return self.host.devices

    def ranks_per_host(self, world_size: int) -> int:
        """Return how many ranks of a job sit on each of its hosts (fewer on the last one, where they do not divide)."""
        if self.device.kind == "cpu":
            return -(-world_size // self.hosts)
        return min(world_size, self.host.devices)

    def peak_flops_per_second(self, precision: str) -> float:
        """Return the peak rate of one device in a precision.

        Raises:
            MachineError: the profile has no figure for this precision.
        """
        peaks = {str(key): value for key, value in self.device.peak_flops_per_second.items()}
        if precision not in peaks:
            msg = (
                f"machine '{self.name}' has no figure device.peak_flops_per_second.{precision}; "
                f"use a precision it has ({', '.join(sorted(peaks))}) or add the figure to its profile"
            )
            raise MachineError(msg)
        return peaks[precision]

    def algorithm(self, operation: str) -> Algorithm:
        """Return the algorithm that this machine uses for a collective (ring where the profile does not say)."""
        return self.algorithms.get(operation, self.algorithms.get("default", "ring"))

    def relative_speed(self, rank: int) -> float:
        """Return the speed of a rank relative to the profile's figures."""
        return self.relative_speeds[rank] if rank < len(self.relative_speeds) else 1.0

    def figure(self, path: str) -> float:
        """Return one number by its dotted path, such as `device.gemm.default.fraction`.

        Raises:
            MachineError: there is no such number.
        """
        value: Any = msgspec.to_builtins(self)
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            msg = f"machine '{self.name}' has no figure {path}; write it as group.figure, such as host.devices"
            raise MachineError(msg)
        return float(value)

    def figure_provenance(self, group: str) -> str:
        """Return where the figures of a group (device, link_in_host, ...) come from."""
        return str(getattr(self, group).provenance)

    def with_figures(self, figures: Mapping[str, object]) -> Machine:
        """Return a copy with some figures replaced by dotted path, checked like a file (what fitting uses)."""
        tree = msgspec.to_builtins(self)
        for path, value in figures.items():
            *parents, last = path.split(".")
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = value
        return check_machine(tree, f"machine '{self.name}' with changed figures")


def check_machine(tree: dict[str, Any], where: str) -> Machine:
    """Check the tables of a profile and return the Machine."""
    try:
        machine = msgspec.convert(tree, Machine)
    except msgspec.ValidationError as error:
        msg = f"{where}: {error}; compare with a shipped profile ('planner machines' lists them)"
        raise MachineError(msg) from error
    for path, value in _numbers(tree, ""):
        if not math.isfinite(value):
            msg = f"{where}: {path} is {value}; give a finite figure or leave it out"
            raise MachineError(msg)
    _check_vocabulary(machine, where)
    return machine


def _check_vocabulary(machine: Machine, where: str) -> None:
    """Refuse table keys that no formula would ever read: a misspelt key must not be a silent default."""
    precisions = {"default", *get_args(Precision)}
    operations = {"default", "send", *get_args(Collective)}
    device = machine.device
    allowed: list[tuple[str, Mapping[str, object], set[str]]] = [
        ("device.gemm", device.gemm, precisions),
        ("device.attention_fraction", device.attention_fraction, precisions),
        ("device.attention_backward_fraction", device.attention_backward_fraction, precisions),
        ("link_in_host.efficiency", machine.link_in_host.efficiency, operations),
        ("link_between_hosts.efficiency", machine.link_between_hosts.efficiency, operations),
        ("link_in_host.in_place", machine.link_in_host.in_place, operations),
        ("algorithms", machine.algorithms, operations - {"send"}),
    ]
    for group, table, names in allowed:
        for key in table:
            if key not in names:
                msg = f"{where}: {group} has the unknown key '{key}'; use {', '.join(sorted(names))}"
                raise MachineError(msg)
    if "default" not in device.gemm:
        msg = f"{where}: the figure device.gemm.default.fraction is missing; add the table [device.gemm.default]"
        raise MachineError(msg)
    if any(tile for curve in device.gemm.values() for tile in curve.tiles) and device.multiprocessors is None:
        msg = f"{where}: device.gemm has tiles but device.multiprocessors is missing; add it or remove the tiles"
        raise MachineError(msg)


def _numbers(tree: Any, path: str) -> list[tuple[str, float]]:
    """Return every float in a tree of tables with its dotted path."""
    if isinstance(tree, float):
        return [(path, tree)]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [found for key, value in items for found in _numbers(value, f"{path}.{key}".strip("."))]
