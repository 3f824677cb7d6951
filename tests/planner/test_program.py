"""Programs of all ranks: buffers live when they are read, ranks agree on their collectives, volumes in closed form."""

import math
from collections import Counter, defaultdict, deque

import msgspec
import pytest
from hypothesis import given, settings
from small_plans import BERT, CHUNKED, LLAMA, UNCHUNKED, plan, plans, programs, tasks_of

from planner.cost.price import COLLECTIVES
from planner.graph import build_graph, operators
from planner.mesh import Coordinate
from planner.program import lower
from planner.program.rank import lower_stage
from planner.program.stage import EXTERNAL

# ---- interpreters of the tests ---------------------------------------------------------------------------------------


def check_liveness(program):
    """Interpret a rank's program on names alone: no read of what is not there, nothing freed twice, nothing left."""
    live, defined = defaultdict(set), defaultdict(set)
    for step in program.steps:
        if step.op == "U":
            continue
        here = (step.stage, step.micro_batch)
        buffers = program.segments[step.stage, program.micro_batches[step.micro_batch]].buffers
        for task in step.tasks:
            for name in task.reads:
                root = buffers[name].root
                assert name in EXTERNAL or root in live[here], f"{here} {task.key} reads {name}, which is not there"
                assert name in EXTERNAL or root in defined[here], f"{here} {task.key} reads {name} before it is written"
            for name in task.writes:
                live[here].add(buffers[name].root)
                if task.kind != "post_receive":
                    defined[here].add(buffers[name].root)
            if task.kind == "receive":
                defined[here].add(buffers[task.name].root)
            if task.kind == "handoff":
                there = (task.attributes["to"], step.micro_batch)
                theirs = program.segments[there[0], program.micro_batches[step.micro_batch]]
                forward = task.attributes["to"] > task.attributes["from"]
                name = theirs.input if forward else f"{theirs.output}.grad"
                live[there].add(theirs.buffers[name].root)
                defined[there].add(theirs.buffers[name].root)
            for root in task.frees:
                if root not in EXTERNAL:
                    assert root in live[here], f"{here} {task.key} frees {root}, which is not held"
                    live[here].remove(root)
                    defined[here].discard(root)
    left = {where: roots for where, roots in live.items() if roots}
    assert not left, f"never freed: {left}"


class Rank:
    """A rank that runs its tasks one after another; sends and early reductions are posted, everything else blocks."""

    def __init__(self, program):
        self.program, self.at = program, program.at
        self.rank = program.plan.mesh.rank(program.at)
        self.todo = deque((step, task) for step in program.steps for task in step.tasks)
        self.done = Counter()

    def group(self, task):
        mesh = self.program.plan.mesh
        if task.axis == "tie":
            pp = self.program.schedule.stage_to_rank
            return tuple(mesh.rank(self.at._replace(pp=p)) for p in (pp[0], pp[-1]))
        return mesh.group(task.axis, self.at)


def run_together(plan_):
    """Run all ranks to the end; returns the messages sent. Fails on a deadlock or where a group disagrees."""
    ranks = [Rank(program) for program in programs(plan_)]
    posted, sent = defaultdict(list), defaultdict(deque)
    order = defaultdict(list)  # by group and stream, by member: the collectives in order
    progress = True
    while progress and any(rank.todo for rank in ranks):
        progress = False
        for rank in ranks:
            while rank.todo and advance(rank, sent, posted, order, ranks):
                progress = True
    stuck = {rank.rank: (str(rank.todo[0][0].op), rank.todo[0][1].key) for rank in ranks if rank.todo}
    assert not stuck, f"ranks wait for each other: {stuck}"
    for (group, stream), by_member in order.items():
        sequences = {member: by_member.count(member) for member in group}
        assert len(set(sequences.values())) == 1, f"{group} {stream} {sequences}"
    assert not any(sent.values()), "every message is received"
    return posted


