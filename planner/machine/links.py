"""Links between ranks, and the transports that cross them: how tensors of one rank reach another.

CPU ranks exchange host buffers over MPI (`host`). GPU ranks have three ways: `nccl`; `cuda-aware`, an MPI library that
takes device pointers; and `staged`, which copies every tensor into pinned host memory, lets MPI move that, and copies
what arrives back (GPU -> CPU -> MPI -> CPU -> GPU).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

Transport: TypeAlias = Literal["host", "staged", "cuda-aware", "nccl"]
TRANSPORTS: tuple[Transport, ...] = ("host", "staged", "cuda-aware", "nccl")

_Positive: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
_NonNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]
_Fraction: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]
_Provenance: TypeAlias = Annotated[str, msgspec.Meta(min_length=8)]


class MeasuredRegime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Latency plus bandwidth, valid up to a message size (the last regime has none: it goes on)."""

    up_to_bytes: _Positive | None = None
    latency_seconds: _NonNegative
    seconds_per_byte: _NonNegative


class MeasuredCollective(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured time of one collective (or "send") on one group size, with the algorithm that was timed.

    `ranks_per_host` says, on a link between hosts, how many of the group sit on each host.
    """

    operation: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"]
    group_size: Annotated[int, msgspec.Meta(ge=2)]
    algorithm: str = "library"
    ranks_per_host: _Count = 1
    regimes: Annotated[tuple[MeasuredRegime, ...], msgspec.Meta(min_length=1)]


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tier of the interconnect, inside a host or between hosts.

    `bandwidth_bytes_per_second` is what one rank can send in one direction; `shared_bandwidth_bytes_per_second` what
    all ranks of a host together can (its network cards). `efficiency` is the reached share of it per collective, or
    "send", or "default". Where `measured` holds an operation its regimes replace the formulas.
    """

    provenance: _Provenance
    latency_seconds: _NonNegative
    bandwidth_bytes_per_second: _Positive
    shared_bandwidth_bytes_per_second: _Positive | None = None
    call_seconds: _NonNegative = 0.0
    efficiency: dict[str, _Fraction] = {}
    measured: tuple[MeasuredCollective, ...] = ()
    in_place: dict[str, MeasuredRegime] = {}  # by collective: what a step adds to `measured`, operands being cold


class Staging(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Copies between a device and pinned host memory, and the sums that MPI takes there.

    A device has a copy engine for each way, which all ranks on the device share; the copies of all ranks of a host
    together reach at most `shared_bandwidth_bytes_per_second` (its memory, or the root of its PCIe lanes).
    """

    provenance: _Provenance
    to_host_bytes_per_second: _Positive
    to_device_bytes_per_second: _Positive
    shared_bandwidth_bytes_per_second: _Positive | None = None
    latency_seconds: _NonNegative = 0.0  # of one copy: enqueued, started, waited for
    reduction_bytes_per_second: _Positive | None = None  # operands that a rank's core sums; None: part of the link's
    chunk_bytes: _Positive | None = None  # messages of two or more are cut, one copied while another is sent


class TransportFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What another transport changes: links of its own, or those of the profile, slowed.

    A link left out is the profile's with `bandwidth_fraction` of its bandwidth and `call_seconds` more per call (the
    stream is synchronised before MPI may read a device buffer, and the host launches on after it).
    """

    provenance: _Provenance
    link_in_host: Link | None = None
    link_between_hosts: Link | None = None
    bandwidth_fraction: _Fraction = 1.0
    call_seconds: _NonNegative = 0.0
    staging: Staging | None = None

    def over(self, link: Link, own: Link | None) -> Link:
        """Return this transport's link: its `own`, else the profile's `link`, slowed."""
        if own is not None:
            return own
        shared = link.shared_bandwidth_bytes_per_second
        return msgspec.structs.replace(
            link,
            provenance=f"{link.provenance}; {self.provenance}",
            bandwidth_bytes_per_second=link.bandwidth_bytes_per_second * self.bandwidth_fraction,
            shared_bandwidth_bytes_per_second=None if shared is None else shared * self.bandwidth_fraction,
            call_seconds=link.call_seconds + self.call_seconds,
            measured=tuple(
                msgspec.structs.replace(table, regimes=tuple(map(self._slowed, table.regimes)))
                for table in link.measured
            ),
        )

    def _slowed(self, regime: MeasuredRegime) -> MeasuredRegime:
        return msgspec.structs.replace(
            regime,
            latency_seconds=regime.latency_seconds + self.call_seconds,
            seconds_per_byte=regime.seconds_per_byte / self.bandwidth_fraction,
        )
