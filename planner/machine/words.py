"""Datasheet words: a machine from one line such as `a100-80gb,per-host=8,network=200GB/s`."""

from __future__ import annotations

import math
import re
from typing import Any

from planner.errors import MachineError
from planner.machine.check import check_machine
from planner.machine.figures import DATASHEET_LOG_SIGMA, Machine

_PREFIXES = {
    "": 1.0,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

# word: (group, figure, pattern of the unit, example)
_WORDS = {
    "per-host": ("host", "devices", "", "8"),
    "network": ("link_between_hosts", "shared_bandwidth_bytes_per_second", "rate", "200GB/s"),
    "network-latency": ("link_between_hosts", "latency_seconds", "seconds", "5us"),
    "in-host": ("link_in_host", "bandwidth_bytes_per_second", "rate", "300GB/s"),
    "memory": ("device", "memory_bytes", "bytes", "80GiB"),
    "per-device": ("host", "ranks_per_device", "", "2"),
    "price": ("device", "dollars_per_hour", "", "2.5"),
}
_COUNTS = ("per-host", "per-device")
_UNITS = {
    "": r"()",
    "rate": r"([KMGT]i?)?([Bb])(?:/s|ps)",
    "bytes": r"([KMGT]i?)?(B)",
    "seconds": r"(us|ms|s)",
}


def apply_words(tree: dict[str, Any], words: str) -> Machine:
    """Return the machine of `device[,word=value]...`, given the tables of the device's profile.

    `network` is the bandwidth of one host, all its network cards together. The interval is wide: nothing was fitted.

    Raises:
        MachineError: an unknown word, one given twice, or a value without the unit that the word needs.
    """
    origin = f"datasheet words '{words}'"
    options = [part.strip().partition("=")[::2] for part in words.split(",")[1:]]
    given = [word for word, _ in options]
    for word, text in options:
        if given.count(word) > 1:
            msg = f"{origin}: '{word}' is given {given.count(word)} times; give one value"
            raise MachineError(msg)
        if word not in _WORDS:
            msg = f"{origin}: unknown word '{word}'; use {', '.join(_WORDS)}, each followed by =VALUE"
            raise MachineError(msg)
        group, figure, unit, example = _WORDS[word]
        number = _quantity(text, unit)
        if number is None or (word in _COUNTS and number != int(number)):
            msg = f"{origin}: {word}={text} is not a positive figure with its unit; write it like {word}={example}"
            raise MachineError(msg)
        tree[group][figure] = int(number) if word in _COUNTS else number
        if word == "price":
            tree[group]["price_provenance"] = "datasheet words"
        else:
            tree[group]["provenance"] = f"{word} from datasheet words; else {tree[group]['provenance']}"
    network = tree["link_between_hosts"]
    if any(word == "network" for word, _ in options):
        # One network card per device is the usual build; a rank alone on its host cannot use its neighbours' cards.
        network["bandwidth_bytes_per_second"] = network["shared_bandwidth_bytes_per_second"] / tree["host"]["devices"]
    tree["name"] = words
    tree["residuals"] = {"provenance": f"{origin}: nothing fitted", "step_log_sigma": DATASHEET_LOG_SIGMA}
    return check_machine(tree, origin)


def _quantity(text: str, unit: str) -> float | None:
    """Parse a positive number with a unit into bytes, bytes per second or seconds; bits become bytes."""
    match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?)\s*" + _UNITS[unit], text.strip())
    if match is None:
        return None
    number = float(match[1])
    if unit == "seconds":
        number *= _SECONDS[match[2]]
    elif unit:
        number *= _PREFIXES[match[2] or ""] / (8 if match[3] == "b" else 1)
    return number if 0 < number < math.inf else None
