"""ModelSpec: the numbers that define a transformer, how to change them, and what they add up to.

`model_flops` counts the whole attention square, as Narayanan et al. 2021 (arXiv 2104.04473, eq. 3) and PaLM (Chowdhery
et al. 2022, arXiv 2204.02311, appendix B) do, so that an MFU printed here compares with theirs, whatever the mask lets
through. It counts matrix products alone (a multiply-add is 2 FLOPs), without recomputation.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict, Unpack, get_args

import msgspec

from planner.errors import ModelError

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Norm = Literal["layer", "rms"]
NormPosition = Literal["pre", "post"]
Positions = Literal["learned", "rotary"]

NUM_BYTES = 256
PAD, MASK, CLS, SEP = range(NUM_BYTES, NUM_BYTES + 4)  # token ids of the byte vocabulary's special tokens
BYTE_VOCAB = NUM_BYTES + 4

_POSITIVE = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn_hidden", "seq_len", "vocab", "max_positions")
MOST = 2**31 - 1  # of any size of a model: tokens and positions are counted in 32 bits
MOST_LAYERS = 2**12  # four times the deepest ones (Wang et al. 2022, arXiv 2203.00555): each is planned on its own
MOST_PARAMETERS = 2**56  # what 64 bits count in bytes, with gradients and moments

_CHOICES = {
    "activation": get_args(Activation),
    "norm": get_args(Norm),
    "norm_position": get_args(NormPosition),
    "positions": get_args(Positions),
}


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A transformer encoder or decoder stack with token embedding and language-model head.

    `layers` blocks of width `hidden` with `heads` query heads and `kv_heads` key/value heads of `head_dim` each
    (Ainslie et al. 2023, arXiv 2305.13245), over sequences of `seq_len` tokens out of `vocab`. A feed-forward block is
    `activation(x W1) W2`, or `(activation(x W1) * (x W3)) W2` when `gated_ffn` (Shazeer 2020, arXiv 2002.05202), with
    any of the activations.

    Raises:
        ModelError: A value is out of range, or two fields contradict each other.
    """

    name: str = "custom"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_hidden: int  # per branch when gated
    seq_len: int
    vocab: int
    causal: bool = False
    gated_ffn: bool = False
    activation: Activation = "gelu"
    norm: Norm = "layer"
    norm_position: NormPosition = "post"
    norm_epsilon: float = 1e-12
    norm_bias: bool = True
    positions: Positions = "learned"
    max_positions: int = 512  # rows of the learned position table; unused with rotary positions
    rope_theta: float = 10000.0
    rope_local_theta: float | None = None  # theta of layers with a local attention window (ModernBERT)
    token_types: int = 0  # rows of the token-type (segment) table; every token has type 0 in training here
    embedding_norm: bool = False  # a norm right after the embedding sum (BERT, ModernBERT)
    final_norm: bool = False  # a norm between the last layer and the head (pre-norm models)
    first_attention_norm: bool = True  # ModernBERT's first layer has no norm before its attention
    qkv_bias: bool = True
    out_bias: bool = True
    ffn_bias: bool = True
    head_bias: bool = False
    head_transform: bool = False  # dense + activation + norm before the vocabulary projection (masked-LM heads)
    head_transform_bias: bool = True
    tie_embeddings: bool = True
    qk_norm: bool = False  # RMS norm with a gain of head_dim on every query and key head (Qwen3)
    attention_window: int | None = None  # a query sees keys at distance < window (causal) or <= window/2 (both sides)
    global_attention_every: int = 0  # layer i attends globally when i % this == 0; 0: every layer has the window

    def __post_init__(self) -> None:
        """Refuse a description that no model has."""
        _check_values(self)
        _check_attention(self)
        _check_norms(self)
        _check_parameters(self)

    @property
    def query_size(self) -> int:
        """Width of all query heads together, also the input width of the attention output projection."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; the value heads are as wide."""
        return self.kv_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """Attention window of one layer (counted from 0), None where it attends to the whole sequence."""
        if self.global_attention_every and layer % self.global_attention_every == 0:
            return None
        return self.attention_window

    def theta(self, layer: int) -> float:
        """Base of the rotary frequencies of one layer: windowed layers may have their own."""
        if self.rope_local_theta is not None and self.window(layer) is not None:
            return self.rope_local_theta
        return self.rope_theta

    def has_attention_norm(self, layer: int) -> bool:
        """Whether the layer has an attention norm; ModernBERT's first layer reads normalised embeddings without one."""
        return self.first_attention_norm or layer > 0