def advance(rank, sent, posted, order, ranks):
    """Run a rank's next task if it can go; a collective goes when all members stand at the same one."""
    step, task = rank.todo[0]
    if task.kind == "send":
        a = task.attributes
        message = (a["from"], a["to"], a["micro_batch"], int(task.work.bytes))
        sent[rank.rank, a["peer"]].append(message)
        posted[rank.rank, a["peer"]].append(message)
    elif task.kind == "receive":
        a = task.attributes
        channel = sent[a["peer"], rank.rank]
        message = (a["from"], a["to"], a["micro_batch"], int(task.work.bytes))
        if message not in channel:
            return False
        channel.remove(message)
    elif task.kind in COLLECTIVES or task.kind == "ring_shift":
        group = rank.group(task)
        lane = (group, task.stream)
        number = rank.done[lane]
        calls = order[lane]
        name = (task.kind, task.key, step.op if step.op != "U" else "U", number)
        known = order[lane, "calls"]
        if number < len(known):
            assert known[number] == name, f"{group} disagrees: {known[number]} and {name}"
        else:
            known.append(name)
        if task.stream == "compute" and not all(at_same(ranks[member], lane, number, task) for member in group):
            return False
        rank.done[lane] += 1
        calls.append(rank.rank)
    rank.todo.popleft()
    return True


def at_same(other, lane, number, task):
    """Whether a member stands at this collective of the lane, or is past it."""
    if other.done[lane] > number:
        return True
    _, theirs = other.todo[0] if other.todo else (None, None)
    return theirs is not None and theirs.kind == task.kind and other.group(theirs) == lane[0]


# ---- properties of every plan ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(plans())
def test_buffers_are_there_when_read_and_freed_exactly_once(candidate):
    for program in programs(candidate):
        check_liveness(program)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_ranks_agree_on_their_collectives_and_messages(candidate):
    run_together(candidate)


@pytest.mark.parametrize(("name", "chunks"), [(n, 1) for n in UNCHUNKED] + [(n, 2) for n in CHUNKED])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_every_schedule_lowers(name, chunks, batch):
    spec = msgspec.structs.replace(BERT, layers=6)
    candidate = plan(spec, pp=3, schedule=name, chunks=chunks, batch=batch)
    posted = run_together(candidate)
    crossing = sum(a != b for a, b in zip(*[stages(candidate)[i:] for i in (0, 1)], strict=False))
    assert sum(map(len, posted.values())) == 2 * batch * crossing
    for program in programs(candidate):
        check_liveness(program)
        count = Counter((step.stage, step.op) for step in program.steps if step.op in "FBIW")
        assert set(count.values()) == {batch}, "each instruction once per micro-batch"


def stages(candidate):
    return lower(candidate, 0).schedule.stage_to_rank


@settings(max_examples=40, deadline=None)
@given(plans())
def test_every_parameter_is_trained_once(candidate):
    """One gradient per operator and micro-batch, one optimizer task per unit; units hold what the graph does."""
    graph = build_graph(candidate.model)
    made = {p.name: o.name for o in operators(graph) for p in o.parameters}
    held = Counter()
    for program in programs(candidate):
        updates = Counter(task.name for task in tasks_of(program) if task.kind == "optimizer")
        assert set(updates.values()) <= {1}
        assert set(updates) == {unit.block for unit in program.units if unit.size}
        if program.at[1:] == (0, 0, 0):
            held.update(slot.parameter.name for unit in program.units for slot in unit.slots)
        uses = Counter()
        for step in program.steps:
            for task in step.tasks if step.op in ("B", "I", "W") else ():
                for name in task.gradients:
                    uses[name] += 1
        names = {slot.parameter.name for unit in program.units for slot in unit.slots}
        tied_here = {"embedding.tokens.weight"} if is_tied_on_one_rank(candidate, program) else set()
        for name in names:
            assert uses[name] == len(program.micro_batches) * (2 if name in tied_here else 1), name
    ends = 2 if candidate.model.tie_embeddings and stages(candidate)[0] != stages(candidate)[-1] else 1
    assert held == {name: ends if name == "embedding.tokens.weight" else 1 for name in made}


