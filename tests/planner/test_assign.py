"""The optimal signatures: equal to brute force, Megatron's pairs found unasked, and exact when they run."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_plans import BERT, GPT, LLAMA, plan

from executor.check import check
from executor.comm.loopback import run_loopback
from planner.admissible import weight_layouts
from planner.errors import PlanError
from planner.machine import load_machine
from planner.model import with_sizes
from planner.model.presets import preset
from planner.search.assign import _Problem, best_signatures

CPU, A100 = load_machine("cpu-generic"), load_machine("a100-80gb")
MEGATRON = {
    "layer.qkv": "column", "layer.split_heads": "heads", "layer.attention": "heads", "layer.attention_out": "row",
    "layer.ffn_in": "column", "layer.activation": "ffn", "layer.ffn_out": "row",
}  # fmt: skip


class Choices:
    """All ways to choose signatures, walked operator by operator; what cannot be is left as soon as it shows."""

    def __init__(self, problem):
        self.problem, self.nodes = problem, problem.nodes
        self.edges = {i: [] for i in range(len(self.nodes))}  # by the later of the two operators
        for tensor in problem.tensors:
            for consumer, k in tensor.consumers:
                self.edges[max(tensor.producer, consumer)].append((tensor, consumer, k))
        self.seconds = {}

    def transition(self, dims, have, want, in_place):
        key = (dims, have, want, in_place)
        if key not in self.seconds:
            self.seconds[key] = self.problem.transition(dims, have, want, in_place=in_place)
        return self.seconds[key]

    def fits(self, pick, last):
        """Whether the choice for operator `last` goes together with those before it."""
        for tensor, consumer, k in self.edges[last]:
            source, sink = pick[tensor.producer], pick[consumer]
            for have, want, _, in_place in self.problem.pairs(tensor, consumer, k, source, sink):
                if self.transition(tensor.dims, have, want, in_place) is None:
                    return False
        mine = {p.name for p in self.nodes[last].operator.parameters}
        for other in range(last):
            if mine & {p.name for p in self.nodes[other].operator.parameters}:
                return weight_layouts(pick[other]) == weight_layouts(pick[last])
        return True

    def walk(self, order, pick=()):
        """Every complete choice; `order` puts an operator's signatures in the order in which they are tried."""
        if len(pick) == len(self.nodes):
            yield pick
            return
        for signature in order(self.nodes[len(pick)].choices):
            chosen = (*pick, signature)
            if self.fits(chosen, len(pick)):
                yield from self.walk(order, chosen)

    def names(self, pick):
        return {node.operator.role: signature.name for node, signature in zip(self.nodes, pick, strict=True)}


SMALL = msgspec.structs.replace(GPT, layers=3)
LARGE = with_sizes(layers=4, hidden=256, heads=4, seq_len=64)


@pytest.mark.parametrize("machine", [CPU, A100], ids=lambda machine: machine.name)
@pytest.mark.parametrize(
    "spec", [SMALL, LLAMA, msgspec.structs.replace(SMALL, hidden=384, head_dim=64, ffn_hidden=1536)]
)
def test_the_programme_finds_what_brute_force_finds(machine, spec):
    problem = _Problem(plan(spec, tp=2, batch=4), machine)
    for node in problem.nodes:  # without sequence parallelism, few enough to walk them all
        kept = [i for i, signature in enumerate(node.choices) if signature.name != "seq"]
        node.choices, node.seconds = ([values[i] for i in kept] for values in (node.choices, node.seconds))
    choices = Choices(problem)
    seconds = [problem.evaluate(choices.names(pick)) for pick in choices.walk(lambda known: known)]
    assert len(seconds) > 4
    found = problem.solve()
    assert found.seconds == pytest.approx(min(seconds), rel=1e-9)
    assert problem.evaluate(found.signatures) == pytest.approx(found.seconds, rel=1e-9)
    assert found.seconds <= found.usual_seconds * (1 + 1e-9)


@pytest.mark.parametrize(
    ("machine", "spec", "tp"),
    [(CPU, with_sizes(layers=12), 2), (CPU, with_sizes(layers=12), 4), (A100, preset("gpt3-175b"), 8)],
    ids=lambda value: getattr(value, "name", value),
)
def test_megatrons_pairs_come_out_by_themselves(machine, spec, tp):
    """Column, then row, around attention and around the feed-forward (Shoeybi et al. 2019), where layers are large."""
    training = {"precision": "bfloat16"} if machine is A100 else {}
    found = best_signatures(plan(spec, tp=tp, batch=8, micro=1, training=training), machine)
    assert {role: found.signatures[role] for role in MEGATRON} == MEGATRON


def test_a_slow_network_leaves_small_layers_whole():
    """With messages that cost far more than the products, computing everything everywhere is cheapest."""
    link = msgspec.structs.replace(CPU.link_in_host, latency_seconds=1.0)
    slow = msgspec.structs.replace(CPU, link_in_host=link)
    found = best_signatures(plan(GPT, tp=2), slow)
    assert set(found.signatures.values()) == {"replicate"}
    assert not found.is_usual


def test_one_rank_has_nothing_to_assign():
    with pytest.raises(PlanError, match="tp=1 leaves nothing to assign; use a plan with tp>=2"):
        best_signatures(plan(), CPU)


def assert_exact(candidate):
    report = run_loopback(candidate.mesh.world_size, lambda comm: check(candidate, comm, "float64"))[0]
    assert report.passed, report.differences[:4]


@pytest.mark.parametrize("spec", [BERT, LLAMA], ids=lambda spec: spec.name)
@pytest.mark.parametrize("axes", [{"tp": 2}, {"tp": 3, "pp": 2}, {"tp": 2, "dp": 2}], ids=str)
def test_the_assigned_plan_trains_what_one_rank_trains(spec, axes):
    candidate = plan(spec, training={"precision": "float64"}, batch=4, micro=2, **axes)
    found = best_signatures(candidate, CPU).signatures
    assert_exact(plan(spec, training={"precision": "float64"}, batch=4, micro=2, layouts=tp_layouts(found), **axes))


def tp_layouts(signatures):
    return {role: {"tp": name} for role, name in signatures.items()}


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([BERT, GPT, LLAMA]), st.integers(2, 3), st.integers(0, 2**20))
def test_any_admissible_choice_trains_what_one_rank_trains(spec, tp, seed):
    """Random signatures, not only sensible ones: whatever a plan admits, the executor carries out exactly."""
    rng = random.Random(seed)
    candidate = plan(spec, tp=tp, batch=2, training={"precision": "float64"})
    choices = Choices(_Problem(candidate, CPU))
    pick = next(choices.walk(lambda known: rng.sample(known, len(known))))
    layouts = tp_layouts(choices.names(pick))
    assert_exact(plan(spec, tp=tp, batch=2, training={"precision": "float64"}, layouts=layouts))
