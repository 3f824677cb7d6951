"""Decides how to split a transformer over workers and predicts what that costs.

    import planner

    machine = planner.load_machine()
    found = planner.suggest(planner.with_sizes(layers=12), 8, machine, global_batch_size=16)
    planner.dump_plan(found.plans[0].plan, Path("best.json"))

    measurement = planner.load_measurement(Path("measured.json"))
    comparison = planner.compare(planner.predict(measurement.plan, machine), measurement)

These are the calls that the command line makes. Names are loaded on first use, so that importing the package is fast.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.compare import Comparison as Comparison
    from planner.compare import compare as compare
    from planner.errors import MeshwrightError as MeshwrightError
    from planner.machine import Machine as Machine
    from planner.machine import load_machine as load_machine
    from planner.mesh import Mesh as Mesh
    from planner.model import ModelSpec as ModelSpec
    from planner.model import with_sizes as with_sizes
    from planner.model.huggingface import from_huggingface as from_huggingface
    from planner.model.presets import preset as preset
    from planner.plan import Plan as Plan
    from planner.plan import Training as Training
    from planner.plan import dump_plan as dump_plan
    from planner.plan import load_plan as load_plan
    from planner.plan import make_plan as make_plan
    from planner.predict import predict as predict
    from planner.search.suggest import Suggestion as Suggestion
    from planner.search.suggest import suggest as suggest
    from planner.trace import Measurement as Measurement
    from planner.trace import Prediction as Prediction
    from planner.trace import dump_record as dump_record
    from planner.trace import load_measurement as load_measurement
    from planner.trace import load_prediction as load_prediction

_HOME = {
    "Comparison": "compare",
    "compare": "compare",
    "MeshwrightError": "errors",
    "from_huggingface": "model.huggingface",
    "Machine": "machine",
    "load_machine": "machine",
    "Mesh": "mesh",
    "ModelSpec": "model",
    "with_sizes": "model",
    "preset": "model.presets",
    "Plan": "plan",
    "Training": "plan",
    "dump_plan": "plan",
    "load_plan": "plan",
    "make_plan": "plan",
    "predict": "predict",
    "Suggestion": "search.suggest",
    "suggest": "search.suggest",
    "Measurement": "trace",
    "Prediction": "trace",
    "dump_record": "trace",
    "load_measurement": "trace",
    "load_prediction": "trace",
}
"""Public name -> the module that owns it."""

__all__ = list(_HOME)


class _Package(ModuleType):
    """The package as a module whose public names load their modules on first use."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return import_module("importlib.metadata").version("meshwright")
        if name not in _HOME:
            raise AttributeError(f"module 'planner' has no attribute {name!r}")
        value = getattr(import_module(f"planner.{_HOME[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep `planner.predict` and `planner.compare` functions when the modules of these names are imported."""
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOME})


sys.modules[__name__].__class__ = _Package
