"""Replay: when does everything run, given durations and the order in which ranks work?

`engine` knows tasks only, and replays schedules and lowered programs alike; `pipeline` turns a pipeline schedule and
durations into tasks, and what comes out into bubbles, peaks and the critical path.
"""

from planner.simulate.engine import Replay, TaskTable, critical_path, replay
from planner.simulate.pipeline import ScheduleReplay, replay_schedule, task_table

__all__ = ["Replay", "ScheduleReplay", "TaskTable", "critical_path", "replay", "replay_schedule", "task_table"]
