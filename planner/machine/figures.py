"""The figures that describe a machine, group by group, each group saying where its figures come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from planner.errors import MachineError
from planner.machine.links import Link, MeasuredRegime, Staging, Transport, TransportFigures
from planner.machine.measured import AttentionFigures, GemmSample

Precision: TypeAlias = Literal["float64", "float32", "tf32", "float16", "bfloat16", "fp8"]
Collective: TypeAlias = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]
Algorithm: TypeAlias = Literal["ring", "tree", "recursive_doubling", "halving_doubling", "hierarchical", "auto"]
Positive: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
NonNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]
Fraction: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1)]
Share: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1)]
Slowdown: TypeAlias = Annotated[float, msgspec.Meta(ge=1)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]
Speedups: TypeAlias = Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)]
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


class PrecisionFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was timed of a device in another precision than float32; what is left out is float32's.

    `kernels` and `attention` replace the entries of their names only.
    """

    gemm_samples: tuple[GemmSample, ...] = ()
    attention: dict[str, AttentionFigures] = {}
    kernels: dict[str, KernelFigures] = {}


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One accelerator, or the share of a CPU that one rank has.

    `gemm` holds a curve by precision and one under "default"; `attention` the same for fused attention. `kernels` is
    keyed by operator kind, with "default" for the rest. What was timed is of float32, and of a precision that has a
    table among `precisions` is there.
    """

    provenance: Provenance
    name: str
    kind: Literal["gpu", "cpu"]
    peak_flops_per_second: dict[Precision, Positive]
    gemm: dict[str, GemmCurve]
    batched_gemm: GemmCurve | None = None  # of plain attention's products; None: as all others
    gemm_samples: tuple[GemmSample, ...] = ()  # what the curve's error is interpolated from
    attention: dict[str, AttentionFigures] = {}  # by task kind, such as attention_plain_backward
    precisions: dict[Precision, PrecisionFigures] = {}  # what was timed in others than float32
    attention_fraction: dict[str, Fraction] = {}
    attention_backward_fraction: dict[str, Fraction] = {}
    memory_bytes: Positive
    memory_bandwidth_bytes_per_second: Positive
    memory_regimes: tuple[MemoryRegime, ...] = ()
    kernels: dict[str, KernelFigures] = {}
    call_seconds: NonNegative = 0.0
    multiprocessors: Count | None = None
    dollars_per_hour: Positive | None = None
    price_provenance: str = ""  # whose price, where and when


class Overheads(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the framework adds around the kernels.

    `dispatch_seconds` is host time per kernel, `collective_dispatch_seconds` per collective: a stretch of work takes at
    least their sum. `queue_sharpness` is the order of the smooth maximum of host and device time (None: the maximum).
    `host_speed_sigma` is the relative spread of speed between equal hosts, of which a step waits for the slowest.
    On CPUs `overlap_fraction` and `overlap_slowdown` are of gradient reductions that start early: such a one takes
    (1 - fraction)·slowdown of the time of one that is waited for.
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
    for on the compute stream, so that nothing hides them. `hidden_tp_fraction` is asynchronous tensor parallelism (Wang
    et al. 2023, ASPLOS, decompose a collective and its product into pipelined pieces). `recomputed_fraction` says what
    a policy that saves some operators' outputs leaves of full recomputation, by the first word of a task's kind.
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
    hidden_tp_fraction: Share = 0.0  # of tp's gathers and scatters that run inside the products they feed or follow
    hidden_parameter_gather: Share = 0.0  # of ZeRO's gather of updated parameters that runs beside the next forward
    recomputed_fraction: dict[str, Share] = {}  # of full recomputation's work that is done again, by kind of task
    placeholder_gradients: bool = False  # a 16-bit tensor is kept per distinct weight, to stand for its fused gradient
    recompute_stops_early: bool = False  # with the last tensor that backward needs, so before a layer's last product


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the ranks of one host share."""

    provenance: Provenance
    devices: Count
    ranks_per_device: Count = 1  # GPU ranks that take turns on one device; CPU ranks are shares of a host anyway
    cores: Count = 1
    memory_bytes: Positive | None = None
    memory_bandwidth_bytes_per_second: Positive | None = None
    thread_speedup: Speedups = (1.0,)  # of a matrix product with 1, 2, ... threads
    thread_call_seconds: NonNegative = 0.0  # to start and join the threads of one product
    oversubscription_slowdown: Slowdown = 1.0  # on top of sharing the cores, when ranks outnumber them
    concurrent_gemm_slowdown: Slowdown = 1.0  # of a rank's matrix products while all other cores compute too
    concurrent_gemm_seconds_per_byte: NonNegative = 0.0  # of operands, which reach all cores over one memory bus


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
    kernel_log_sigma: NonNegative = 0.1
    collective_log_sigma: NonNegative = 0.15
    ranges: dict[str, tuple[float, float]] = {}  # smallest and largest value calibrated, by ModelSpec or mesh field


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cluster of equal hosts: its device, its two link tiers, and what the framework costs on it.

    Ranks fill hosts in order. GPU hosts take as many as their devices take, and there are as many hosts as that needs;
    on CPUs, which take any number, the ranks of a job are split evenly over `hosts`.

    The links are those of `transport`, between GPUs NCCL's unless the profile says otherwise; `transports` has the
    figures of the others, and `over` changes to one of them. `staging` holds the copies of a staged transport in use.
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
    transport: Transport | None = None
    transports: dict[Transport, TransportFigures] = {}
    staging: Staging | None = None
    variants: dict[str, dict[str, Any]] = {}  # tables that replace others where a run used another technique

    @property
    def devices_per_host(self) -> int:
        """Ranks that one host takes before work goes to the next host."""
        return self.host.devices

    def ranks_per_host(self, world_size: int) -> int:
        """Return how many ranks of a job sit on each of its hosts (fewer on the last one, where they do not divide)."""
        if self.device.kind == "cpu":
            return -(-world_size // self.hosts)
        return min(world_size, self.host.devices * self.host.ranks_per_device)

    def ranks_per_device(self, world_size: int) -> int:
        """Return how many ranks of a job take turns on one device; 1 on CPUs, whose ranks have shares of their own."""
        return -(-self.ranks_per_host(world_size) // self.host.devices) if self.device.kind == "gpu" else 1

    @property
    def plain_transport(self) -> Transport:
        """The transport that the links of a profile are of where it does not say."""
        return "nccl" if self.device.kind == "gpu" else "host"

    @property
    def transport_in_use(self) -> Transport:
        """The transport that the links are of."""
        return self.transport or self.plain_transport

    def suits(self, transport: Transport) -> bool:
        """Whether a transport is one of this kind of device: `host` is of CPU ranks, all others are of GPU ranks."""
        return (transport == "host") == (self.device.kind == "cpu")

    def over(self, transport: Transport) -> Machine:
        """Return the machine with the links of a transport; the figures of the one it leaves stay among the others.

        Raises:
            MachineError: the profile has no figures for the transport.
        """
        used, plain = self.transport_in_use, self.plain_transport
        if transport == used:
            return self
        if transport not in self.transports:
            known = ", ".join(sorted({used, *self.transports}))
            msg = f"machine '{self.name}' has no figures for transport {transport}; use one it has ({known})" + (
                "" if self.device.kind == "cpu" else f" or add the table [transports.{transport}] to its profile"
            )
            raise MachineError(msg)
        # A transport without links of its own changes those of the plain one, whatever is in use now.
        base = self.over(plain) if transport != plain and plain in self.transports else self
        figures = self.transports[transport]
        left = TransportFigures(
            provenance=f"the profile's links over {used}",
            link_in_host=self.link_in_host,
            link_between_hosts=self.link_between_hosts,
            staging=self.staging,
        )
        return msgspec.structs.replace(
            self,
            link_in_host=figures.over(base.link_in_host, figures.link_in_host),
            link_between_hosts=figures.over(base.link_between_hosts, figures.link_between_hosts),
            staging=figures.staging,
            transport=transport,
            transports=self.transports | {used: left},
        )

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

    def variant(self, names: Iterable[str]) -> Machine:
        """Return the machine as runs used it that went by other techniques, with the tables of its `variants`.

        Names that the profile lacks change nothing: it makes no difference between them that it knows of.
        """
        chosen = [self.variants[name] for name in names if name in self.variants]
        return self.with_figures(dict(leaf for tables in chosen for leaf in _leaves(tables, ""))) if chosen else self

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
        from planner.machine.check import check_machine  # noqa: PLC0415 - which makes machines

        return check_machine(tree, f"machine '{self.name}' with changed figures")


def _leaves(tree: Mapping[str, Any], path: str) -> list[tuple[str, object]]:
    """Return every value in a tree of tables with its dotted path."""
    found: list[tuple[str, object]] = []
    for key, value in tree.items():
        name = f"{path}.{key}".strip(".")
        found += _leaves(value, name) if isinstance(value, Mapping) else [(name, value)]
    return found
