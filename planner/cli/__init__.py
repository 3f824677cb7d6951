"""The command line: the only place that prints or catches. stdout is data, stderr is talk."""

from planner.cli.frame import main

__all__ = ["main"]
