"""The operator graph of a model: one `Operator` per node of a networkx.DiGraph, tensors on the edges.

The graph is logical: whole tensors, no workers. `planner.program` lays it out on a mesh. Operators name the dimensions
of their tensors, never numbers, so the same graph is priced with integers (one plan) or with NumPy arrays (all
candidates of a search at once).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import networkx as nx

from planner.model import ModelSpec

Block = Literal["embedding", "layer", "head"]

SPLIT_UNIT = {
    "qkv": "heads",  # packed [Q | K | V] columns
    "attended": "heads",  # heads · head_dim
    "kv_heads": "heads",
    "qk_heads": "heads",  # query heads, then key heads
    "gate_up": "ffn",  # packed [gate | up] columns
    "key_seq": "seq",
}
"""Dimensions that are split in the units of another one."""


def split_unit(dim: str) -> str:
    """The name under which a dimension is split in a layout: Shard("heads") splits packed QKV columns too."""
    return SPLIT_UNIT.get(dim, dim)


@dataclass(frozen=True, slots=True)
class Tensor:
    """An edge's payload: a whole tensor by name and named dimensions, outermost first (activations: seq, batch, …)."""

    name: str
    dims: tuple[str, ...]
    alias_of: str | None = None  # the operator writes it into the buffer of this tensor


@dataclass(frozen=True, slots=True)
class Parameter:
    """A trainable tensor; `init` says how it starts, `decay` whether weight decay applies (matrices only)."""

    name: str
    dims: tuple[str, ...]
    init: Literal["normal", "zeros", "ones"] = "normal"

    @property
    def decay(self) -> bool:
        """Weight decay acts on matrices, not on biases and gains (as in GPT-2's and BERT's optimizers)."""
        return len(self.dims) > 1


@dataclass(frozen=True, slots=True)
class Operator:
    """One node: what is computed, on which tensors, with which parameters.

    `saved` are further outputs that only the operator's own backward pass reads (norm statistics, probabilities).
    """

    name: str  # "layers.3.qkv"
    role: str  # "layer.qkv": the same for every layer; names the operator in keys
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[Tensor, ...]
    parameters: tuple[Parameter, ...] = ()
    saved: tuple[Tensor, ...] = ()
    split: tuple[str, str] = ("hidden", "hidden")  # of a linear layer: the input's and output's split dimension
    attributes: dict[str, Any] = field(default_factory=dict)


HIDDEN = ("seq", "batch", "hidden")
STATISTICS = ("seq", "batch")