def is_tied_on_one_rank(candidate, program):
    pp = program.schedule.stage_to_rank
    return candidate.model.tie_embeddings and pp[0] == pp[-1] == program.at.pp


@settings(max_examples=40, deadline=None)
@given(plans())
def test_messages_leave_and_arrive_in_one_order(candidate):
    """First-in first-out per (source, destination, direction): what receives without tags rely on."""
    sent, expected = defaultdict(list), defaultdict(list)
    for program in programs(candidate):
        rank = candidate.mesh.rank(program.at)
        for task in tasks_of(program):
            a = task.attributes
            if task.kind in ("send", "post_receive"):
                forward = a["from"] < a["to"]
                message = (a["from"], a["to"], a["micro_batch"])
                if task.kind == "send":
                    sent[rank, a["peer"], forward].append(message)
                else:
                    expected[a["peer"], rank, forward].append(message)
    assert expected == sent


# ---- what is saved: activations in closed form -----------------------------------------------------------------------

S, B_, H = 16, 3, 24  # of the small BERT: positions, micro-batch, hidden; a = 6 heads, f = 36


def saved_elements(spec, stage_layers=1, **choices):
    """Elements that a layer keeps from forward to backward: a model with one layer more, less one without."""
    totals = []
    for layers in (4, 4 + stage_layers):
        candidate = plan(msgspec.structs.replace(spec, layers=layers), batch=B_, micro=B_, **choices)
        program = lower(candidate, candidate.mesh.rank(Coordinate(0, 0, 0, 0)))
        segment = program.segments[0, B_]
        alive = set()
        for step in program.steps:
            if step.op == "F":
                for task in step.tasks:
                    alive |= {segment.buffers[name].root for name in task.writes}
                    alive -= set(task.frees)
        kept = {root for root in alive if segment.buffers[root].category == "activations"}
        totals.append(sum(math.prod(segment.buffers[root].shape) for root in kept))
    return (totals[1] - totals[0]) / stage_layers


def test_activations_of_a_layer_in_closed_form():
    """Korthikanti et al. 2022 (arXiv:2205.05198), eq. 1: 34sbh + 5as²b bytes of 16-bit activations and masks.

    Less the masks (counter-based here: 2sbh and, with the dropped-out copy of the probabilities, 3as²b) in elements:
    16sbh + as²b with a feed-forward of 4h. Norm statistics, which the paper leaves out, are 4sb.
    """
    spec = msgspec.structs.replace(BERT, ffn_hidden=4 * H)
    s, b, h, a = S, B_, H, 6
    assert saved_elements(spec) == 16 * s * b * h + a * s * s * b + 4 * s * b


@pytest.mark.parametrize("tp", [2, 3])
def test_tensor_parallelism_splits_what_lies_inside_the_blocks(tp):
    """Eq. 2: (10 + 24/t) sbh + 5as²b/t bytes, so 4sbh + (12sbh + as²b)/t elements: norms and residuals stay whole."""
    spec = msgspec.structs.replace(BERT, ffn_hidden=4 * H)
    s, b, h, a = S, B_, H, 6
    whole, split = 4 * s * b * h + 4 * s * b, 12 * s * b * h + a * s * s * b
    assert saved_elements(spec, tp=tp) == whole + split / tp


@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallelism_splits_everything(tp):
    """Eq. 4: (34sbh + 5as²b) / t."""
    spec = msgspec.structs.replace(BERT, ffn_hidden=4 * H, heads=4, kv_heads=4, head_dim=6)
    s, b, h, a = S, B_, H, 4
    expected = 16 * s * b * h + a * s * s * b + 4 * s * b
    assert saved_elements(spec, tp=tp, sequence_parallel=True) == expected / tp


