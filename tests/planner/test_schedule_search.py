"""The orders found by search: against the zero-bubble paper's bubble rates and against the linear program's optimum."""

import contextlib
import csv
import itertools
import random
from pathlib import Path

import pytest

from planner.errors import ScheduleError
from planner.schedule import Durations, check, generate
from planner.schedule.solve import lower_bound_seconds, solve
from planner.schedule.words import Problem, time_words
from planner.schedule.zb_auto import automatic
from planner.simulate import ScheduleReplay, replay_schedule

RATES = Path(__file__).parents[1] / "data" / "zero_bubble_bubble_rates.csv"
CHUNKS = {"1.5B": 3, "6.2B": 4, "14.6B": 3, "28.3B": 2}
ROWS = list(csv.DictReader(RATES.read_text().splitlines()))
LARGEST = {("28.3B", "256")}  # takes seconds, and says what the smaller ones say


def rate(result: ScheduleReplay) -> float:
    """The paper's bubble rate: of the longest span of a rank, the share that is not work."""
    cost = float(result.span_seconds.max())
    return (cost - result.ideal_seconds) / cost


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}-{row['m']}")
def test_bubble_rates_of_the_zero_bubble_paper(row: dict[str, str]) -> None:
    p, m, v = int(row["p"]), int(row["m"]), CHUNKS[row["model"]]
    f, i, w, comm = (float(row[f"T_{key}_ms"]) * 1e-3 for key in ("F", "B", "W", "comm"))
    durations = Durations(f, i, w, latency_seconds=comm)
    per_chunk = Durations(f / v, i / v, w / v, latency_seconds=comm)

    def replayed(name: str, v: int = 1, costs: Durations = durations) -> ScheduleReplay:
        schedule = generate(name, num_ranks=p, num_micro_batches=m, num_model_chunks=v, durations=costs)
        return replay_schedule(schedule, costs)

    assert rate(replayed("1f1b")) == pytest.approx(float(row["bubble_1F1B"]), abs=1e-4)
    assert rate(replayed("interleaved", v, per_chunk)) == pytest.approx(float(row["bubble_1F1B_I"]), abs=0.005)
    printed = 0.5001e-4  # the paper prints four digits
    for name, column in (("zb-h1", "bubble_ZB_H1"), ("zb-h2", "bubble_ZB_H2")):
        assert rate(replayed(name)) == pytest.approx(float(row[column]), abs=printed)
    if (row["model"], row["m"]) in LARGEST:
        return
    for name, column, limit in (("zb-1p", "bubble_ZB_1p", p), ("zb-2p", "bubble_ZB_2p", 2 * p)):
        result = replayed(name)
        assert rate(result) <= float(row[column]) + printed
        assert max(result.peak_in_flight) <= limit
        if name == "zb-1p":
            assert max(result.peak_until_w) <= limit


def small_problems(count: int) -> list[Problem]:
    rng = random.Random(20261120)
    problems = []
    for _ in range(count):
        p, m = rng.choice([(2, 3), (2, 4), (3, 3), (3, 4), (4, 3)])
        uneven = rng.random() < 0.3
        f, i, w = ([round(rng.uniform(*span), 2) for _ in range(p)] for span in ((0.8, 1.2), (0.6, 1.5), (0.4, 1.2)))
        durations = Durations(*((f, i, w) if uneven else (f[0], i[0], w[0])), latency_seconds=rng.choice([0, 0.1, 0.3]))
        limit, share = rng.choice([1, 2, p, 2 * p]), rng.choice([1.0, 0.5])
        objective = rng.choice(["span", "makespan"])
        problems.append(Problem.of(p, m, durations, limit, weight_share=share, objective=objective))  # type: ignore[arg-type]
    return problems


