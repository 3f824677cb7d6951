"""Proofs without a tolerance: integer operands bit for bit in every layout, and gradients with a closed form."""

import msgspec
import numpy as np
import pytest
from equivalence_plans import describe, model, plan, train

from executor import ops
from executor.data import Batches
from executor.random import bits_at, derive_key
from planner.graph import HIDDEN, Tensor, _Builder
from planner.program import rank as lowering

# ---- a network of integers: embedding, linear layers with ReLU, vocabulary projection --------------------------------


def integer_blocks(spec):
    """The model without what leaves the integers: no norms, no attention, no softmax (see `integer_loss`)."""
    builder = _Builder(spec)
    embedding = builder.graph
    full = builder.embedding()
    embedding.remove_nodes_from([name for name in list(embedding) if name != "embedding.tokens"])
    assert full == "embedding.sum"
    blocks = {"embedding": [embedding.nodes["embedding.tokens"]["operator"]]}
    source = "embedding.token"
    for layer in range(spec.layers):
        builder, block = _Builder(spec), f"layers.{layer}"
        builder.linear(block, "ffn_in", source, Tensor(f"{block}.ffn_in", ("seq", "batch", "ffn")), ("hidden", "ffn"))
        out = Tensor(f"{block}.ffn", ("seq", "batch", "ffn"))
        builder.activation(block, "activation", f"{block}.ffn_in", out, None)
        builder.linear(block, "ffn_out", out.name, Tensor(f"{block}.ffn_out", HIDDEN), ("ffn", "hidden"))
        blocks[block] = [node["operator"] for _, node in builder.graph.nodes(data=True)]
        source = f"{block}.ffn_out"
    builder = _Builder(spec)
    builder.head(source)
    blocks["head"] = [node["operator"] for _, node in builder.graph.nodes(data=True)]
    return blocks


def coefficients(context, m, task, shape):
    """Small integers by global position, sample and vocabulary entry: the gradient of the loss in the logits."""
    placement, where = context.placement, task.attributes["where"]
    rows = placement.index("seq", where["seq"])[:, None, None]
    columns = placement.index("vocab", where["vocab"])[None, None, :]
    return ((3 * rows + 5 * m.samples[None, :, None] + 7 * columns) % 5 - 2).reshape(shape)


def integer_loss(monkeypatch):
    """A loss that is linear in the logits, in place of the cross-entropy's three steps."""

    def largest(context, m, task):
        m.arrays[task.writes[1]][...] = 0

    def total(context, m, task):
        m.arrays[task.writes[1]][...] = 0

    def loss(context, m, task):
        logits = m.arrays[task.reads[0]]
        context.loss += float((logits * coefficients(context, m, task, logits.shape)).sum())

    def backward(context, m, task):
        logits = m.arrays[task.writes[0]]
        logits[...] = coefficients(context, m, task, logits.shape)

    for kind, function in {
        "logits_max.forward": largest, "exp_sum.forward": total, "loss.forward": loss, "loss.backward": backward,
    }.items():  # fmt: skip
        monkeypatch.setitem(ops.BINDINGS, kind, function)


def small_integers(name, at):
    """-1, 0 or 1 by name and global index, like the toss of a die."""
    index = sum(part * 1000**i for i, part in enumerate(at)).astype(np.uint64)
    return (bits_at(derive_key(0, "integer", name), index) % np.uint64(3)).astype(np.int64) - 1


INTEGER_LAYOUTS = [
    {"tp": 2}, {"tp": 3, "sequence_parallel": True}, {"dp": 3}, {"pp": 2}, {"cp": 2, "dp": 2},
    {"dp": 2, "tp": 2, "pp": 2}, {"cp": 2, "tp": 3, "sequence_parallel": True}, {"dp": 4, "zero_stage": 1},
    {"dp": 3, "tp": 2, "zero_stage": 2}, {"dp": 2, "cp": 2, "tp": 2, "zero_stage": 3},
    {"pp": 2, "dp": 3, "schedule": "zb-h1", "zero_stage": 2}, {"pp": 2, "tp": 4, "schedule": "zb-v", "chunks": 2},
]  # fmt: skip


