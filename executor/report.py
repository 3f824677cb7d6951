"""What rank 0 shows a person: a progress bar with the loss, and the figures at the end. Only rank 0 imports rich."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from executor.check import CheckReport
from executor.runtime import StepResult
from planner.trace import Measurement

GIB = 2**30


class TrainingProgress:
    """A progress bar on stderr; where stderr is no terminal, a line per step."""

    def __init__(self, steps: int, warmup: int) -> None:
        self._console = Console(stderr=True)
        self._total = steps + warmup
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"), TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task: TaskID | None = None

    def __enter__(self) -> TrainingProgress:
        """Show the bar."""
        self._bar.start()
        self._task = self._bar.add_task("warm-up", total=self._total, loss="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()

    def step(self, number: int, result: StepResult, *, timed: bool) -> None:
        """Show one step."""
        what = "training" if timed else "warm-up"
        if self._console.is_terminal and self._task is not None:
            self._bar.update(self._task, completed=number + 1, description=what, loss=f"{result.loss:.4f}")
            return
        mark = "" if timed else "  (warm-up)"
        self._console.print(
            f"step {number + 1}/{self._total}  loss {result.loss:.4f}  {result.seconds * 1e3:.1f} ms{mark}",
            highlight=False,
        )


class SurveyProgress:
    """The progress of a survey of the machine on stderr; where stderr is no terminal, a line per part."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task: TaskID | None = None

    def __enter__(self) -> SurveyProgress:
        """Show the bar."""
        self._bar.start()
        self._task = self._bar.add_task("profile", total=1.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()

    def tell(self, what: str, share: float) -> None:
        """Show what is being timed, and the share of the survey that is done."""
        if self._console.is_terminal and self._task is not None:
            self._bar.update(self._task, completed=share, description=what)
        if not self._console.is_terminal or share == 1.0:
            self._console.print(f"{share:4.0%}  {what}", highlight=False)


def show_measurement(measured: Measurement, written: str) -> None:
    """Print the figures of a run on stderr."""
    console = Console(stderr=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    first, last = measured.losses[0], measured.losses[-1]
    worst = max(range(len(measured.peak_bytes)), key=lambda rank: measured.peak_bytes[rank])
    parts = ", ".join(
        f"{part} {_bytes(values[worst])}" for part, values in measured.peak_parts.items() if values[worst]
    )
    mesh = measured.plan.mesh
    rows = [
        ("mesh", f"pp={mesh.pp} dp={mesh.dp} cp={mesh.cp} tp={mesh.tp}"),
        ("step", f"{measured.step_seconds * 1e3:.1f} ms, median of {len(measured.steps)}"),
        ("tokens/s", f"{measured.tokens_per_second:,.0f}"),
        ("loss", f"{_loss(first)} first, {_loss(last)} last"),
        ("MFU", f"{measured.mfu:.1%} of {measured.machine.peak_flops_per_second / 1e9:.0f} GFLOP/s per rank"),
        ("bubble", f"{measured.bubble_fraction:.1%}"),
        ("communication", f"{measured.exposed_communication_seconds * 1e3:.1f} ms exposed, mean of ranks"),
        ("waiting", f"{measured.wait_seconds * 1e3:.1f} ms for slower ranks, mean of ranks"),
        ("peak memory", f"{_bytes(measured.peak_bytes[worst])} on rank {worst}: {parts}"),
    ]
    if measured.loss_scales:
        skipped = f"{len(measured.skipped_steps)} of {len(measured.losses)} steps skipped"
        rows.append(("loss scale", f"{measured.loss_scales[-1]:g} in the last step, {skipped}"))
    if measured.environment.get("emulated"):
        rows.append(("note", f"{measured.plan.training.precision} was emulated: times mean nothing"))
    if measured.environment.get("oversubscribed"):
        rows.append(("note", "more threads than cores: ranks take turns, times say little about the layout"))
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)
    console.print(f"wrote {written}", highlight=False)


def show_check(report: CheckReport) -> None:
    """Print the verdict of a check on stderr and its figure on stdout."""
    console = Console(stderr=True)
    table = Table(box=None, pad_edge=False)
    for column in ("quantity", "tensor", "difference"):
        table.add_column(column)
    for one in report.differences[:5]:
        scale = " of the global gradient norm" if one.absolute else ""
        table.add_row(one.quantity, one.tensor, f"{one.difference:.2e}{scale}")
    console.print(table, highlight=False)
    console.print(f"loss {report.loss:.10g}, on one rank {report.reference_loss:.10g}", highlight=False)
    verdict = "passed" if report.passed else "FAILED"
    worst = report.largest
    print(
        f"{verdict}: largest relative difference {worst.difference:.2e} ({worst.quantity} of {worst.tensor}), "
        f"limit {worst.limit:g} in {report.dtype}"
    )


def _loss(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4f}"


def _bytes(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
