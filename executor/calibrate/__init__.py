"""Calibration: this machine measured as the executor uses it, for the planner's cost model.

probes     small models trained on one rank, each task timed where it runs
exchanges  collectives and messages timed on groups of every size
between    the same between hosts
host       cores, memory, threads, rivals for a core
fit        figures from observations
assemble   a Machine from figures
survey     what is timed, in which order, and who works meanwhile

and of CUDA devices:

device_probes   the same small models, the device's time and the host's apart
copies          copy engines, for the staged transport
carried         collectives over NCCL and CUDA-aware MPI
device_machine  a Machine from these, figures in every precision
device_survey   what is timed, in which order
"""

from executor.calibrate.survey import profile

__all__ = ["profile"]
