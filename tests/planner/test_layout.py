"""The layout algebra, proved on arrays: each redistribution, and each signature against the unsharded operator."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.layout import Partial, Replicate, Shard, redistribution, signatures

R, P, MAX = Replicate(), Partial(), Partial("max")


# ---- tensors on fake ranks -------------------------------------------------------------------------------------------


def cuts(size, ranks):
    """Where the parts of a dimension begin and end; the first are larger where it does not divide."""
    return [0, *np.cumsum([size // ranks + (i < size % ranks) for i in range(ranks)])]


def spread(rng, value, dims, layout, ranks):
    """What each rank holds of a whole tensor in a layout; partial values are random parts of it."""
    if isinstance(layout, Shard) and layout.dim in dims:
        axis = dims.index(layout.dim)
        edges = cuts(value.shape[axis], ranks)
        return [np.take(value, range(edges[r], edges[r + 1]), axis) for r in range(ranks)]
    if isinstance(layout, Partial) and layout.op == "sum":
        parts = [rng.standard_normal(value.shape) for _ in range(ranks - 1)]
        return [*parts, value - sum(parts, np.zeros_like(value))]
    if isinstance(layout, Partial):
        parts = [value - rng.random(value.shape) for _ in range(ranks)]
        holder = rng.integers(ranks, size=value.shape)
        return [np.where(holder == r, value, part) for r, part in enumerate(parts)]
    return [value.copy() for _ in range(ranks)]


def whole(held, dims, layout):
    """The tensor that the ranks hold together."""
    if isinstance(layout, Shard) and layout.dim in dims:
        return np.concatenate(held, dims.index(layout.dim))
    if isinstance(layout, Partial):
        return sum(held) if layout.op == "sum" else np.max(held, axis=0)
    for other in held[1:]:
        np.testing.assert_allclose(other, held[0], rtol=1e-12, atol=1e-12, err_msg="ranks differ in a replicated value")
    return held[0]


def collective(kind, held, dims, source, target, ranks):
    """The collective as MPI defines it, on the lists of what ranks hold."""

    def part(value, rank):
        axis = dims.index(target.dim)
        edges = cuts(value.shape[axis], ranks)
        return np.take(value, range(edges[rank], edges[rank + 1]), axis)

    match kind:
        case None:
            return held
        case "all_reduce":
            return [sum(held) if source.op == "sum" else np.max(held, axis=0)] * ranks
        case "reduce_scatter":
            return [part(sum(held), r) for r in range(ranks)]
        case "all_gather":
            return [np.concatenate(held, dims.index(source.dim))] * ranks
        case "slice":
            return [part(held[r], r) for r in range(ranks)]
        case "all_to_all":
            return [np.concatenate([part(piece, r) for piece in held], dims.index(source.dim)) for r in range(ranks)]
    raise AssertionError(kind)


LAYOUTS = (Shard("a"), Shard("b"), R, P, MAX)
EXPECTED = {
    ("Partial(sum)", "Replicate"): "all_reduce", ("Partial(max)", "Replicate"): "all_reduce",
    ("Partial(sum)", "Shard"): "reduce_scatter", ("Shard", "Replicate"): "all_gather",
    ("Shard", "Shard"): "all_to_all", ("Replicate", "Shard"): "slice",
}  # fmt: skip


def kind_of(layout):
    return "Shard" if isinstance(layout, Shard) else str(layout)


@pytest.mark.parametrize(("source", "target"), list(product(LAYOUTS, LAYOUTS)), ids=str)
def test_a_pair_of_layouts_decides_its_collective(source, target):
    if source == target:
        assert redistribution(source, target) is None
    elif (kind_of(source), kind_of(target)) in EXPECTED:
        assert redistribution(source, target) == EXPECTED[kind_of(source), kind_of(target)]
    else:
        with pytest.raises(PlanError, match=r"no redistribution leads from .* to .*; choose another signature"):
            redistribution(source, target)


def possible():
    for source, target in product(LAYOUTS, LAYOUTS):
        try:
            yield source, target, redistribution(source, target)
        except PlanError:
            continue


@pytest.mark.parametrize(("source", "target", "kind"), list(possible()), ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_redistribution_changes_the_layout_and_not_the_value(source, target, kind, ranks):
    rng = np.random.default_rng(ranks)
    dims, value = ("a", "b"), rng.standard_normal((7, 5))
    held = spread(rng, value, dims, source, ranks)
    moved = collective(kind, held, dims, source, target, ranks)
    np.testing.assert_allclose(whole(moved, dims, target), value, rtol=1e-12, atol=1e-12)
    for rank, expected in enumerate(spread(rng, value, dims, target, ranks)):
        assert moved[rank].shape == expected.shape


@pytest.mark.parametrize(
    ("source", "target"), [(P, R), (P, Shard("a")), (Shard("a"), R), (Shard("a"), Shard("b")), (Shard("b"), P)], ids=str
)
def test_the_backward_of_a_redistribution_is_its_adjoint(source, target):
    """Ranks' inner products add up, so the dual of Replicate is Partial and that of Shard itself (Megatron's f and g).

    The dual pairs: all-reduce is its own adjoint, reduce-scatter and all-gather are each other's, all-to-all its own.
    """
    ranks, dims = 3, ("a", "b")
    rng = np.random.default_rng(0)
    dual = {R: P, P: R}
    there = (source, target)
    back = (dual.get(target, target), dual.get(source, source))
    if target == P:  # nothing makes values partial; its dual, Replicate -> Shard, is the free slice
        with pytest.raises(PlanError):
            redistribution(*there)
        assert redistribution(*back) == "slice"
        return
    x = spread(rng, rng.standard_normal((7, 5)), dims, source, ranks)
    y = spread(rng, rng.standard_normal((7, 5)), dims, back[0], ranks)
    fx = collective(redistribution(*there), x, dims, *there, ranks)
    fty = collective(redistribution(*back), y, dims, *back, ranks)
    inner = [sum(float(np.vdot(a, b)) for a, b in zip(left, right, strict=True)) for left, right in ((fx, y), (x, fty))]
    assert inner[0] == pytest.approx(inner[1], rel=1e-12)


# ---- operators as plain functions of what one rank holds -------------------------------------------------------------

S, B, H, F, V, A, D = 5, 4, 6, 7, 9, 3, 2  # sequence, batch, hidden, ffn, vocabulary, heads, head size
HIDDEN = ("seq", "batch", "hidden")
SIZES = {
    "seq": S, "batch": B, "hidden": H, "ffn": F, "vocab": V, "heads": A, "d": D, "two": 2, "three": 3,
    "positions": S + 2,
}  # fmt: skip


def rows_of(rank, ranks, layout, dim, size):
    """The global indices of a dimension that a rank holds in a layout."""
    if not (isinstance(layout, Shard) and layout.dim == dim):
        return np.arange(size)
    edges = cuts(size, ranks)
    return np.arange(edges[rank], edges[rank + 1])


class Linear:
    """y = x·W."""

    kind, split = "linear", ("hidden", "ffn")
    inputs, outputs, parameters = (HIDDEN,), (("seq", "batch", "ffn"),), (("hidden", "ffn"),)

    @staticmethod
    def forward(x, w, place):
        return [x[0] @ w[0]]

    @staticmethod
    def backward(x, w, y, dy, place):
        return [dy[0] @ w[0].T], [np.einsum("sbi,sbo->io", x[0], dy[0])]


class Norm:
    """RMS norm with a gain: acts on each token, its gain's gradient sums over them."""

    kind, split = "norm", ("hidden", "hidden")
    inputs, outputs, parameters = (HIDDEN,), (HIDDEN,), (("hidden",),)

    @staticmethod
    def forward(x, w, place):
        return [x[0] / np.sqrt((x[0] ** 2).mean(-1, keepdims=True)) * w[0]]

    @staticmethod
    def backward(x, w, y, dy, place):
        scale = 1 / np.sqrt((x[0] ** 2).mean(-1, keepdims=True))
        normed, d = x[0] * scale, dy[0] * w[0]
        return [scale * (d - normed * (d * normed).mean(-1, keepdims=True))], [(dy[0] * normed).sum((0, 1))]


