"""The operator graph: parameters against independent counts, dimensions, edges, and what each family is made of."""

import math

import networkx as nx
import pytest
from small_plans import BERT, LLAMA, MODELS

from planner.graph import build_graph, operators, split_unit
from planner.layout import Shard, signatures
from planner.model import forward_flops, parameters
from planner.model.presets import PRESETS, preset
from planner.placement import fixed_size

PRESET_NAMES = sorted(PRESETS)


def extents(spec):
    """Every dimension's whole extent."""
    whole = {
        "seq": spec.seq_len, "key_seq": spec.seq_len, "batch": 1, "heads": spec.heads, "kv_heads": spec.kv_heads,
        "qk_heads": spec.heads + spec.kv_heads, "ffn": spec.ffn_hidden, "gate_up": 2 * spec.ffn_hidden,
        "vocab": spec.vocab, "attended": spec.heads * spec.head_dim,
        "qkv": (spec.heads + 2 * spec.kv_heads) * spec.head_dim,
    }  # fmt: skip
    return lambda dim: whole[dim] if dim in whole else fixed_size(spec, dim)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_parameters_add_up_to_the_models_count(name):
    """Two independent counts: shapes of the graph's parameters, and the closed forms of planner.model."""
    spec = preset(name)
    size = extents(spec)
    shapes = {p.name: p.dims for operator in operators(build_graph(spec)) for p in operator.parameters}
    assert sum(math.prod(size(dim) for dim in dims) for dims in shapes.values()) == parameters(spec).total


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_products_add_up_to_the_forward_flops(name):
    """2·m·n·k of every linear layer and 4·S²·d per head, against planner.model's formula (Narayanan et al. 2021)."""
    spec = preset(name)
    size = extents(spec)
    linear = attention = 0
    for operator in operators(build_graph(spec)):
        if operator.kind == "linear":
            rows, columns = operator.attributes["dims"]
            linear += 2 * spec.seq_len * size(rows) * size(columns)
        elif operator.kind == "attention":
            attention += 4 * spec.seq_len**2 * spec.heads * spec.head_dim
    counted = forward_flops(spec)
    assert linear == counted.linear_flops + counted.head_flops
    assert attention == counted.attention_flops


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_every_input_has_one_producer_of_the_same_tensor(spec):
    graph = build_graph(spec)
    assert nx.is_directed_acyclic_graph(graph)
    assert list(graph) == [operator.name for operator in operators(graph)]
    made = {}
    for operator in operators(graph):
        for name in operator.inputs:
            if name in made:
                assert graph.has_edge(made[name], operator.name)
            else:
                assert name == "ids", f"{operator.name} reads {name}, which nothing made"
        for tensor in operator.outputs:
            assert tensor.name not in made
            made[tensor.name] = operator.name
    assert made["loss"] == "head.loss"
    unused = [name for name in graph if not graph.out_degree(name)]
    assert unused == ["head.loss"], "every result but the loss is consumed"


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_signatures_shard_dimensions_that_the_operators_tensors_have(spec):
    """Every kind has signatures of its own arity, and what Megatron's choice shards exists in the sharded tensor."""
    for operator in operators(build_graph(spec)):
        for signature in signatures(operator.kind, *operator.split).values():
            assert len(signature.inputs) == len(signature.grad_inputs) == len(operator.inputs)
            assert len(signature.outputs) == len(signature.grad_outputs) == len(operator.outputs)
            if operator.kind != "linear":
                continue
            for layout, dims in zip(
                (signature.inputs[0], signature.outputs[0]), operator.attributes["dims"], strict=True
            ):
                if isinstance(layout, Shard) and layout.dim not in ("seq", "batch"):
                    assert layout.dim == split_unit(dims)


def test_a_layers_operators():
    short = {
        name: [o.name.rsplit(".", 1)[-1] for o in operators(build_graph(MODELS[name]), "layers.1")] for name in MODELS
    }
    core = ["qkv", "split_heads", "attention", "attention_out", "attention_residual"]
    assert short["small-bert"] == [*core, "ffn_in", "activation", "ffn_out", "ffn_residual"]
    assert short["small-llama"] == ["attention_norm", *core, "ffn_in", "activation", "ffn_out", "ffn_residual"]


def test_a_tied_head_reads_the_embeddings_weight_transposed():
    def head(spec):
        (found,) = [operator for operator in operators(build_graph(spec), "head") if operator.role == "head.vocab"]
        return found

    assert head(BERT).parameters[0].name == "embedding.tokens.weight"
    assert head(BERT).parameters[0].dims == ("vocab", "hidden")
    assert head(BERT).attributes["transposed"]
    assert head(LLAMA).parameters[0].dims == ("hidden", "vocab")
    assert not head(LLAMA).attributes["transposed"]


def test_windows_and_thetas_follow_the_layer():
    spec = preset("modernbert-base")
    found = {operator.name: operator for operator in operators(build_graph(spec))}
    for layer in range(spec.layers):
        assert found[f"layers.{layer}.attention"].attributes["window"] == spec.window(layer)
        assert found[f"layers.{layer}.split_heads"].attributes["theta"] == spec.theta(layer)
        assert (f"layers.{layer}.attention_norm" in found) == spec.has_attention_norm(layer)
    assert found["layers.0.attention"].attributes["window"] is None


def test_only_matrices_decay():
    for operator in operators(build_graph(BERT)):
        for parameter in operator.parameters:
            assert parameter.decay == parameter.name.endswith(".weight")
