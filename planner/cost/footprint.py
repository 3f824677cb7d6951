"""Footprint: what a device shows beyond the tensors that a plan names: allocated, reserved, seen by nvidia-smi."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from planner.cost.measured import TimedFigures
from planner.cost.sizes import Size
from planner.machine import Machine
from planner.plan import Plan

STATE_PARTS = ("parameters", "gradients", "optimizer")


def footprint_bytes(machine: Machine, state_bytes: Size, activation_bytes: Size, groups: Size, kind: str) -> Size:
    """Return the bytes that a rank is seen to hold.

    allocated = state + activation_fraction · activations + workspaces;
    reserved = allocated · (1 + fragmentation_fraction), what PyTorch's caching allocator takes from the driver;
    nvidia-smi = reserved + context + communicators of every process group.

    Args:
        machine: the profile.
        state_bytes: parameters, gradients and optimizer state.
        activation_bytes: everything else that the program holds at its peak.
        groups: process groups with more than one rank.
        kind: "allocated", "reserved" or "nvidia-smi".
    """
    memory = machine.memory
    allocated = np.add(state_bytes, np.multiply(activation_bytes, memory.activation_fraction)) + memory.workspace_bytes
    if kind == "allocated":
        return np.asarray(allocated)[()]
    reserved = allocated * (1 + memory.fragmentation_fraction)
    if kind == "reserved":
        return np.asarray(reserved)[()]
    return np.asarray(reserved + memory.context_bytes + np.multiply(groups, memory.communicator_bytes))[()]


def process_groups(plan: Plan) -> int:
    """Return the number of process groups a rank of a plan is in that have more than one rank."""
    mesh = plan.mesh
    return sum(size > 1 for size in (mesh.tp, mesh.pp, mesh.dp, mesh.cp))


def split_parts(parts: Mapping[str, int]) -> tuple[int, int]:
    """Return (state, activation) bytes of a peak's parts."""
    state = sum(parts[part] for part in STATE_PARTS)
    return state, sum(parts.values()) - state


def device_bytes(machine: Machine, plan: Plan, parts: Mapping[str, int]) -> float:
    """Return what must fit into a rank's memory: the tensors alone on a CPU, all that nvidia-smi shows on a GPU."""
    state, activation = split_parts(parts)
    if machine.device.kind == "cpu":
        return float(state + activation)
    held = float(footprint_bytes(machine, state, activation, process_groups(plan), "nvidia-smi"))
    return held + attention_scratch_bytes(machine, plan)


def attention_scratch_bytes(machine: Machine, plan: Plan) -> float:
    """Return the scratch memory of attention kernels, where it was measured: an allocator keeps the most of a step."""
    kind = "attention_blocked" if plan.attention == "blocked" or plan.cp_kind == "ring" else "attention_plain"
    timed = TimedFigures.of(machine.device, plan.training.precision)
    figures = [timed.attention[name] for name in (kind, f"{kind}_backward") if name in timed.attention]
    model, mesh = plan.model, plan.mesh
    heads, queries = max(plan.parts.heads), max(plan.parts.seq)
    keys = queries if mesh.cp > 1 and plan.cp_kind == "ring" else model.seq_len
    pairs = float(plan.micro_batch_size * heads * queries * keys)
    return max((min(each.scratch_limit_bytes, each.scratch_bytes_per_pair * pairs) for each in figures), default=0.0)