@pytest.mark.parametrize("problem", small_problems(24))
def test_heuristic_is_within_two_percent_of_the_optimum(problem: Problem) -> None:
    durations = Durations(
        problem.seconds["F"], problem.seconds["I"], problem.seconds["W"], latency_seconds=problem.latency_seconds
    )
    found = automatic("custom", problem)
    check(found)
    words = [[step.op for step in program] for program in found.programs]
    assert all(map(problem.fits, words))
    cost = time_words(problem, words).cost(problem)
    best = solve(
        problem.num_ranks,
        problem.num_micro_batches,
        durations,
        problem.memory_limit,
        weight_share=problem.weight_share,
        objective=problem.objective,
    )
    check(best.schedule)
    assert best.bound_seconds >= best.seconds * (1 - 1e-5), "the linear program proves its optimum"
    assert best.seconds <= cost <= 1.02 * best.seconds
    result = replay_schedule(best.schedule, durations)
    replayed = result.makespan_seconds if problem.objective == "makespan" else float(result.span_seconds.max())
    assert replayed == pytest.approx(best.seconds)


def test_the_linear_program_beats_a_bad_start() -> None:
    """The program does not merely confirm what the heuristic says: from a sequential order it finds the optimum."""
    from planner.schedule.solve import _Program

    problem = Problem.of(2, 3, Durations(1.0, 1.1, 0.6), 4, objective="makespan")
    sequential = time_words(problem, [list("FIWFIWFIW")] * 2).cost(problem)
    words, bound = _Program(problem, sequential).solve(20.0)
    assert words is not None
    optimum = time_words(problem, words).cost(problem)
    assert optimum == pytest.approx(bound, rel=1e-5)
    assert optimum == pytest.approx(solve(2, 3, Durations(1.0, 1.1, 0.6), 4).seconds)
    assert optimum < 0.9 * sequential


def legal_words(micro_batches: int) -> list[list[str]]:
    """Every order of one rank's F, I and W in which each I follows its F and each W its I."""
    words = [""]
    for _ in range(3 * micro_batches):
        words = [
            word + op
            for word in words
            for op, before in (("F", ""), ("I", "F"), ("W", "I"))
            if word.count(op) < (word.count(before) if before else micro_batches)
        ]
    return [list(word) for word in words]


@pytest.mark.parametrize("objective", ["span", "makespan"])
@pytest.mark.parametrize(("limit", "share"), [(1, 1.0), (2, 1.0), (2, 0.5), (6, 1.0)])
def test_solution_is_the_best_of_all_orders(objective: str, limit: int, share: float) -> None:
    durations = Durations([1.0, 1.3], [1.1, 0.9], [0.6, 0.8], latency_seconds=0.15)
    problem = Problem.of(2, 3, durations, limit, weight_share=share, objective=objective)  # type: ignore[arg-type]
    words = [word for word in legal_words(3) if problem.fits(word)]
    costs = []
    for pair in itertools.product(words, repeat=2):
        with contextlib.suppress(ScheduleError):
            costs.append(time_words(problem, pair).cost(problem))
    found = solve(2, 3, durations, limit, weight_share=share, objective=objective)  # type: ignore[arg-type]
    assert found.seconds == pytest.approx(min(costs))
    assert limit == 1 or found.seconds < max(costs)


@pytest.mark.parametrize("objective", ["span", "makespan"])
def test_less_memory_never_helps(objective: str) -> None:
    durations = Durations(1.0, 1.2, 0.7, latency_seconds=0.1)
    costs = [solve(3, 3, durations, limit, objective=objective).seconds for limit in (1, 2, 3, 6)]  # type: ignore[arg-type]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_larger_problems_go_to_the_heuristic() -> None:
    durations = Durations(1.0, 1.0, 0.8, latency_seconds=0.05)
    solution = solve(6, 24, durations, 12, objective="span")
    problem = Problem.of(6, 24, durations, 12, objective="span")
    assert solution.bound_seconds == lower_bound_seconds(problem) == pytest.approx(24 * 2.8)
    assert solution.bound_seconds <= solution.seconds < 1.06 * solution.bound_seconds


def test_words_that_wait_for_each_other_are_refused() -> None:
    problem = Problem.of(2, 2, Durations(), 4)
    with pytest.raises(ScheduleError, match="deadlock"):
        time_words(problem, [list("FIWFIW"), list("FFIIWW")])
