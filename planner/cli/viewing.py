"""The commands that show: show, compare, schedule, models, machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Group

from planner.cli.commands import CompareOptions, NoOptions, ScheduleOptions, ShowOptions
from planner.cli.frame import Answer, say
from planner.compare import compare
from planner.documents import Document, is_prediction, load_document, load_record
from planner.errors import DataError, ScheduleError
from planner.files import write_whole
from planner.machine import user_profile_path
from planner.plan import Plan
from planner.report.comparison import comparison_document, comparison_view
from planner.report.figure import timeline_svg
from planner.report.lists import (
    machines_document,
    machines_view,
    models_document,
    models_view,
    schedule_document,
    schedule_view,
)
from planner.report.page import comparison_page
from planner.report.perfetto import trace_events
from planner.report.plan import algebra_document, algebra_view, plan_document, plan_view
from planner.report.record import record_document, record_title, record_view
from planner.report.timeline import RecordTimelines
from planner.resolve import parse_durations, read_text
from planner.schedule import NAMES, Schedule, check, from_csv, generate, model_chunks, to_csv
from planner.simulate import replay_schedule

if TYPE_CHECKING:
    from planner.schedule.solve import Solution


def show_files(options: ShowOptions) -> Answer:
    """Show one file or two, and write their timelines where asked."""
    paths = [path for path in (options.first, options.second) if path is not None]
    if not paths and not options.algebra:
        raise DataError("planner show needs a plan, prediction or measurement file, or --algebra; name one")
    files = {path: load_document(Path(path)) for path in paths}
    records = {path: each for path, each in files.items() if not isinstance(each, Plan)}
    titles = [record_title(each, path) for path, each in records.items()]
    if (options.trace or options.svg) and not records:
        raise DataError("--trace and --svg draw predictions and measurements; name one of those files")
    if options.trace:
        _write(options.trace, msgspec.json.encode(trace_events(titles, list(records.values()))))
    if options.svg:
        _write(options.svg, timeline_svg(titles, list(records.values())).encode())

    def document() -> Any:
        documents: list[Any] = [_document(each) for each in files.values()]
        if options.algebra:
            documents.append(algebra_document())
        return documents[0] if len(documents) == 1 else documents

    def view() -> Any:
        parts = [algebra_view()] if options.algebra else []
        if len(records) == 2:
            return Group(*parts, RecordTimelines(titles, list(records.values())))
        return Group(*parts, *(_view(each, path) for path, each in files.items()))

    return Answer(document, view)


def _document(file: Document) -> Any:
    return plan_document(file) if isinstance(file, Plan) else record_document(file)


def _view(file: Document, path: str) -> Any:
    return plan_view(file) if isinstance(file, Plan) else record_view(file, path)


def _write(path: str, content: bytes) -> None:
    write_whole(Path(path), content)
    say(f"wrote {path}")


def compare_files(options: CompareOptions) -> Answer:
    """Compare two records, and draw both as a page where asked."""
    first, second = load_record(Path(options.predicted)), load_record(Path(options.measured))
    if is_prediction(second) and not is_prediction(first):
        first, second = second, first  # as `compare` takes them
    comparison = compare(first, second)
    if options.html:
        _write(options.html, comparison_page(comparison, first, second).encode())
    return Answer(lambda: comparison_document(comparison), lambda: comparison_view(comparison))


def show_schedule(options: ScheduleOptions) -> Answer:
    """Generate, solve for or read one schedule, check and replay it."""
    bound_seconds = None
    if options.name == "custom":
        schedule, _, bound_seconds = _solved(options)
    else:
        schedule = _schedule(options)
    replay = replay_schedule(schedule, parse_durations(options.durations))
    return Answer(
        lambda: schedule_document(replay, bound_seconds),
        lambda: to_csv(schedule).rstrip("\n") if options.csv else schedule_view(replay, bound_seconds),
    )


def _solved(options: ScheduleOptions) -> Solution:
    """The shortest order of one stage per rank; without a limit every activation may be held."""
    from planner.schedule.solve import solve  # noqa: PLC0415 - scipy takes a third of a second to load

    ranks, chunks = _ranks_and_chunks(options)
    if chunks > 1:
        raise ScheduleError(
            f"--stages {ranks * chunks} on {ranks} ranks; a custom order has one stage a rank: give equal numbers"
        )
    count = _micro_batches(options)
    limit = float(count) if options.memory_limit is None else options.memory_limit
    return solve(ranks, count, parse_durations(options.durations), limit)


def _micro_batches(options: ScheduleOptions) -> int:
    if options.micro_batches is None:
        raise ScheduleError("--micro-batches is missing; say how many micro-batches a step has")
    return options.micro_batches


def _schedule(options: ScheduleOptions) -> Schedule:
    name = options.name
    if name not in NAMES and (name.endswith(".csv") or Path(name).is_file()):
        schedule = from_csv(read_text(name, "schedule"), num_micro_batches=options.micro_batches)
        forward_only = all(part.op == "F" for _, _, step in schedule.instructions() for part in step.flat())
        check(schedule, forward_only=forward_only, memory_limit=options.memory_limit)
        return schedule
    count = _micro_batches(options)
    ranks, chunks = _ranks_and_chunks(options)
    return generate(
        name,
        num_ranks=ranks,
        num_micro_batches=count,
        num_model_chunks=chunks,
        durations=parse_durations(options.durations),
        memory_limit=options.memory_limit,
    )


def _ranks_and_chunks(options: ScheduleOptions) -> tuple[int, int]:
    """Return the ranks and model chunks that `--stages` and `--ranks` mean; one of them may be left out."""
    usual = 1 if options.name == "custom" else model_chunks(options.name)
    for what, value in (("stages", options.stages), ("ranks", options.ranks)):
        if value is not None and value < 1:
            raise ScheduleError(f"--{what} {value} is too few; use at least 1")
    if options.ranks is None and options.stages is None:
        raise ScheduleError("--stages and --ranks are both missing; give at least one of them")
    ranks = options.ranks if options.ranks is not None else (options.stages or 0) // (usual or 1)
    stages = options.stages if options.stages is not None else ranks * (usual or 2)
    if ranks < 1 or stages % ranks:
        below = stages - stages % ranks if ranks else 0
        raise ScheduleError(
            f"--stages {stages} is no multiple of --ranks {ranks}; use {below + max(1, ranks)} stages, "
            "or a number of ranks that divides them"
        )
    return ranks, stages // ranks


def list_models(_options: NoOptions) -> Answer:
    """List models."""
    return Answer(models_document, models_view)


def list_machines(_options: NoOptions) -> Answer:
    """List machines, the one measured here first."""
    path = user_profile_path()
    own = str(path) if path.is_file() else None
    return Answer(lambda: machines_document(own), lambda: machines_view(own))
