"""The three JSON files, read by what they say they are: a plan, a prediction or a measurement."""

from __future__ import annotations

from pathlib import Path

import msgspec

from planner.errors import DataError
from planner.plan import Plan, load_plan
from planner.trace import Measurement, Prediction, Record, check_record, load_measurement, load_prediction

Document = Plan | Prediction | Measurement


class _Head(msgspec.Struct):
    kind: str = ""


def load_document(path: Path) -> Document:
    """Read a plan, a prediction or a measurement.

    Raises:
        DataError: the file cannot be read, is of no known kind, or is not a whole file of its kind.
        PlanError: a well-formed plan that cannot be carried out.
    """
    try:
        kind = msgspec.json.decode(path.read_bytes(), type=_Head).kind
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a plan, prediction or measurement file") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not a whole JSON file: {error}; write it again") from None
    if kind == "plan":
        return load_plan(path)
    if kind not in ("prediction", "measurement"):
        raise DataError(f"{path} has kind {kind!r}; name a file of kind plan, prediction or measurement")
    record = load_prediction(path) if kind == "prediction" else load_measurement(path)
    try:
        check_record(record)
    except DataError as error:
        raise DataError(f"{path}: {error}; write it again from its plan") from None
    return record


def load_record(path: Path) -> Prediction | Measurement:
    """Read a prediction or a measurement.

    Raises:
        DataError: as in `load_document`, or the file is a plan.
    """
    document = load_document(path)
    if isinstance(document, Plan):
        raise DataError(f"{path} is a plan, not a prediction or measurement; 'planner predict {path}' predicts it")
    return document


def is_prediction(record: Record) -> bool:
    """Whether a record was foreseen rather than measured."""
    return isinstance(record, Prediction)