@pytest.mark.parametrize("axes", INTEGER_LAYOUTS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_integer_operands_are_exact_in_every_layout(monkeypatch, axes, tied):
    """Products and partial sums of small integers are exact in float32, so the order of reductions cannot matter."""
    monkeypatch.setattr(lowering, "blocks", integer_blocks)
    integer_loss(monkeypatch)
    spec = model(
        "gpt", activation="relu", tie_embeddings=tied, ffn_bias=False, head_bias=False, final_norm=False, ffn_hidden=11,
        seq_len=13, positions="rotary",
    )  # fmt: skip
    training = {"optimizer": "sgd", "learning_rate": 1.0, "clip_norm": None, "precision": "float32", "dropout": 0.0}
    alone = train(plan(spec, batch=7, training=training), parameters=small_integers)
    spread = train(plan(spec, batch=7, training=training, **axes), parameters=small_integers)
    assert alone.state.gradients.tensors.keys() == spread.state.gradients.tensors.keys()
    largest = 0.0
    for name, gradient in alone.state.gradients.tensors.items():
        assert np.array_equal(gradient, spread.state.gradients.tensors[name]), name
        assert np.array_equal(gradient, np.rint(gradient)), "every sum was exact"
        assert np.array_equal(alone.state.parameters.tensors[name], spread.state.parameters.tensors[name]), name
        largest = max(largest, np.abs(gradient).max())
    assert 100 < largest < 2**24, "large enough to test, small enough to be exact"
    assert not any(spread.state.gradients.disagreement.values())


# ---- a gradient with a closed form -----------------------------------------------------------------------------------

SCALING = [
    {}, {"dp": 2}, {"dp": 3, "micro": 1}, {"dp": 7, "micro": 1}, {"micro": 1}, {"micro": 7}, {"pp": 2, "micro": 1},
    {"tp": 3}, {"cp": 2}, {"dp": 2, "cp": 2, "tp": 2}, {"dp": 3, "zero_stage": 1}, {"dp": 3, "zero_stage": 2},
    {"dp": 2, "pp": 2, "zero_stage": 3, "micro": 1}, {"dp": 3, "overlap_gradients": True},
]  # fmt: skip


@pytest.mark.parametrize("axes", SCALING, ids=str)
def test_the_head_bias_moves_by_its_closed_form(axes):
    """Without weights every logit is 0, so p = 1/V, and the bias of entry j has gradient 1/V − n_j/N.

    n_j of the N counted targets are j. One SGD step of rate r must take it there once, whatever the replicas and
    micro-batches: a gradient averaged or summed once too often is off by their number.
    """
    spec, rate = model("bert"), 0.5
    training = {"optimizer": "sgd", "learning_rate": rate, "clip_norm": None}
    candidate = plan(spec, **({"batch": 7, "training": training} | axes))
    run = train(candidate, parameters=lambda name, at: 1.0 if name.endswith("gain") else 0.0)
    batch = Batches("synthetic", spec, 7, 0).batch(0, range(7), range(spec.seq_len))
    counts = np.bincount(batch.targets[batch.weights > 0], minlength=spec.vocab)
    expected = -rate * (1 / spec.vocab - counts / counts.sum())
    np.testing.assert_allclose(run.state.parameters.tensors["head.logits_max.bias"], expected, rtol=1e-13, atol=1e-16)
    assert run.losses[0] == pytest.approx(np.log(spec.vocab), rel=1e-13)


@pytest.mark.parametrize("axes", [{}, {"dp": 2, "zero_stage": 1}, {"tp": 2}, {"pp": 2}], ids=str)
def test_clipping_scales_the_gradient_to_the_limit(axes):
    """Above the limit the clipped gradients have exactly that norm, counted once over shards, copies and stages."""
    spec, limit = model("bert"), 1e-3
    candidate = plan(spec, training={"clip_norm": limit}, **axes)
    run = train(candidate)
    norm = np.sqrt(sum(float((g**2).sum()) for g in run.state.gradients.tensors.values()))
    assert norm == pytest.approx(limit, rel=1e-12)
    loose = msgspec.structs.replace(candidate, training=msgspec.structs.replace(candidate.training, clip_norm=1e6))
    free = train(loose).state.gradients.tensors
    assert np.sqrt(sum(float((g**2).sum()) for g in free.values())) > 10 * limit, describe(candidate)
