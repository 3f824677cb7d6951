"""Streams and events: the thread's current stream runs at once, every other one as late as it may.

Each thread is a host with its compute stream, the one it has made current; its operations are numbered. An event knows
up to which number the compute stream, and up to which operation its own stream, had come when it was recorded.

Two checks hold the rules of `executor.device`. Rule 2: an operation of another stream must have waited for an event
that the compute stream recorded behind its last use of the memory. Rule 3: the compute stream must have waited for (or
the host have seen the end of) every write of another stream to memory it touches. Rule 4, memory released too early,
needs no check: late operations read whatever has been written there meanwhile.
"""

from __future__ import annotations

import threading
import time

_world = threading.RLock()
moved = threading.Condition(_world)
_thread = threading.local()
WAIT_SECONDS = 20.0
EAGERNESS = 3  # questions after which an event that is asked for lets its stream run
streams_by_ptr: dict[int, Stream] = {}
log: list[tuple] = []
"""What hosts and streams did to one another: (thread, stream, "wait" | "record", other stream, its operation) and
(thread, stream, "synchronize", stream, operation)."""


class RaceError(AssertionError):
    """Two streams at one piece of memory with nothing that orders them."""


class Stream:
    """A CUDA stream of the thread that made it."""

    def __init__(self, null=False, ptds=False, non_blocking=False, priority=0):
        with _world:
            self.ptr = len(streams_by_ptr) + 1
            streams_by_ptr[self.ptr] = self
        self.queue = []  # callables, not yet run; each returns False if it cannot run yet
        self.given = self.run = 0
        self.seen_compute = 0  # up to which operation of the compute stream this one has waited
        self.waited = {}  # stream -> up to which of its operations this one has waited
        self.counter = 0  # operations of a compute stream
        self.is_current = False
        self.seen_by_host = 0  # up to which of its operations the host has waited for a compute stream

    def use(self):
        """Make it the thread's compute stream."""
        previous = getattr(_thread, "stream", None)
        if previous is not None:
            previous.is_current = False
        _thread.stream, self.is_current = self, True
        return self

    def note(self, allocations):
        """An operation of the compute stream on memory."""
        self.counter += 1
        for allocation in {id(a): a for a in allocations if a is not None}.values():
            with _world:
                for stream, number in allocation.writers:
                    if self.waited.get(stream, 0) < number:
                        raise RaceError(
                            f"the compute stream uses memory that stream {stream.ptr} writes, without waiting"
                        )
                allocation.writers.clear()
            allocation.last_compute = self.counter

    def enqueue(self, run, reads=(), writes=()):
        """Give the stream an operation; the compute stream carries it out."""
        if self.is_current:
            self.note([x.allocation for x in (*reads, *writes)])
            self.force()
            run()
            return
        self.require_order([x.allocation for x in (*reads, *writes)])
        self.append(lambda: run() or True)
        self.note_writes([x.allocation for x in writes])

    def require_order(self, allocations):
        """Rule 2, for an operation of another stream than the compute stream."""
        for allocation in allocations:
            if allocation is not None and allocation.last_compute > self.seen_compute:
                raise RaceError(
                    f"stream {self.ptr} uses memory that the compute stream used in operation "
                    f"{allocation.last_compute}, having waited for {self.seen_compute} only"
                )

    def note_writes(self, allocations):
        """Its latest operation writes memory: rule 3 is for whoever touches it."""
        with _world:
            for allocation in allocations:
                if allocation is not None:
                    allocation.writers.append((self, self.given))

    def append(self, item):
        """Queue something that may not be able to run yet."""
        with _world:
            self.queue.append(item)
            self.given += 1
            moved.notify_all()

    def wait_event(self, event):
        """Go on only behind an event."""
        log.append((threading.get_ident(), self.ptr, "wait", event.stream.ptr, event.number))
        self.seen_compute = max(self.seen_compute, event.seen_compute)
        self._inherit(event)
        if self.is_current:
            event.force()
        elif event.stream is not self:
            stream, number = event.stream, event.number
            self.append(lambda: stream.advance(number))

    def _inherit(self, event):
        for stream, number in {**event.waited, event.stream: event.number}.items():
            self.waited[stream] = max(self.waited.get(stream, 0), number)

    def record(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def advance(self, upto):
        """Run operations as far as they can; whether the stream has come that far."""
        while self.run < upto and self.queue:
            if getattr(self, "busy", False):
                return False
            self.busy = True
            try:
                ran = self.queue[0]()
            finally:
                self.busy = False
            if not ran:
                return False
            self.queue.pop(0)
            self.run += 1
            moved.notify_all()
        return self.run >= upto

    def force(self, upto=None):
        """Run operations, waiting for other ranks where need be."""
        with _world:
            upto = self.given if upto is None else upto
            deadline = time.monotonic() + WAIT_SECONDS
            while not self.advance(upto):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"stream {self.ptr} is stuck at operation {self.run + 1} of {self.given}")
                moved.wait(0.05)

    def synchronize(self):
        log.append((threading.get_ident(), self.ptr, "synchronize", self.ptr, self.given))
        self.force()
        self.seen_by_host = self.counter
        _seen_by_host(self, self.given)

    @property
    def done(self):
        return not self.queue


class Event:
    """A CUDA event."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.stream, self.number, self.asked, self.timed = None, 0, 0, not disable_timing
        self.seen_compute, self.waited, self.at = 0, {}, None

    def record(self, stream=None):
        stream = stream or current_stream()
        self.stream, self.number, self.asked, self.at = stream, stream.given, 0, None
        self.seen_compute = stream.counter if stream.is_current else stream.seen_compute
        self.waited = dict(stream.waited)
        log.append((threading.get_ident(), stream.ptr, "record", stream.ptr, self.number))
        if stream.is_current:
            self.at = time.perf_counter()
        elif self.timed:
            stream.append(self._stamp)
            self.number = stream.given

    def _stamp(self):
        self.at = time.perf_counter()
        return True

    def force(self):
        self.stream.force(self.number)

    def synchronize(self):
        log.append((threading.get_ident(), self.stream.ptr, "synchronize", self.stream.ptr, self.number))
        self.force()
        _seen_by_host(self.stream, self.number)

    @property
    def done(self):
        """False a few times, as if the device were busy; then what the stream was given runs."""
        self.asked += 1
        with _world:
            late = self.stream.run < self.number
            if late and (self.asked < EAGERNESS or not self.stream.advance(self.number)):
                return False
        _seen_by_host(self.stream, self.number)
        return True


def _seen_by_host(stream, number):
    """The host has seen a stream's operation end: whatever it enqueues from now on comes later."""
    current = current_stream()
    current.waited[stream] = max(current.waited.get(stream, 0), number)


def current_stream():
    """The thread's compute stream."""
    stream = getattr(_thread, "stream", None)
    return Stream().use() if stream is None else stream


def get_elapsed_time(start, end):
    """Milliseconds between two events."""
    for event in (start, end):
        if not event.timed:
            raise RuntimeError("an event without timing")
        event.force()
    return (end.at - start.at) * 1e3