_FLAGS = tuple(field.name for field in msgspec.structs.fields(ModelSpec) if field.type is bool)


def _check_values(spec: ModelSpec) -> None:
    """Every field alone: its type and range."""
    _check_integer("layers", spec.layers, 1, MOST_LAYERS)
    for field, least in [(name, 1) for name in _POSITIVE] + [("token_types", 0), ("global_attention_every", 0)]:
        _check_integer(field, getattr(spec, field), least)
    if spec.attention_window is not None:
        _check_integer("attention_window", spec.attention_window, 1)
    thetas = {"rope_theta": spec.rope_theta}
    if spec.rope_local_theta is not None:
        thetas["rope_local_theta"] = spec.rope_local_theta
    for field, number in {"norm_epsilon": spec.norm_epsilon, **thetas}.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise ModelError(f"{field}={number!r} is not a positive number; give one above 0")
    for field, allowed in _CHOICES.items():
        if getattr(spec, field) not in allowed:
            raise ModelError(f"{field}={getattr(spec, field)!r} is not modelled; use one of {', '.join(allowed)}")
    for field in _FLAGS:
        if not isinstance(getattr(spec, field), bool):
            raise ModelError(f"{field}={getattr(spec, field)!r} is not a yes or no; use true or false")


def _check_integer(field: str, value: object, least: int, most: int = MOST) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ModelError(f"{field}={value!r} is not an integer of at least {least}; give {field} >= {least}")
    if value > most:
        raise ModelError(f"{field}={value} exceeds the {most} that can be planned for; give {field} <= {most}")


