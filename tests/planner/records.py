"""Measurements made of predictions: what a run on a machine of known figures would have written."""

import msgspec

from planner.predict import predict
from planner.trace import Measurement


def measurement_of(plan, machine, slower=None):
    """The measurement of a plan on a machine that is exactly as its profile says; `slower` changes the spans."""
    prediction = predict(plan, machine)
    fields = {
        name: getattr(prediction, name)
        for name in prediction.__struct_fields__
        if name not in ("kind", "low_seconds", "high_seconds", "warnings")
    }
    if slower is not None:
        fields["trace"] = slower(fields["trace"])
    return Measurement(
        **fields,
        steps=[prediction.step_seconds] * 3,
        losses=[5.0] * 4,
        gradient_norms=[],
        resident_bytes=[1] * plan.mesh.world_size,
        environment={},
    )


def dumped(record, path):
    """The path of a record, written."""
    path.write_bytes(msgspec.json.encode(record))
    return path
