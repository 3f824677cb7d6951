"""Lowering: schedule × placed graph -> one `Program` of tasks per rank.

Theory of operation. Each stage's operators are laid out on the mesh (`stage`), which makes every collective an explicit
task, forward and backward; what a task reads and writes decides when buffers live and die (`liveness`); the
schedule's instructions then order these segments per rank, with sends, receives, gradient reductions and the optimizer
between them (`rank`). The simulator prices these tasks, the executor runs them; there is no third description.
"""

from planner.program.rank import Program, Shared, Step, lower
from planner.program.tasks import Buffer, Task, Work

__all__ = ["Buffer", "Program", "Shared", "Step", "Task", "Work", "lower"]