def _check_attention(spec: ModelSpec) -> None:
    """Heads, positions and windows together."""
    if spec.heads % spec.kv_heads:
        small = [n for n in range(1, math.isqrt(spec.heads) + 1) if spec.heads % n == 0]
        divisors = ", ".join(str(n) for n in sorted({*small, *(spec.heads // n for n in small)}))
        raise ModelError(
            f"kv_heads={spec.kv_heads} does not divide the {spec.heads} attention heads; use one of {divisors}"
        )
    if spec.positions == "learned" and spec.seq_len > spec.max_positions:
        raise ModelError(
            f"seq_len={spec.seq_len} exceeds the {spec.max_positions} rows of the learned position table; "
            f"use seq_len<={spec.max_positions}, raise max_positions, or use rotary positions"
        )
    if spec.positions == "rotary" and spec.head_dim % 2:
        raise ModelError(
            f"head_dim={spec.head_dim} is odd, and rotary positions turn pairs of coordinates; "
            "choose hidden and heads with an even quotient, or use learned positions"
        )
    if spec.rope_local_theta is not None and (spec.positions != "rotary" or spec.attention_window is None):
        raise ModelError(
            f"rope_local_theta={spec.rope_local_theta} is for rotary layers with a local attention window, and this "
            "model has none; set attention_window and rotary positions, or leave rope_local_theta out"
        )
    if spec.global_attention_every and spec.attention_window is None:
        raise ModelError(
            f"global_attention_every={spec.global_attention_every} without attention_window says nothing: every "
            "layer is global; set attention_window, or global_attention_every=0"
        )


def _check_norms(spec: ModelSpec) -> None:
    """Norm kind and place together."""
    if spec.norm == "rms" and spec.norm_bias:
        raise ModelError("norm_bias=true with norm=rms: an RMS norm has a gain and no bias; set norm_bias=false")
    if spec.norm_position == "post" and spec.final_norm:
        raise ModelError(
            "final_norm=true with norm_position=post: a post-norm layer already ends in its norm; "
            "set final_norm=false, or norm_position=pre"
        )
    if spec.norm_position == "post" and not spec.first_attention_norm:
        raise ModelError(
            "first_attention_norm=false with norm_position=post: only a pre-norm first layer can leave its norm to the "
            "embedding; set first_attention_norm=true, or norm_position=pre"
        )


def _check_parameters(spec: ModelSpec) -> None:
    """All sizes together."""
    if (total := parameters(spec).total) > MOST_PARAMETERS:
        raise ModelError(
            f"the model has {total:.3g} parameters, more than the {MOST_PARAMETERS:.3g} that can be planned for; "
            "use smaller sizes or fewer layers"
        )


def base_spec() -> ModelSpec:
    """The model when none is named: BERT-base on bytes, 128 tokens a sequence.

    The vocabulary is the 256 byte values and the tokens PAD=256, MASK=257, CLS=258, SEP=259.
    """
    return ModelSpec(
        name="bert-base-bytes",
        layers=12,
        hidden=768,
        heads=12,
        kv_heads=12,
        head_dim=64,
        ffn_hidden=3072,
        seq_len=128,
        vocab=BYTE_VOCAB,
        token_types=2,
        embedding_norm=True,
        head_bias=True,
        head_transform=True,
    )


class Sizes(TypedDict, total=False):
    """The sizes that `with_sizes` changes: the command line's model options. None keeps the model's own."""

    layers: int | None
    hidden: int | None
    heads: int | None
    kv_heads: int | None
    ffn_hidden: int | None
    seq_len: int | None
    vocab: int | None
    causal: bool | None
    gated_ffn: bool | None
    norm: Norm | None
    norm_position: NormPosition | None
    positions: Positions | None
    tie_embeddings: bool | None


def with_sizes(spec: ModelSpec | None = None, **sizes: Unpack[Sizes]) -> ModelSpec:
    """A model with some of its sizes changed (`base_spec` without a model).

    What depends on a changed size follows it, and nothing else changes:

    * `hidden` or `heads` given: `head_dim` is hidden/heads; `ffn_hidden` is 4·hidden and `kv_heads` heads unless given.
    * A learned position table grows to `seq_len` rows where it is shorter and never shrinks; a new one has `seq_len`.
    * RMS norms lose their bias, layer norms in place of RMS norms gain one.
    * Post-norm drops the final norm, pre-norm in place of post-norm gains one.
    * Learned positions drop the second rotary base of windowed layers.

    The name lists the sizes that differ from the model it started from, as in `gpt2(layers=4)`.

    Raises:
        ModelError: The heads do not divide the hidden size, or the result is no valid model.
    """
    if unknown := sizes.keys() - Sizes.__annotations__.keys():
        raise TypeError(f"with_sizes changes no {', '.join(sorted(unknown))}")
    spec = base_spec() if spec is None else spec
    changes: dict[str, Any] = {field: value for field, value in sizes.items() if value is not None}
    changes |= _width_changes(spec, changes)
    differing = [f"{field}={value}" for field, value in changes.items() if value != getattr(spec, field)]
    if differing:
        changes["name"] = f"{spec.name}({', '.join(differing)})"
    return msgspec.structs.replace(spec, **_consequences(spec, changes), **changes)


def _width_changes(spec: ModelSpec, changes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that follow `hidden` and `heads`, less those that were given."""
    if not {"hidden", "heads"} & changes.keys():
        return {}
    hidden, heads = changes.get("hidden", spec.hidden), changes.get("heads", spec.heads)
    _check_integer("hidden", hidden, 1)
    _check_integer("heads", heads, 1)
    if hidden % heads:
        below = hidden - hidden % heads or heads
        raise ModelError(f"heads={heads} does not divide hidden={hidden}; use heads that do, or hidden={below}")
    follow = {"head_dim": hidden // heads, "ffn_hidden": 4 * hidden, "kv_heads": heads}
    return {field: value for field, value in follow.items() if field not in changes}


def _consequences(spec: ModelSpec, changes: dict[str, Any]) -> dict[str, Any]:
    """The fields that a change of positions or norms drags along; see `with_sizes`."""
    follow: dict[str, Any] = {}
    if changes.get("positions", spec.positions) == "learned":
        _check_integer("seq_len", seq_len := changes.get("seq_len", spec.seq_len), 1)
        follow["max_positions"] = max(spec.max_positions, seq_len) if spec.positions == "learned" else seq_len
        follow["rope_local_theta"] = None
    if changes.get("norm", spec.norm) != spec.norm:
        follow["norm_bias"] = changes["norm"] == "layer"
    if changes.get("norm_position", spec.norm_position) != spec.norm_position:
        follow["final_norm"] = changes["norm_position"] == "pre"
        follow["first_attention_norm"] = True
    return follow


class LayerParameters(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of one layer, biases included."""

    attention: int  # query, key, value and output projections, gains of the query and key norms
    ffn: int
    norms: int

    @property
    def total(self) -> int:
        """Parameters of the whole layer."""
        return self.attention + self.ffn + self.norms


class ParameterCount(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a model by part. A tied output matrix is the token table, counted once, in `embedding`."""

    embedding: int  # token, position and token-type tables, embedding norm
    layers: tuple[LayerParameters, ...]
    final_norm: int
    head: int  # transform, its norm, output matrix where it is not tied, output bias

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return self.embedding + sum(layer.total for layer in self.layers) + self.final_norm + self.head


def parameters(spec: ModelSpec) -> ParameterCount:
    """Exact parameter count of the trained model: stack, embedding and language-model head, no pooler."""
    hidden, norm = spec.hidden, spec.hidden * (1 + spec.norm_bias)
    query, kv, branches = spec.query_size, spec.kv_size, 2 if spec.gated_ffn else 1
    attention = (
        (hidden + spec.qkv_bias) * (query + 2 * kv)
        + (query + spec.out_bias) * hidden
        + 2 * spec.head_dim * spec.qk_norm
    )
    ffn = (hidden + spec.ffn_bias) * branches * spec.ffn_hidden + (spec.ffn_hidden + spec.ffn_bias) * hidden
    positions = spec.max_positions if spec.positions == "learned" else 0
    transform = (hidden + spec.head_transform_bias) * hidden + norm if spec.head_transform else 0
    output = 0 if spec.tie_embeddings else spec.vocab * hidden
    return ParameterCount(
        embedding=(spec.vocab + positions + spec.token_types) * hidden + norm * spec.embedding_norm,
        layers=tuple(
            LayerParameters(attention=attention, ffn=ffn, norms=norm * (1 + spec.has_attention_norm(layer)))
            for layer in range(spec.layers)
        ),
        final_norm=norm * spec.final_norm,
        head=transform + output + spec.vocab * spec.head_bias,
    )


class ForwardFlops(msgspec.Struct, frozen=True, kw_only=True):
    """FLOPs of the matrix products of one forward pass of one sequence, by part."""

    linear_flops: int  # projections and feed-forward blocks of all layers
    attention_flops: int  # Q·Kᵀ and P·V of all layers
    head_flops: int  # transform and output projection

    @property
    def total_flops(self) -> int:
        """FLOPs of the whole forward pass."""
        return self.linear_flops + self.attention_flops + self.head_flops


def attention_pairs(seq_len: int, *, causal: bool, window: int | None = None) -> int:
    """Number of (query, key) pairs that the mask of one head lets through.

    A causal query at i sees keys i−window < j <= i, another |i−j| <= window/2. So causal without a window is
    S(S+1)/2: the square's half, and half its diagonal.
    """
    if causal:
        span = seq_len if window is None else min(window, seq_len)
        return span * (span + 1) // 2 + (seq_len - span) * span
    reach = seq_len - 1 if window is None else min(window // 2, seq_len - 1)
    return seq_len * (2 * reach + 1) - reach * (reach + 1)


def forward_flops(spec: ModelSpec) -> ForwardFlops:
    """FLOPs of one sequence's forward pass: 2 per weight and token, 4·head_dim per head and query-key pair."""
    projections = spec.hidden * (2 * spec.query_size + 2 * spec.kv_size)
    ffn = spec.hidden * spec.ffn_hidden * (3 if spec.gated_ffn else 2)
    head = spec.hidden * (spec.vocab + spec.hidden * spec.head_transform)
    return ForwardFlops(
        linear_flops=2 * spec.seq_len * spec.layers * (projections + ffn),
        attention_flops=4 * spec.layers * spec.seq_len**2 * spec.query_size,
        head_flops=2 * spec.seq_len * head,
    )


def model_flops(spec: ModelSpec) -> int:
    """Model FLOPs of training on one sequence, forward and backward (3 forward passes), whole attention square.

    For a GPT this is 72 S l h² (1 + S/6h + V/12lh). Narayanan et al. 2021, eq. 3, has 96 and V/16lh because it adds a
    second forward pass of the layers for full recomputation. The numerator of an MFU.
    """
    return 3 * forward_flops(spec).total_flops
