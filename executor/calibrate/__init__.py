"""Calibration: this machine measured as the executor uses it, for the planner's cost model.

probes     small models trained on one rank, each task timed where it runs
exchanges  collectives and messages timed on groups of every size
between    the same between hosts
host       cores, memory, threads, rivals for a core
fit        figures from observations
assemble   a Machine from figures
survey     what is timed, in which order, and who works meanwhile
"""

from executor.calibrate.survey import profile

__all__ = ["profile"]
