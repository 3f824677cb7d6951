"""Each task kind bound to its kernel: fetch arrays, index data and dropout by global position, call the kernel.

A binding is a function of the rank's step context and one task. It allocates nothing; the runtime has made room for
what the task writes.
"""

from executor.ops import attention, layers, loss  # importing them fills the table
from executor.ops.attention import view_of
from executor.ops.context import BINDINGS, Binding, Context, MicroBatch

__all__ = ["BINDINGS", "Binding", "Context", "MicroBatch", "attention", "layers", "loss", "view_of"]