class Residual:
    """out = stream + (source + bias)."""

    kind, split = "residual", ("hidden", "hidden")
    inputs, outputs, parameters = (HIDDEN, HIDDEN), (HIDDEN,), (("hidden",),)

    @staticmethod
    def forward(x, w, place):
        return [x[1] + x[0] + w[0]]

    @staticmethod
    def backward(x, w, y, dy, place):
        return [dy[0], dy[0]], [dy[0].sum((0, 1))]


class ResidualNorm:
    """The sum of a residual and its norm, two outputs."""

    kind, split = "residual_norm", ("hidden", "hidden")
    inputs, outputs, parameters = (HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (("hidden",), ("hidden",))

    @staticmethod
    def forward(x, w, place):
        total = x[0] + w[0] + x[1]
        return [total, *Norm.forward([total], w[1:], place)]

    @staticmethod
    def backward(x, w, y, dy, place):
        (d_normed,), gain = Norm.backward([y[0]], w[1:], [y[1]], [dy[1]], place)
        both = dy[0] + d_normed
        return [both, both], [both.sum((0, 1)), *gain]


class Activation:
    """A bias and a pointwise function over feed-forward units."""

    kind, split = "activation", ("hidden", "hidden")
    inputs, outputs, parameters = (("seq", "batch", "ffn"),), (("seq", "batch", "ffn"),), (("ffn",),)

    @staticmethod
    def forward(x, w, place):
        return [np.tanh(x[0] + w[0])]

    @staticmethod
    def backward(x, w, y, dy, place):
        dx = dy[0] * (1 - y[0] ** 2)
        return [dx], [dx.sum((0, 1))]


class Gated(Activation):
    """tanh(gate) · up; the packed pair is split in the units of ffn."""

    kind = "gated"
    inputs, parameters = (("seq", "batch", "ffn", "two"),), (("ffn", "two"),)

    @staticmethod
    def forward(x, w, place):
        z = x[0] + w[0]
        return [np.tanh(z[..., 0]) * z[..., 1]]

    @staticmethod
    def backward(x, w, y, dy, place):
        z = x[0] + w[0]
        gate = np.tanh(z[..., 0])
        dz = np.stack([dy[0] * z[..., 1] * (1 - gate**2), dy[0] * gate], -1)
        return [dz], [dz.sum((0, 1))]


class SplitHeads:
    """A bias on packed query, key and value heads; three outputs."""

    kind, split = "split_heads", ("hidden", "hidden")
    inputs, parameters = (("seq", "batch", "heads", "three"),), (("heads", "three"),)
    outputs = (("seq", "batch", "heads"),) * 3

    @staticmethod
    def forward(x, w, place):
        return list(np.moveaxis(x[0] + w[0], -1, 0))

    @staticmethod
    def backward(x, w, y, dy, place):
        dx = np.stack(dy, -1)
        return [dx], [dx.sum((0, 1))]


class Attention:
    """Causal attention: a rank masks by the global positions of its queries."""

    kind, split = "attention", ("hidden", "hidden")
    inputs, parameters = (("seq", "batch", "heads", "d"),) * 3, ()
    outputs = (("seq", "batch", "heads", "d"),)

    @staticmethod
    def probabilities(x, place):
        q, k, _ = x
        scores = np.einsum("qbhd,kbhd->bhqk", q, k)
        scores = np.where(place("seq", 0)[:, None] >= place("seq", 1)[None, :], scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)

    @classmethod
    def forward(cls, x, w, place):
        return [np.einsum("bhqk,kbhd->qbhd", cls.probabilities(x, place), x[2])]

    @classmethod
    def backward(cls, x, w, y, dy, place):
        q, k, v = x
        p = cls.probabilities(x, place)
        dp = np.einsum("qbhd,kbhd->bhqk", dy[0], v)
        ds = p * (dp - (dp * p).sum(-1, keepdims=True))
        return [
            np.einsum("bhqk,kbhd->qbhd", ds, k),
            np.einsum("bhqk,qbhd->kbhd", ds, q),
            np.einsum("bhqk,qbhd->kbhd", p, dy[0]),
        ], []


class Positions:
    """Adds a table's row of each token's global position."""

    kind, split = "positions", ("hidden", "hidden")
    inputs, outputs, parameters = (HIDDEN,), (HIDDEN,), (("positions", "hidden"),)

    @staticmethod
    def forward(x, w, place):
        return [x[0] + w[0][place("seq", 0)][:, None]]

    @staticmethod
    def backward(x, w, y, dy, place):
        table = np.zeros_like(w[0])
        table[place("seq", 0)] = dy[0].sum(1)
        return [dy[0]], [table]


class Embedding:
    """Rows of a table by token id; a rank that holds part of the vocabulary leaves zeros for the other ids."""

    kind, split = "embedding", ("hidden", "hidden")
    inputs, outputs, parameters = (("seq", "batch"),), (HIDDEN,), (("vocab", "hidden"),)

    @staticmethod
    def ids(x):
        return np.clip(np.abs(x[0] * 7).astype(int), 0, V - 1)

    @classmethod
    def forward(cls, x, w, place):
        here = (cls.ids(x)[..., None] == place("vocab", "parameter")).astype(float)
        return [here @ w[0]]

    @classmethod
    def backward(cls, x, w, y, dy, place):
        here = (cls.ids(x)[..., None] == place("vocab", "parameter")).astype(float)
        return [np.zeros_like(x[0])], [np.einsum("sbv,sbh->vh", here, dy[0])]


OPERATORS = (
    Linear, Norm, Residual, ResidualNorm, Activation, Gated, SplitHeads, Attention, Positions, Embedding,
)  # fmt: skip
CASES = [
    (operator, name)
    for operator in OPERATORS
    for name in signatures(operator.kind, *operator.split)
    if (operator.kind, name) != ("attention", "ring")  # computes as it communicates: the executor's own test
]


@pytest.mark.parametrize(("operator", "name"), CASES, ids=lambda x: x if isinstance(x, str) else x.kind)
@settings(max_examples=8, deadline=None)
@given(ranks=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_a_signature_computes_what_the_unsharded_operator_does(operator, name, ranks, seed):
    """Values from inputs in the layouts asked for, then gradients from the outputs' gradients, on uneven parts."""
    signature = signatures(operator.kind, *operator.split)[name]
    rng = np.random.default_rng(seed)

    def random(dims):
        return rng.standard_normal([SIZES[d] for d in dims])

    x, w = [random(d) for d in operator.inputs], [random(d) for d in operator.parameters]
    y = operator.forward(x, w, lambda dim, _: np.arange(SIZES[dim]))
    dy = [rng.standard_normal(out.shape) for out in y]
    dx, dw = operator.backward(x, w, y, dy, lambda dim, _: np.arange(SIZES[dim]))

    def placed(rank):
        def place(dim, which):
            layout = signature.parameters if which == "parameter" else signature.inputs[which]
            return rows_of(rank, ranks, layout, dim, SIZES[dim])

        return place

    def spread_all(values, dims, layouts):
        held = [spread(rng, v, d, layout, ranks) for v, d, layout in zip(values, dims, layouts, strict=True)]
        return [[tensor[rank] for tensor in held] for rank in range(ranks)]

    weights = [signature.parameters] * len(w)
    local_x = spread_all(x, operator.inputs, signature.inputs)
    local_w = spread_all(w, operator.parameters, weights)
    local_y = [operator.forward(local_x[r], local_w[r], placed(r)) for r in range(ranks)]
    for i, (dims, layout) in enumerate(zip(operator.outputs, signature.outputs, strict=True)):
        np.testing.assert_allclose(whole([out[i] for out in local_y], dims, layout), y[i], rtol=1e-9, atol=1e-9)

    local_dy = spread_all(dy, operator.outputs, signature.grad_outputs)
    found = [operator.backward(local_x[r], local_w[r], local_y[r], local_dy[r], placed(r)) for r in range(ranks)]
    for i, (dims, layout) in enumerate(zip(operator.inputs, signature.grad_inputs, strict=True)):
        got = whole([gradient[0][i] for gradient in found], dims, layout)
        np.testing.assert_allclose(got, dx[i], rtol=1e-9, atol=1e-9)
    for i, dims in enumerate(operator.parameters):
        got = whole([gradient[1][i] for gradient in found], dims, signature.grad_parameters)
        np.testing.assert_allclose(got, dw[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["replicate", "batch", "seq", "vocab"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cross_entropy_in_three_steps_never_gathers_logits(name, ranks):
    """Maximum, sum of exponentials, loss: the logits' gradient passes back through the two steps before unchanged."""
    rng = np.random.default_rng(ranks)
    dims, statistics = ("seq", "batch", "vocab"), ("seq", "batch")
    logits, bias = rng.standard_normal((S, B, V)), rng.standard_normal(V)
    targets = rng.integers(V, size=(S, B))
    top, total, loss = (signatures(kind)[name] for kind in ("logits_max", "exp_sum", "loss"))
    sharded = Shard("vocab") in (top.inputs[0],)

    z = logits + bias
    log_sum = np.log(np.exp(z).sum(-1))
    value = (log_sum - np.take_along_axis(z, targets[..., None], -1)[..., 0]).sum()
    gradient = np.exp(z - log_sum[..., None]) - (targets[..., None] == np.arange(V))

    edges = cuts(V, ranks)
    columns = [np.arange(edges[r], edges[r + 1]) if sharded else np.arange(V) for r in range(ranks)]
    local = spread(rng, logits, dims, top.inputs[0], ranks)
    biased = [local[r] + bias[columns[r]] for r in range(ranks)]
    maximum = [b.max(-1) for b in biased]
    np.testing.assert_allclose(whole(maximum, statistics, top.outputs[1]), z.max(-1))
    kind = redistribution(top.outputs[1], total.inputs[1])
    maximum = collective(kind, maximum, statistics, top.outputs[1], total.inputs[1], ranks)
    held_targets = spread(rng, targets, statistics, R if sharded else total.inputs[1], ranks)
    exp = [np.exp(biased[r] - maximum[r][..., None]) for r in range(ranks)]
    is_target = [held_targets[r][..., None] == columns[r] for r in range(ranks)]
    sums = [np.stack([exp[r].sum(-1), (biased[r] * is_target[r]).sum(-1)], -1) for r in range(ranks)]
    kind = redistribution(total.outputs[1], loss.inputs[1])
    sums = collective(kind, sums, (*statistics, "two"), total.outputs[1], loss.inputs[1], ranks)
    losses = [np.asarray((np.log(s[..., 0]) + m - s[..., 1]).sum()) for s, m in zip(sums, maximum, strict=True)]
    np.testing.assert_allclose(whole(losses, (), loss.outputs[0]), value)

    assert loss.grad_outputs[0] == R, "the loss's own gradient is 1 on every rank"
    d = [exp[r] / sums[r][..., :1] - is_target[r] for r in range(ranks)]
    for step in (loss, total, top):  # the gradient passes from step to step with no redistribution
        assert step.grad_inputs[0] == loss.grad_inputs[0]
        np.testing.assert_allclose(whole(d, dims, step.grad_inputs[0]), gradient, rtol=1e-9, atol=1e-9)
    assert total.grad_outputs[0] == loss.grad_inputs[0]
    assert top.grad_outputs[0] == total.grad_inputs[0]
    np.testing.assert_allclose(whole([g.sum((0, 1)) for g in d], ("vocab",), top.grad_parameters), gradient.sum((0, 1)))


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(PlanError, match=r"operator kind 'convolution' has no signatures; known kinds are .*linear"):
        signatures("convolution")


# ---- the three costs of a linear layer -------------------------------------------------------------------------------


def ring_volume(kind, elements):
    """Elements that each rank sends in a ring, (p-1)/p dropped."""
    return {None: 0, "slice": 0, "all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}[kind] * elements


@given(batch=st.integers(1, 99), cin=st.integers(1, 99), cout=st.integers(1, 99))
def test_three_costs_of_a_linear_layer(batch, cin, cout):
    """y[B, Cout] = x[B, Cin]·W: data parallel, partition output, reduce output; ring convention, (p-1)/p dropped."""
    table = signatures("linear", "in", "out")

    def cost(name, source, sink, grad_source, grad_sink):
        s = table[name]
        forward = ring_volume(redistribution(source, s.inputs[0]), batch * cin)
        forward += ring_volume(redistribution(s.outputs[0], sink), batch * cout)
        backward = ring_volume(redistribution(grad_sink, s.grad_outputs[0]), batch * cout)
        backward += ring_volume(redistribution(s.grad_inputs[0], grad_source), batch * cin)
        sync = ring_volume(redistribution(s.grad_parameters, s.parameters), cin * cout)
        return forward, backward, sync

    shard_batch, shard_in, shard_out = Shard("batch"), Shard("in"), Shard("out")
    assert cost("batch", shard_batch, shard_batch, shard_batch, shard_batch) == (0, 0, 2 * cin * cout)
    assert cost("column", shard_in, shard_out, shard_in, shard_out) == (batch * cin, batch * cin, 0)
    assert cost("row", shard_in, R, shard_in, R) == (2 * batch * cout, 0, 0)
