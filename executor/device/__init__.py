"""Device: where a rank keeps its arrays and runs its kernels, the host or one CUDA device.

    base    the Device protocol and the host
    cuda    a CUDA device through CuPy: memory, copies, streams, events, what it refuses
    choice  from `--device` and a rank to its device

Theory of operation. Everything above this package is written once, for both: arrays answer NumPy's functions
(`__array_function__`, `__array_ufunc__`), and what they do not answer is here. On the host every call below is what
the code did before there was a device, or nothing.

A CUDA device has one *compute stream*, on which all kernels and all array functions run, in program order, and streams
of its own for copies to the host, copies from it, and for each direction of NCCL messages. The host enqueues and runs
ahead; it waits only where MPI needs bytes in host memory, and at the end of a step. Four rules keep streams apart:

1. *The arena belongs to the compute stream.* Taking and releasing a block are points in that stream's order, so a block
   given back may be handed out again at once: who writes it next comes later on the same stream.
2. *Another stream starts behind the compute stream*: before its first operation on a block it waits for an event that
   the compute stream recorded after the block was taken and, if it is read, after it was written (`Device.fork`).
3. *The compute stream waits before it uses what another stream wrote, or overwrites what another stream reads*: for an
   event recorded behind the operation (`Device.join`).
4. *A block that another stream uses is released only after a join, or when the host has seen the operation's event
   done.* A send holds its block until the host has seen it complete (`Transfers.progress`); a receive holds it by the
   micro-batch, which reads it after a join; a gradient reduction ends with a join before its gradient is given back.

Rule 4 lets completed sends go late, when the host looks. So that the host does not run so far ahead that unseen sends
fill the memory, a rank of a pipeline stays at most `MAX_AHEAD` instructions before its own compute stream. That wait is
for this device's own work and cannot deadlock: with a lead of none it is the order in which a CPU rank runs.

The loss stays on the device until the step's last task, which brings it to the host. The gradient norm comes to the
host where it is clipped by, once per step: the only point between first forward and last update where the host waits
under NCCL. A device-side clip would save one launch gap (tens of microseconds) and cost every optimizer kernel a read
of a device scalar, and dynamic loss scaling needs the host's verdict at that very point.

Spans are pairs of CUDA events, read after the step. A task of the compute stream begins when that stream reaches it, so
that the time the stream waits for another, or for a host that is late, is part of the task that waited.
"""

from executor.device.base import HOST, Device, DeviceMemoryError, Event, Flight, HostDevice
from executor.device.choice import open_device

__all__ = ["HOST", "Device", "DeviceMemoryError", "Event", "Flight", "HostDevice", "open_device"]
