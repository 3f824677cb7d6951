"""The errors a user can cause, each carrying the value, the limit and the remedy."""


class MeshwrightError(Exception):
    """A mistake in what the user asked for; the command line prints it once and exits with 2."""


class ModelError(MeshwrightError):
    """A model description that is inconsistent or asks for something not modelled."""


class PlanError(MeshwrightError):
    """A plan that cannot be carried out: wrong axis product, impossible layout, malformed file."""


class MachineError(MeshwrightError):
    """A machine profile that is missing, malformed or lacks a needed figure."""


class ScheduleError(MeshwrightError):
    """A pipeline schedule that breaks an ordering rule, deadlocks or exceeds its memory limit."""


class DataError(MeshwrightError):
    """A data file, plan, prediction or measurement that cannot be read or does not belong."""