def test_recomputation_saves_what_it_says():
    """Selective: no as²b (§5). Full: the layer's input, sbh (table 2). Blocked attention keeps one number per row."""
    spec = msgspec.structs.replace(BERT, ffn_hidden=4 * H)
    s, b, h, a = S, B_, H, 6
    assert saved_elements(spec, recompute="selective") == 16 * s * b * h + 4 * s * b
    assert saved_elements(spec, recompute="full") == s * b * h
    assert saved_elements(spec, recompute="full", schedule="zb-h1") == s * b * h, "also where W comes later than I"
    assert saved_elements(spec, attention="blocked") == 16 * s * b * h + 4 * s * b + a * s * b


def test_recomputation_computes_again_what_it_says():
    def counted(recompute):
        candidate = plan(recompute=recompute, batch=1)
        return Counter(task.kind for task in tasks_of(lower(candidate, 0)) if task.kind.endswith("forward"))

    none, selective, full = (counted(kind) for kind in ("none", "selective", "full"))
    layers = BERT.layers
    assert selective - none == {"attention_plain.forward": layers}
    per_layer = Counter(f"{o.kind}.forward" for o in operators(build_graph(BERT), "layers.1"))
    per_layer["attention_plain.forward"] = per_layer.pop("attention.forward")
    assert full - none == {kind: count * layers for kind, count in per_layer.items()}


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize(("name", "in_flight"), [("gpipe", lambda p, s, m: m), ("1f1b", lambda p, s, m: min(m, p - s))])
def test_micro_batches_in_flight(pp, name, in_flight):
    """The most that a stage holds at once: all of GPipe, p - s of 1F1B (Narayanan et al. 2021, §2.2.1)."""
    candidate = plan(pp=pp, schedule=name, batch=6)
    for stage, program in enumerate(programs(candidate)):
        held = most = 0
        for step in program.steps:
            held += {"F": 1, "B": -1}.get(step.op, 0)
            most = max(most, held)
        assert most == in_flight(pp, stage, 6)


# ---- collectives in closed form --------------------------------------------------------------------------------------


def collectives_of_a_layer(**choices):
    """Number and payload bytes of each (axis, kind, way) of one more layer, on rank 0."""
    totals = []
    for layers in (4, 5):
        spec = msgspec.structs.replace(choices.get("spec", BERT), layers=layers)
        candidate = plan(spec, batch=B_, micro=B_, **{k: v for k, v in choices.items() if k != "spec"})
        found = defaultdict(lambda: [0, 0])
        segment = lower_stage(candidate, Coordinate(0, 0, 0, 0), 0, B_, split=False)
        for op in ("F", "B"):
            for task in (t for tasks in segment.tasks[op].values() for t in tasks if t.axis):
                entry = found[task.axis, task.kind, op]
                entry[0] += 1
                entry[1] += int(task.work.full_bytes)
        totals.append(found)
    first, second = totals
    return {key: (n - first[key][0], size - first[key][1]) for key, (n, size) in second.items() if n != first[key][0]}


def test_megatron_has_two_all_reduces_each_way():
    """Shoeybi et al. 2019, §3: after attention and after the feed-forward; their conjugates in the backward pass."""
    whole = 4 * S * B_ * H
    expected = {("tp", "all_reduce", op): (2, 2 * whole) for op in ("F", "B")}
    assert collectives_of_a_layer(tp=2) == expected


def test_sequence_parallelism_moves_as_much():
    """An all-reduce is a reduce-scatter and an all-gather (Korthikanti et al. 2022, §4.2.2).

    The backward pass gathers both linear inputs once more for their weight gradients, which the paper overlaps.
    """
    whole = 4 * S * B_ * H
    moved = collectives_of_a_layer(tp=2, sequence_parallel=True)
    assert moved == {
        ("tp", "all_gather", "F"): (2, 2 * whole), ("tp", "reduce_scatter", "F"): (2, 2 * whole),
        ("tp", "all_gather", "B"): (4, 4 * whole), ("tp", "reduce_scatter", "B"): (2, 2 * whole),
    }  # fmt: skip


