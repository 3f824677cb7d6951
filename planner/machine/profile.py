"""Machine profiles as TOML files: found, read, merged with the profile they extend, and written."""

from __future__ import annotations

import importlib.resources
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from planner.errors import DataError, MachineError
from planner.files import write_whole
from planner.machine.check import check_machine
from planner.machine.figures import Machine
from planner.machine.words import apply_words

GENERIC_PROFILE = "cpu-generic"


def user_profile_path() -> Path:
    """Return where `planner profile` keeps the profile measured on this machine (XDG base directory)."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "meshwright" / "machine.toml"


def machine_names() -> tuple[str, ...]:
    """Return the names of the shipped profiles, sorted."""
    folder = importlib.resources.files("profiles")
    return tuple(sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".toml")))


def load_machine(source: str | Path | None = None) -> Machine:
    """Load a machine by profile name, file path or datasheet words; by default this machine's own.

    Args:
        source: a shipped name, a path to a TOML file, datasheet words (`'a100-80gb,per-host=8,network=200GB/s'`: a
            device and the bandwidth per host), or None for the profile measured here, else the shipped generic one.

    Raises:
        MachineError: no such profile, or a malformed one; the message names the file, the figure and the remedy.
    """
    if source is None:
        path = user_profile_path()
        return load_machine(path if path.is_file() else GENERIC_PROFILE)
    text = str(source)
    if isinstance(source, str) and ("," in text or "=" in text) and not Path(text).exists():
        name = text.split(",", maxsplit=1)[0].strip()
        return apply_words(_read_tree(name, ()), text)
    return check_machine(_read_tree(text, ()), f"machine profile {text}")


def dump_machine(machine: Machine, path: str | Path, extends: str | None = None) -> None:
    """Write a profile as a TOML file that `load_machine` reads back to an equal value.

    Args:
        machine: the profile.
        path: the file; folders are made.
        extends: a shipped profile; then only what differs from it is written.

    Raises:
        DataError: the file cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {target.parent}: {error.strerror}; choose a writable file with -o") from None
    write_whole(target, render_machine(machine, extends).encode())


def render_machine(machine: Machine, extends: str | None = None) -> str:
    """Return a profile as TOML text; with `extends`, what differs from that profile."""
    tree = _without_none(msgspec.to_builtins(machine))
    if extends is not None:
        base = _without_none(msgspec.to_builtins(load_machine(extends)))
        tree = {"extends": extends, "name": tree["name"], **_difference(tree, base)}
    return "\n".join(_toml_table(tree, "")).strip() + "\n"


def base_profile(source: str | Path) -> str | None:
    """Return the profile that a profile's file extends, None where it stands alone.

    Raises:
        MachineError: no such profile.
    """
    load_machine(source)
    shipped = importlib.resources.files("profiles") / f"{source}.toml"
    text = shipped.read_text(encoding="utf-8") if shipped.is_file() else Path(source).read_text(encoding="utf-8")
    return tomllib.loads(text).get("extends")


def _difference(tree: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of `tree` that `base` lacks or has otherwise, table by table."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            if inner := _difference(value, below):
                found[key] = inner
        elif value != below:
            found[key] = value
    return found


def _read_tree(source: str, seen: tuple[str, ...]) -> dict[str, Any]:
    """Read a profile's tables, with those of the profile it extends beneath."""
    if source in seen:
        msg = f"machine profile {source} extends itself ({' -> '.join((*seen, source))}); remove one 'extends' line"
        raise MachineError(msg)
    shipped = importlib.resources.files("profiles") / f"{source}.toml"
    try:
        if re.fullmatch(r"[\w.-]+", source) and shipped.is_file():
            tree = tomllib.loads(shipped.read_text(encoding="utf-8"))
        else:
            tree = tomllib.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        msg = (
            f"no machine '{source}': neither a shipped profile nor a readable file; "
            f"use one of {', '.join(machine_names())}, or measure this machine with 'planner profile'"
        )
        raise MachineError(msg) from error
    except tomllib.TOMLDecodeError as error:
        msg = f"machine profile {source} is not valid TOML: {error}; correct that line"
        raise MachineError(msg) from error
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        msg = f"machine profile {source}: extends is {base!r}; give the name of one profile"
        raise MachineError(msg)
    return _merge(_read_tree(base, (*seen, source)), tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the entries of `over` in place of its own, table by table."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _without_none(tree: Any) -> Any:
    """Return the tree without the entries that are None: TOML has no null."""
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return [_without_none(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _toml_table(table: dict[str, Any], path: str) -> list[str]:
    """Return the lines of one table: its scalars first, then its tables."""
    is_table = {key: isinstance(value, dict) for key, value in table.items()}
    lines = [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in table.items() if not is_table[key]]
    lines = ["", f"[{path}]", *lines] if path and (lines or not table) else lines
    for key, value in table.items():
        if is_table[key]:
            lines += _toml_table(value, f"{path}.{_toml_key(key)}".strip("."))
    return lines


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    """Return a scalar, array or inline table as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        if value and isinstance(value[0], dict):
            return "[\n" + "".join(f"  {_toml_value(item)},\n" for item in value) + "]"
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # A JSON string is a TOML basic string, save that TOML wants DEL escaped.
    text = msgspec.json.encode(value).decode()
    return text.replace("\x7f", "\\u007f") if isinstance(value, str) else text
