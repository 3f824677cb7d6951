"""Files: JSON read strictly, content written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from planner.errors import DataError, MeshwrightError

SCHEMA = 1
"""Of plans, predictions and measurements."""

T = TypeVar("T")


def read_json(path: Path, struct: type[T], kind: str) -> T:
    """Read a JSON file strictly into a frozen struct; errors carry the JSON path."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {kind} file {path}: {error.strerror}; name an existing file") from None
    try:
        head = msgspec.json.decode(content)
        if isinstance(head, dict):
            _check_head(head, path, kind)
        return msgspec.json.decode(content, type=struct)
    except MeshwrightError:
        raise
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, MeshwrightError):
            raise error.__cause__ from None
        raise DataError(f"{path} is not a valid {kind}: {error}; write it again with the planner") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{path} is not a whole JSON {kind}: {error}; write it again with the planner") from None


def _check_head(head: dict[str, Any], path: Path, kind: str) -> None:
    if head.get("kind", kind) != kind:
        raise DataError(f"{path} is a {head['kind']}, not a {kind}; name a {kind} file")
    schema = head.get("schema", SCHEMA)
    if isinstance(schema, int) and schema > SCHEMA:
        raise DataError(f"{path} has schema {schema}, newer than {SCHEMA}; install a newer meshwright")


def write_whole(path: Path, content: bytes) -> None:
    """Write through a temporary file in the same folder and a rename, so that no reader sees half a file.

    What a symbolic link names is replaced, never the link; devices and pipes (`/dev/null`) are written to as they are.

    Raises:
        DataError: the file cannot be written; nothing is left of it.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".{target.name}.writing"
    try:
        if target.is_dir():
            raise DataError(f"cannot write {path}: it is a folder; name a file with -o")
        if target.exists() and not target.is_file():
            target.write_bytes(content)
            return
        temporary.write_bytes(content)
        temporary.replace(target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror}; choose a writable folder with -o") from None


def output_folder(name: str) -> Path:
    """Return the folder of that name, made where there is none.

    Raises:
        DataError: it is a file, or cannot be made.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"-o {folder} cannot be a folder: {error.strerror}; name another") from None
    return folder
