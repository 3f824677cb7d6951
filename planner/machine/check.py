"""Checks of a profile's tables: types, finite figures, keys that some formula reads, transports that fit the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import msgspec

from planner.errors import MachineError
from planner.machine.figures import Collective, Machine, Precision
from planner.machine.links import Staging, Transport

_RETIRED = ("residuals", "memory_log_sigma")
"""A figure that was never fitted and that nothing reads; profiles that `planner profile` wrote before hold it."""


def check_machine(tree: dict[str, Any], where: str) -> Machine:
    """Check the tables of a profile and return the Machine.

    Raises:
        MachineError: a figure is unknown, missing, of the wrong type or not finite; the message starts with `where`.
    """
    tree = _without_retired(tree)
    try:
        machine = msgspec.convert(tree, Machine)
    except msgspec.ValidationError as error:
        msg = f"{where}: {error}; compare with a shipped profile ('planner machines' lists them)"
        raise MachineError(msg) from error
    for path, value in _numbers(tree, ""):
        if not math.isfinite(value):
            msg = f"{where}: {path} is {value}; give a finite figure or leave it out"
            raise MachineError(msg)
    _check_vocabulary(machine, where)
    return machine


def _without_retired(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tables without the one figure that is accepted and ignored."""
    table, figure = _RETIRED
    below = tree.get(table)
    if not isinstance(below, dict) or figure not in below:
        return tree
    return tree | {table: {key: value for key, value in below.items() if key != figure}}


def _check_vocabulary(machine: Machine, where: str) -> None:
    """Refuse table keys that no formula would ever read: a misspelt key must not be a silent default."""
    precisions = {"default", *get_args(Precision)}
    operations = {"default", "send", *get_args(Collective)}
    device = machine.device
    allowed: list[tuple[str, Mapping[str, object], set[str]]] = [
        ("device.gemm", device.gemm, precisions),
        ("device.attention_fraction", device.attention_fraction, precisions),
        ("device.attention_backward_fraction", device.attention_backward_fraction, precisions),
        ("link_in_host.efficiency", machine.link_in_host.efficiency, operations),
        ("link_between_hosts.efficiency", machine.link_between_hosts.efficiency, operations),
        ("link_in_host.in_place", machine.link_in_host.in_place, operations),
        *_transport_tables(machine, operations),
        ("algorithms", machine.algorithms, operations - {"send"}),
    ]
    for group, table, names in allowed:
        for key in table:
            if key not in names:
                msg = f"{where}: {group} has the unknown key '{key}'; use {', '.join(sorted(names))}"
                raise MachineError(msg)
    _check_transports(machine, where)
    if "default" not in device.gemm:
        msg = f"{where}: the figure device.gemm.default.fraction is missing; add the table [device.gemm.default]"
        raise MachineError(msg)
    if any(tile for curve in device.gemm.values() for tile in curve.tiles) and device.multiprocessors is None:
        msg = f"{where}: device.gemm has tiles but device.multiprocessors is missing; add it or remove the tiles"
        raise MachineError(msg)


def _transport_tables(machine: Machine, operations: set[str]) -> list[tuple[str, Mapping[str, object], set[str]]]:
    """The tables of the links that transports have of their own, with the keys that they may have."""
    return [
        (f"transports.{name}.{tier}.efficiency", link.efficiency, operations)
        for name, figures in machine.transports.items()
        for tier, link in (("link_in_host", figures.link_in_host), ("link_between_hosts", figures.link_between_hosts))
        if link is not None
    ]


def _check_transports(machine: Machine, where: str) -> None:
    """Transports fit the device, and exactly the staged one has copies."""
    staged: list[tuple[Transport, str, Staging | None]] = [(machine.transport_in_use, "staging", machine.staging)]
    staged += [(name, f"transports.{name}.staging", each.staging) for name, each in machine.transports.items()]
    for name, path, staging in staged:
        if not machine.suits(name):
            msg = f"{where}: transport {name} is not one of a {machine.device.kind}; remove it"
            raise MachineError(msg)
        if (name == "staged") != (staging is not None):
            wrong = f"lacks the figures {path}; add them" if staging is None else f"copies nothing; remove {path}"
            raise MachineError(f"{where}: transport {name} {wrong}")


def _numbers(tree: Any, path: str) -> list[tuple[str, float]]:
    """Return every float in a tree of tables with its dotted path."""
    if isinstance(tree, float):
        return [(path, tree)]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [found for key, value in items for found in _numbers(value, f"{path}.{key}".strip("."))]