class _Builder:
    """Appends operators to the graph and connects each to the producers of its inputs."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.graph: nx.DiGraph[str] = nx.DiGraph()
        self.producer: dict[str, str] = {}

    def add(
        self, block: str, short: str, kind: str, inputs: tuple[str, ...], outputs: tuple[Tensor, ...], **more: Any
    ) -> None:
        """Add one operator of `block` ("embedding", "layers.3", "head")."""
        role = f"{'layer' if block.startswith('layers') else block}.{short}"
        operator = Operator(f"{block}.{short}", role, kind, inputs, outputs, **more)
        self.graph.add_node(operator.name, operator=operator, block=block)
        for name in inputs:
            if name in self.producer:
                self.graph.add_edge(self.producer[name], operator.name, tensor=name)
        for tensor in outputs:
            self.producer[tensor.name] = operator.name

    def linear(
        self, block: str, short: str, source: str, out: Tensor, dims: tuple[str, str], *, weight: str | None = None
    ) -> None:
        """Add y = x·W without bias; the bias belongs to the operator that follows, after any reduction over ranks."""
        transposed = weight is not None
        stored = (dims[1], dims[0]) if transposed else dims
        self.add(
            block, short, "linear", (source,), (out,),
            parameters=(Parameter(weight or f"{block}.{short}.weight", stored),),
            split=(split_unit(dims[0]), split_unit(dims[1])),
            attributes={"transposed": transposed, "dims": dims},
        )  # fmt: skip

    def gains(self, prefix: str) -> tuple[Parameter, ...]:
        """Gain and, where the model has one, bias of a norm."""
        gain = Parameter(f"{prefix}.gain", ("hidden",), "ones")
        if self.spec.norm == "layer" and self.spec.norm_bias:
            return gain, Parameter(f"{prefix}.bias", ("hidden",), "zeros")
        return (gain,)

    def statistics(self, prefix: str) -> tuple[Tensor, ...]:
        """What a norm saves for its backward pass: 1/deviation and, for LayerNorm, the mean of each token."""
        rstd = Tensor(f"{prefix}.rstd", STATISTICS)
        return (Tensor(f"{prefix}.mean", STATISTICS), rstd) if self.spec.norm == "layer" else (rstd,)

    def norm(self, block: str, short: str, source: str, out: str) -> None:
        """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""
        name = f"{block}.{short}"
        self.add(
            block, short, "norm", (source,), (Tensor(out, HIDDEN),),
            parameters=self.gains(name), saved=self.statistics(name),
        )  # fmt: skip

    def residual(
        self, block: str, short: str, source: str, stream: str, out: str, *, bias: bool, normed: str | None
    ) -> None:
        """Add out = stream + dropout(source + bias) and, if `normed` is given, the norm of the sum in the same pass."""
        name = f"{block}.{short}"
        biases = (Parameter(f"{name}.bias_in", ("hidden",), "zeros"),) if bias else ()
        if normed is None:
            self.add(block, short, "residual", (source, stream), (Tensor(out, HIDDEN),), parameters=biases)
            return
        self.add(
            block, short, "residual_norm", (source, stream), (Tensor(out, HIDDEN), Tensor(normed, HIDDEN)),
            parameters=biases + self.gains(name), saved=self.statistics(name),
        )  # fmt: skip

    def activation(self, block: str, short: str, source: str, out: Tensor, bias: Parameter | None) -> None:
        """Add out = f(source + bias); keeps f' in the source's buffer for the backward pass."""
        self.add(
            block, short, "activation", (source,), (out,),
            parameters=(bias,) if bias else (),
            saved=(Tensor(f"{source}.derivative", out.dims, alias_of=source),),
            attributes={"activation": self.spec.activation},
        )  # fmt: skip

    def embedding(self) -> str:
        """Token embedding, positions and token types, dropout on their sum (Vaswani et al. 2017, §5.4), norm."""
        spec, block = self.spec, "embedding"
        table = Parameter("embedding.tokens.weight", ("vocab", "hidden"))
        self.add(block, "tokens", "embedding", ("ids",), (Tensor("embedding.token", HIDDEN),), parameters=(table,))
        tables = []
        if spec.positions == "learned":
            tables.append(Parameter("embedding.positions.weight", ("positions", "hidden")))
        if spec.token_types:
            tables.append(Parameter("embedding.types.weight", ("types", "hidden")))
        self.add(
            block, "positions", "positions", ("embedding.token",), (Tensor("embedding.sum", HIDDEN),),
            parameters=tuple(tables),
        )  # fmt: skip
        if not spec.embedding_norm:
            return "embedding.sum"
        self.norm(block, "norm", "embedding.sum", "embedding.normed")
        return "embedding.normed"

    def qk_saved(self, block: str) -> tuple[Tensor, ...]:
        """What the norms of query and key heads save: the heads before the norm and 1/deviation of each."""
        if not self.spec.qk_norm:
            return ()
        dims = ("seq", "batch", "qk_heads")
        return Tensor(f"{block}.qk_before_norm", (*dims, "head_dim")), Tensor(f"{block}.qk_rstd", dims)

    def attention(self, block: str, layer: int, source: str) -> str:
        """Packed projection, per-head biases, norms and rotation, attention core, output projection."""
        spec = self.spec
        qkv, kv = f"{block}.qkv", ("seq", "batch", "kv_heads", "head_dim")
        self.linear(block, "qkv", source, Tensor(qkv, ("seq", "batch", "qkv")), ("hidden", "qkv"))
        extras = [Parameter(f"{block}.split_heads.bias", ("qkv",), "zeros")] if spec.qkv_bias else []
        if spec.qk_norm:
            extras += [Parameter(f"{block}.split_heads.{x}_gain", ("head_dim",), "ones") for x in "qk"]
        self.add(
            block, "split_heads", "split_heads", (qkv,),
            (
                Tensor(f"{block}.q", ("seq", "batch", "heads", "head_dim"), alias_of=qkv),
                Tensor(f"{block}.k", kv, alias_of=qkv),
                Tensor(f"{block}.v", kv, alias_of=qkv),
            ),
            parameters=tuple(extras),
            saved=self.qk_saved(block),
            attributes={"theta": spec.theta(layer) if spec.positions == "rotary" else None},
        )  # fmt: skip
        self.add(
            block, "attention", "attention", (f"{block}.q", f"{block}.k", f"{block}.v"),
            (Tensor(f"{block}.attended", ("seq", "batch", "attended")),),
            attributes={"window": spec.window(layer), "causal": spec.causal, "layer": layer},
        )  # fmt: skip
        out = Tensor(f"{block}.attention_out", HIDDEN)
        self.linear(block, "attention_out", f"{block}.attended", out, ("attended", "hidden"))
        return out.name

    def feed_forward(self, block: str, source: str) -> str:
        """Two linear layers around an activation, or the gated form (Shazeer 2020, arXiv:2002.05202)."""
        spec = self.spec
        inner, hidden = "gate_up" if spec.gated_ffn else "ffn", f"{block}.ffn"
        before = Tensor(f"{block}.ffn_in", ("seq", "batch", inner))
        bias = Parameter(f"{block}.activation.bias", (inner,), "zeros") if spec.ffn_bias else None
        self.linear(block, "ffn_in", source, before, ("hidden", inner))
        if spec.gated_ffn:
            self.add(
                block, "activation", "gated", (before.name,), (Tensor(hidden, ("seq", "batch", "ffn")),),
                parameters=(bias,) if bias else (), attributes={"activation": spec.activation},
            )  # fmt: skip
        else:
            self.activation(block, "activation", before.name, Tensor(hidden, ("seq", "batch", "ffn")), bias)
        self.linear(block, "ffn_out", hidden, Tensor(f"{block}.ffn_out", HIDDEN), ("ffn", "hidden"))
        return f"{block}.ffn_out"

    def layer(self, index: int, source: str) -> str:
        """One encoder layer, post-norm (Vaswani et al. 2017) or pre-norm (Xiong et al. 2020)."""
        spec, block = self.spec, f"layers.{index}"
        pre = spec.norm_position == "pre"
        entry = source
        if pre and (index or spec.first_attention_norm):
            entry = f"{block}.attention_normed"
            self.norm(block, "attention_norm", source, entry)
        attended = self.attention(block, index, entry)
        middle, normed = f"{block}.middle", f"{block}.middle_normed"
        self.residual(block, "attention_residual", attended, source, middle, bias=spec.out_bias, normed=normed)
        out = self.feed_forward(block, normed)
        if pre:
            self.residual(block, "ffn_residual", out, middle, f"{block}.out", bias=spec.ffn_bias, normed=None)
        else:
            self.residual(block, "ffn_residual", out, normed, f"{block}.sum", bias=spec.ffn_bias, normed=f"{block}.out")
        return f"{block}.out"

    def head(self, source: str) -> None:
        """Final norm, masked-LM transform, vocabulary projection, cross-entropy in three vocabulary-parallel steps."""
        spec, block = self.spec, "head"
        if spec.final_norm:
            self.norm(block, "norm", source, "head.normed")
            source = "head.normed"
        if spec.head_transform:
            self.linear(block, "transform", source, Tensor("head.transform", HIDDEN), ("hidden", "hidden"))
            bias = Parameter("head.activation.bias", ("hidden",), "zeros") if spec.head_transform_bias else None
            self.activation(block, "activation", "head.transform", Tensor("head.transformed", HIDDEN), bias)
            self.norm(block, "transform_norm", "head.transformed", "head.transform_normed")
            source = "head.transform_normed"
        tied = "embedding.tokens.weight" if spec.tie_embeddings else None
        dims = ("seq", "batch", "vocab")
        self.linear(block, "vocab", source, Tensor("head.logits", dims), ("hidden", "vocab"), weight=tied)
        biases = (Parameter("head.logits_max.bias", ("vocab",), "zeros"),) if spec.head_bias else ()
        self.add(
            block, "logits_max", "logits_max", ("head.logits",),
            (Tensor("head.biased", dims, alias_of="head.logits"), Tensor("head.max", STATISTICS)),
            parameters=biases,
        )  # fmt: skip
        self.add(
            block, "exp_sum", "exp_sum", ("head.biased", "head.max"),
            (Tensor("head.exp", dims, alias_of="head.biased"), Tensor("head.stats", (*STATISTICS, "two"))),
        )  # fmt: skip
        self.add(block, "loss", "loss", ("head.exp", "head.stats"), (Tensor("loss", ()),))


def build_graph(spec: ModelSpec) -> nx.DiGraph[str]:
    """The whole model as a DiGraph; nodes carry `operator` and `block`, edges `tensor`, in topological order."""
    builder = _Builder(spec)
    stream = builder.embedding()
    for index in range(spec.layers):
        stream = builder.layer(index, stream)
    builder.head(stream)
    return builder.graph


def operators(graph: nx.DiGraph[str], block: str | None = None) -> list[Operator]:
    """The operators of the graph, or of one block ("embedding", "layers.3", "head"), in order."""
    return [node["operator"] for _, node in graph.nodes(data=True) if block is None or node["block"] == block]