@pytest.mark.parametrize("spec", [BERT, LLAMA], ids=lambda spec: spec.name)
@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_volumes(spec, cp):
    """K and V of kv_heads·d columns: gathered once and their gradients scattered once, or passed round the ring.

    Ring: p - 1 shifts of K and V each way, and p of their gradients, which end where they began.
    """
    kv = 4 * S * B_ * spec.kv_heads * spec.head_dim
    assert collectives_of_a_layer(spec=spec, cp=cp) == {
        ("cp", "all_gather", "F"): (2, 2 * kv), ("cp", "reduce_scatter", "B"): (2, 2 * kv),
    }  # fmt: skip
    assert collectives_of_a_layer(spec=spec, cp=cp, cp_kind="ring") == {
        ("cp", "ring_shift", "F"): (cp - 1, (cp - 1) * 2 * kv // cp),
        ("cp", "ring_shift", "B"): (2 * cp - 1, (2 * cp - 1) * 2 * kv // cp),
    }


def test_ulysses_swaps_four_tensors_each_way():
    """Jacobs et al. 2023 (arXiv:2309.14509), §3.2: Q, K, V in, the context out, each S·B·h/p per rank."""
    part = 4 * S * B_ * H // 2
    moved = collectives_of_a_layer(cp=2, cp_kind="ulysses")
    assert moved == {("cp", "all_to_all", op): (4, 4 * part) for op in ("F", "B")}


def ring_bytes(task):
    """Bytes sent in a ring, (p-1)/p dropped."""
    collective = COLLECTIVES.get(task.kind)
    return {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}.get(collective, 0) * int(task.work.full_bytes)


@pytest.mark.parametrize(("stage", "times"), [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.5)])
def test_zero_volumes(stage, times):
    """Rajbhandari et al. 2020 (arXiv:1910.02054), §7: 2Ψ, and 3Ψ when parameters are sharded, with one micro-batch."""
    candidate = plan(LLAMA, dp=2, batch=2, zero_stage=stage)
    program = lower(candidate, 0)
    parameters = 4 * sum(unit.size for unit in program.units)
    moved = sum(ring_bytes(task) for task in tasks_of(program) if task.axis == "data")
    assert moved == times * 2 * parameters


@pytest.mark.parametrize("count", [1, 3])
def test_zero_volumes_grow_with_the_micro_batches(count):
    """Stages 2 and 3 reduce every micro-batch into the shard; stage 3 gathers twice for each."""
    for stage, expected in ((1, 2), (2, count + 1), (3, 3 * count)):
        program = lower(plan(LLAMA, dp=2, batch=2 * count, zero_stage=stage), 0)
        parameters = 4 * sum(unit.size for unit in program.units)
        assert sum(ring_bytes(t) for t in tasks_of(program) if t.axis == "data") == expected * parameters


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_overlapped_gradients_start_with_the_last_backward(zero_stage):
    """Each unit's reduction starts once, during the last backward, and is waited for before the optimizer."""
    program = lower(plan(LLAMA, dp=2, batch=6, zero_stage=zero_stage, overlap_gradients=True), 0)
    starts = [(i, t.name) for i, step in enumerate(program.steps) for t in step.tasks if t.kind == "gradient_start"]
    last = max(i for i, step in enumerate(program.steps) if step.op == "B")
    assert {i for i, _ in starts} == {last}
    assert sorted(name for _, name in starts) == sorted(unit.block for unit in program.units if unit.size)
    update = [t for step in program.steps if step.op == "U" for t in step.tasks]
    for unit in program.units:
        kinds = [t.kind for t in update if t.name == unit.block and unit.size]
        assert not kinds or kinds.index("gradient_wait") < kinds.index("optimizer")


def test_tied_copies_are_summed_between_the_ends_only():
    for rank, program in enumerate(programs(plan(pp=3, batch=3))):
        sums = [task for task in tasks_of(program) if task.kind == "tied_gradient_sum"]
        assert len(sums) == (1 if rank in (0, 2) else 0)
    assert not [t for t in tasks_of(lower(plan(), 0)) if t.kind == "tied_gradient_sum"], "one rank holds one copy"
