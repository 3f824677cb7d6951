"""Communicator: what the executor starts from. Transports are in `executor.comm.mpi` and `executor.comm.loopback`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from executor.comm.base import Channel, CommunicationError, Transport
from executor.comm.group import Group
from executor.comm.record import Record
from executor.comm.transports import Carrier, open_transport
from executor.device import Device
from executor.device.cuda import CudaDevice


class Communicator:
    """This rank's end of the job: the groups it belongs to, its counters, its log of recent calls.

    Args:
        transport: how to reach the other ranks.
        synchronous_sends: every send finishes only after its receiver has arrived (zero-buffer channels); a program
            that is correct this way does not rely on the library buffering messages.
        paranoid: compare a fingerprint of every collective across its group before carrying it out.
        paranoid_timeout_seconds: how long the others may take to arrive at a collective before that is an error.

    Attributes:
        rank: this rank's number in the job.
        size: ranks of the job.
        world: the group of all ranks, axis "world".
        counters: calls and payload bytes so far.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        synchronous_sends: bool = False,
        paranoid: bool = False,
        paranoid_timeout_seconds: float = 30.0,
    ) -> None:
        self.rank = transport.rank
        self.size = transport.size
        self._record = Record(synchronous_sends, paranoid, paranoid_timeout_seconds)
        self.counters = self._record.counters
        self._transport = transport
        self._carrier: Carrier | None = None
        self._groups: dict[tuple[str, tuple[int, ...]], Group] = {}
        self.world = self.group(range(self.size), "world")

    def group(self, ranks: Iterable[int], axis: str) -> Group:
        """Return the group of some ranks along an axis, made at the first call and cached.

        Making a group is collective over its members (and only them), so members must make their common groups in one
        order: use `create_groups` where ranks belong to several.

        Args:
            ranks: the members, this rank among them; positions in the group follow this order.
            axis: the mesh axis, under which calls are counted; the same ranks under another axis are another group.

        Raises:
            CommunicationError: ranks repeated, outside the job or without this one.
        """
        members = tuple(ranks)
        group = self._groups.get((axis, members))
        if group is None:
            if len(set(members)) != len(members) or not all(0 <= rank < self.size for rank in members):
                raise CommunicationError(f"group {axis!r} of ranks {members} is not a subset of {self.size} ranks")
            if self.rank not in members:
                raise CommunicationError(f"rank {self.rank} makes group {axis!r} of ranks {members}, not being in it")
            channel = self._transport.channel(members, axis) if len(members) > 1 else None
            carried = self._carrier(channel, axis) if self._carrier is not None and channel is not None else None
            group = Group(self._record, channel, axis, members, members.index(self.rank), carried)
            self._groups[axis, members] = group
        return group

    def use_device(self, device: Device, transport: str) -> None:
        """Let groups made from now on communicate a device's arrays too; collective over the job.

        Args:
            device: this rank's; for the host nothing changes.
            transport: the plan's `transport`.

        Raises:
            MeshwrightError: see `executor.comm.transports.open_transport`; on all ranks.
        """
        if isinstance(device, CudaDevice):
            self._record.device = device
            self._carrier, self._record.staging = open_transport(transport, device, self)

    @property
    def takes_device_pointers(self) -> bool:
        """Whether the library behind this communicator reads and writes device memory."""
        return self._transport.takes_device_pointers

    @property
    def library(self) -> str:
        """Name of the library behind this communicator."""
        return self._transport.library

    def create_groups(self, groups: Iterable[tuple[str, Sequence[int]]]) -> dict[tuple[str, tuple[int, ...]], Group]:
        """Make all groups of the job that contain this rank, in one order on every rank, so that none waits for ever.

        Args:
            groups: (axis, ranks) of groups; those without this rank are skipped, so every rank may pass the same list.

        Returns:
            This rank's groups by (axis, ranks).
        """
        wanted = sorted({(axis, tuple(ranks)) for axis, ranks in groups if self.rank in ranks})
        return {(axis, ranks): self.group(ranks, axis) for axis, ranks in wanted}

    def subset(self, ranks: Sequence[int]) -> Communicator:
        """Return a job of its own made of some ranks, numbered from 0 in their order; collective over those alone.

        Args:
            ranks: the members, this rank among them.
        """
        kept = self._record
        return Communicator(
            _Subset(self._transport, tuple(ranks)),
            synchronous_sends=kept.synchronous_sends,
            paranoid=kept.paranoid,
            paranoid_timeout_seconds=kept.paranoid_timeout_seconds,
        )

    def recent_calls(self) -> list[str]:
        """Return the last few communication calls of this rank, oldest first."""
        return self._record.recent_calls()


class _Subset:
    """Some ranks of another transport, numbered from 0."""

    def __init__(self, parent: Transport, ranks: tuple[int, ...]) -> None:
        self._parent, self._ranks = parent, ranks
        self.rank, self.size = ranks.index(parent.rank), len(ranks)
        self.takes_device_pointers, self.library = parent.takes_device_pointers, parent.library

    def channel(self, ranks: tuple[int, ...], axis: str) -> Channel:
        """Connect a group; only its members call."""
        return self._parent.channel(tuple(self._ranks[rank] for rank in ranks), axis)
