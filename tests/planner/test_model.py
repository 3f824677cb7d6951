"""ModelSpec: validation, size options, and counts against the published models and against naive enumerations."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import ModelError
from planner.model import (
    BYTE_VOCAB,
    CLS,
    MASK,
    PAD,
    SEP,
    ModelSpec,
    attention_pairs,
    base_spec,
    forward_flops,
    model_flops,
    parameters,
    with_sizes,
)
from planner.model.presets import PRESETS, preset

# As transformers reports them: masked-LM or causal-LM head, no pooler, tied tensors once.
PUBLISHED_PARAMETERS = {
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "modernbert-base": 149_655_232,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}

# Switches that no other field restricts.
FREE_FLAGS = (
    "causal",
    "gated_ffn",
    "embedding_norm",
    "qkv_bias",
    "out_bias",
    "ffn_bias",
    "head_bias",
    "head_transform",
    "head_transform_bias",
    "tie_embeddings",
    "qk_norm",
)

# Narayanan et al. 2021, table 1, in billions as printed there.
MEGATRON_BILLIONS = {
    "megatron-1.7b": "1.7",
    "megatron-3.6b": "3.6",
    "megatron-7.5b": "7.5",
    "megatron-18b": "18.4",
    "megatron-39b": "39.1",
    "megatron-76b": "76.1",
    "megatron-145b": "145.6",
    "megatron-310b": "310.1",
    "megatron-530b": "529.6",
    "megatron-1t": "1008.0",
}


def naive_tensors(spec):
    """Shape of every trained tensor, written out name by name."""
    h, d, f, v = spec.hidden, spec.head_dim, spec.ffn_hidden, spec.vocab
    shapes = {"token": (v, h)}

    def linear(name, inputs, outputs, bias):
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name):
        shapes[f"{name}.gain"] = (h,)
        if spec.norm_bias:
            shapes[f"{name}.bias"] = (h,)

    if spec.positions == "learned":
        shapes["position"] = (spec.max_positions, h)
    if spec.token_types:
        shapes["token_type"] = (spec.token_types, h)
    if spec.embedding_norm:
        norm("embedding")
    for layer in range(spec.layers):
        if layer > 0 or spec.first_attention_norm:
            norm(f"{layer}.attention_norm")
        linear(f"{layer}.query", h, spec.heads * d, spec.qkv_bias)
        linear(f"{layer}.key", h, spec.kv_heads * d, spec.qkv_bias)
        linear(f"{layer}.value", h, spec.kv_heads * d, spec.qkv_bias)
        if spec.qk_norm:
            shapes[f"{layer}.query_gain"] = shapes[f"{layer}.key_gain"] = (d,)
        linear(f"{layer}.out", spec.heads * d, h, spec.out_bias)
        norm(f"{layer}.ffn_norm")
        linear(f"{layer}.up", h, f, spec.ffn_bias)
        if spec.gated_ffn:
            linear(f"{layer}.gate", h, f, spec.ffn_bias)
        linear(f"{layer}.down", f, h, spec.ffn_bias)
    if spec.final_norm:
        norm("final")
    if spec.head_transform:
        linear("transform", h, h, spec.head_transform_bias)
        norm("transform_norm")
    if not spec.tie_embeddings:
        shapes["output.weight"] = (v, h)
    if spec.head_bias:
        shapes["output.bias"] = (v,)
    return shapes


@st.composite
def specs(draw):
    """Any valid small model."""
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    norm, place = draw(st.sampled_from(["layer", "rms"])), draw(st.sampled_from(["pre", "post"]))
    positions = draw(st.sampled_from(["learned", "rotary"]))
    seq_len = draw(st.integers(1, 40))
    window = draw(st.none() | st.integers(1, 50))
    flags = {name: draw(st.booleans()) for name in FREE_FLAGS}
    return ModelSpec(
        layers=draw(st.integers(1, 5)),
        hidden=draw(st.integers(1, 30)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 6)),
        ffn_hidden=draw(st.integers(1, 50)),
        seq_len=seq_len,
        max_positions=seq_len + draw(st.integers(0, 5)),
        vocab=draw(st.integers(1, 100)),
        token_types=draw(st.integers(0, 3)),
        activation=draw(st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"])),
        norm=norm,
        norm_position=place,
        norm_bias=norm == "layer" and draw(st.booleans()),
        final_norm=place == "pre" and draw(st.booleans()),
        first_attention_norm=place == "post" or draw(st.booleans()),
        positions=positions,
        attention_window=window,
        global_attention_every=0 if window is None else draw(st.integers(0, 4)),
        **flags,
    )


@pytest.mark.parametrize(("name", "count"), PUBLISHED_PARAMETERS.items())
def test_parameters_of_published_models(name, count):
    assert parameters(preset(name)).total == count


@pytest.mark.parametrize(("name", "billions"), MEGATRON_BILLIONS.items())
def test_parameters_of_megatron_table(name, billions):
    spec = preset(name)
    layers, hidden = spec.layers, spec.hidden
    # Narayanan et al. 2021, eq. 2: 12 l h² (1 + 13/12h + (V + s)/12lh), without the final norm.
    closed_form = 12 * layers * hidden**2 + 13 * layers * hidden + (spec.vocab + spec.seq_len) * hidden
    assert parameters(spec).total == closed_form + 2 * hidden
    digits = len(billions.partition(".")[2])
    assert f"{closed_form / 1e9:.{digits}f}" == billions


@given(specs())
def test_parameters_equal_the_sum_over_tensors(spec):
    assert parameters(spec).total == sum(math.prod(shape) for shape in naive_tensors(spec).values())


def test_parameter_breakdown_of_bert_base():
    count = parameters(preset("bert-base"))
    assert count.embedding == 30522 * 768 + 512 * 768 + 2 * 768 + 2 * 768
    assert count.layers[0] == count.layers[-1]
    assert count.layers[0].attention == 4 * (768 * 768 + 768)
    assert count.layers[0].ffn == 768 * 3072 + 3072 + 3072 * 768 + 768
    assert count.layers[0].norms == 2 * 2 * 768
    assert (count.final_norm, count.head) == (0, 768 * 768 + 768 + 2 * 768 + 30522)


def test_first_modernbert_layer_lacks_one_norm():
    first, second, *_ = parameters(preset("modernbert-base")).layers
    assert second.norms - first.norms == 768
    assert (first.attention, first.ffn) == (second.attention, second.ffn)


def test_flops_equal_narayanan_closed_form():
    spec = preset("gpt3-175b")
    s, layers, h, v = spec.seq_len, spec.layers, spec.hidden, spec.vocab
    # 72 s l h² (1 + s/6h + V/12lh), multiplied out so that every term is an integer.
    assert model_flops(spec) == 72 * s * layers * h * h + 12 * s * s * layers * h + 6 * s * h * v
    forward = forward_flops(spec)
    with_full_recompute = model_flops(spec) + forward.linear_flops + forward.attention_flops
    eq3 = 96 * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert with_full_recompute == pytest.approx(eq3, rel=1e-14)


@given(specs())
def test_forward_flops_equal_the_sum_over_matrix_products(spec):
    matrices = {
        name: shape
        for name, shape in naive_tensors(spec).items()
        if len(shape) == 2 and name not in ("token", "position", "token_type", "output.weight")
    }
    linear = sum(2 * spec.seq_len * math.prod(shape) for shape in matrices.values())
    head = 2 * spec.seq_len * spec.vocab * spec.hidden
    attention = spec.layers * 2 * 2 * spec.seq_len**2 * spec.heads * spec.head_dim  # the whole square, mask or not
    count = forward_flops(spec)
    assert count.total_flops == linear + head + attention
    assert count.attention_flops == attention
    assert 3 * count.total_flops == model_flops(spec)


@given(st.integers(1, 60), st.booleans(), st.none() | st.integers(1, 80))
def test_attention_pairs_equal_the_mask(seq_len, causal, window):
    pairs = 0
    for i in range(seq_len):
        for j in range(seq_len):
            near = window is None or (i - j < window if causal else abs(i - j) <= window // 2)
            pairs += near and (j <= i or not causal)
    assert attention_pairs(seq_len, causal=causal, window=window) == pairs


def test_windows_and_rotary_bases_by_layer():
    spec = preset("modernbert-base")
    assert [spec.window(layer) for layer in range(7)] == [None, 128, 128, None, 128, 128, None]
    assert [spec.theta(layer) for layer in range(4)] == [160000.0, 10000.0, 10000.0, 160000.0]
    assert [spec.has_attention_norm(layer) for layer in range(3)] == [False, True, True]
    mistral = preset("mistral-7b")
    assert {mistral.window(layer) for layer in range(mistral.layers)} == {4096}
    assert preset("qwen3-0.6b").query_size == 2048 and preset("qwen3-0.6b").kv_size == 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers=0 is not an integer of at least 1"),
        ({"hidden": 7.5}, "hidden=7.5 is not an integer"),
        ({"heads": True}, "heads=True is not an integer"),
        ({"vocab": -3}, "vocab=-3"),
        ({"token_types": -1}, "token_types=-1 is not an integer of at least 0"),
        ({"attention_window": 0}, "attention_window=0"),
        ({"norm_epsilon": 0.0}, "norm_epsilon=0.0 is not a positive number"),
        ({"rope_theta": math.inf}, "rope_theta=inf"),
        ({"activation": "tanh"}, "activation='tanh' is not modelled; use one of gelu, gelu_tanh, relu, silu"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"causal": 1}, "causal=1 is not a yes or no"),
        ({"kv_heads": 5}, "kv_heads=5 does not divide the 12 attention heads; use one of 1, 2, 3, 4, 6, 12"),
        ({"kv_heads": 24}, "kv_heads=24 does not divide the 12"),
        ({"vocab": 2**31}, "vocab=2147483648 exceeds the 2147483647 that can be planned for; give vocab <= 2147483647"),
        ({"attention_window": 2**64}, "attention_window=18446744073709551616 exceeds the 2147483647"),
        ({"heads": 2**63 - 1}, "heads=9223372036854775807 exceeds the 2147483647"),
        ({"heads": 2**31 - 1, "kv_heads": 2}, "2147483647 attention heads; use one of 1, 2147483647"),
        ({"layers": 5000}, "layers=5000 exceeds the 4096 that can be planned for; give layers <= 4096"),
        (
            {"hidden": 2**30, "ffn_hidden": 2**30},
            "parameters, more than the 7.21e+16 that can be planned for; use smaller",
        ),
        ({"seq_len": 513}, "seq_len=513 exceeds the 512 rows of the learned position table"),
        ({"positions": "rotary", "head_dim": 63}, "head_dim=63 is odd"),
        ({"rope_local_theta": 1e4}, "rope_local_theta=10000.0 is for rotary layers with a local attention window"),
        ({"global_attention_every": 3}, "global_attention_every=3 without attention_window"),
        ({"norm": "rms"}, "norm_bias=true with norm=rms"),
        ({"final_norm": True}, "final_norm=true with norm_position=post"),
        ({"first_attention_norm": False}, "first_attention_norm=false with norm_position=post"),
    ],
)
def test_refuses_inconsistent_models(changes, message):
    with pytest.raises(ModelError) as refusal:
        msgspec.structs.replace(preset("bert-base"), **changes)
    assert message in str(refusal.value)


def test_refuses_when_decoding_too():
    text = msgspec.json.encode(msgspec.structs.asdict(preset("bert-base")) | {"kv_heads": 5})
    with pytest.raises(ModelError, match="kv_heads=5"):
        msgspec.json.decode(text, type=ModelSpec)


@given(specs())
def test_json_round_trip(spec):
    assert msgspec.json.decode(msgspec.json.encode(spec), type=ModelSpec) == spec


def test_base_is_bert_base_on_bytes():
    base = base_spec()
    expected = msgspec.structs.replace(preset("bert-base"), name=base.name, seq_len=128, vocab=260)
    assert base == expected
    assert (PAD, MASK, CLS, SEP, BYTE_VOCAB) == (256, 257, 258, 259, 260)
    assert with_sizes() == with_sizes(None, layers=None) == base


def test_layers_change_nothing_else():
    llama = preset("llama3-8b")
    assert with_sizes(llama, layers=4) == msgspec.structs.replace(llama, layers=4, name="llama3-8b(layers=4)")
    assert with_sizes(llama, layers=32, seq_len=None) == llama


def test_width_options_set_what_follows():
    spec = with_sizes(preset("llama3-8b"), hidden=1024, heads=16)
    assert (spec.head_dim, spec.kv_heads, spec.ffn_hidden) == (64, 16, 4096)
    assert spec.gated_ffn and spec.vocab == 128256
    spec = with_sizes(preset("llama3-8b"), hidden=1024, heads=16, kv_heads=4, ffn_hidden=3000)
    assert (spec.head_dim, spec.kv_heads, spec.ffn_hidden) == (64, 4, 3000)
    assert with_sizes(heads=6).head_dim == 128
    assert with_sizes(preset("llama3-8b"), kv_heads=2).ffn_hidden == 14336
    assert with_sizes(hidden=384).head_dim == 32


def test_name_tells_every_size_that_differs():
    assert with_sizes(preset("gpt2"), layers=4, seq_len=1024).name == "gpt2(layers=4)"
    # The width is the model's own, and yet the feed-forward blocks and the key heads follow the option.
    assert with_sizes(preset("llama3-8b"), hidden=4096).name == "llama3-8b(ffn_hidden=16384, kv_heads=32)"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 7}, "heads=7 does not divide hidden=768; use heads that do, or hidden=763"),
        ({"hidden": 10}, "heads=12 does not divide hidden=10; use heads that do, or hidden=12"),
        ({"heads": 0}, "heads=0 is not an integer of at least 1"),
        ({"hidden": "x"}, "hidden='x' is not an integer"),
        ({"kv_heads": 5}, "kv_heads=5 does not divide the 12 attention heads"),
        ({"seq_len": 0}, "seq_len=0 is not an integer of at least 1"),
        ({"hidden": 36, "positions": "rotary"}, "head_dim=3 is odd"),
        ({"norm": "group"}, "norm='group'"),
        ({"positions": "alibi"}, "positions='alibi'"),
    ],
)
def test_size_options_are_checked(sizes, message):
    with pytest.raises(ModelError) as refusal:
        with_sizes(**sizes)
    assert message in str(refusal.value)


def test_unknown_size_is_a_programming_error():
    with pytest.raises(TypeError, match="wings"):
        with_sizes(wings=2)


def test_learned_table_grows_and_never_shrinks():
    assert with_sizes(seq_len=64).max_positions == 512
    assert with_sizes(seq_len=4096).max_positions == 4096
    assert with_sizes(preset("llama3-8b"), positions="learned", seq_len=100).max_positions == 100
    modernbert = with_sizes(preset("modernbert-base"), positions="learned")
    assert (modernbert.max_positions, modernbert.rope_local_theta) == (8192, None)


def test_norm_options_drag_their_fields_along():
    rms = with_sizes(norm="rms", norm_position="pre")
    assert (rms.norm_bias, rms.final_norm, rms.first_attention_norm) == (False, True, True)
    back = with_sizes(rms, norm="layer", norm_position="post")
    assert (back.norm_bias, back.final_norm) == (True, False)
    post = with_sizes(preset("modernbert-base"), norm_position="post")
    assert (post.final_norm, post.first_attention_norm, post.norm_bias) == (False, True, False)
    same = with_sizes(preset("modernbert-base"), norm_position="pre", norm="layer")
    assert same == preset("modernbert-base")


@given(specs(), st.sampled_from(["layer", "rms"]), st.sampled_from(["pre", "post"]), st.integers(1, 99))
def test_any_norm_and_length_options_give_a_valid_model(spec, norm, place, seq_len):
    changed = with_sizes(spec, norm=norm, norm_position=place, seq_len=seq_len, tie_embeddings=False, causal=True)
    assert (changed.norm, changed.norm_position, changed.seq_len) == (norm, place, seq_len)
    kept = {"layers", "hidden", "heads", "kv_heads", "head_dim", "ffn_hidden", "vocab", "gated_ffn", "attention_window"}
    if norm == spec.norm:
        kept.add("norm_bias")
    if place == spec.norm_position:
        kept |= {"final_norm", "first_attention_norm"}
    assert all(getattr(changed, field) == getattr(spec, field) for field in kept)


def test_presets_are_named_and_cited():
    assert {"bert-base", "bert-large", "gpt2", "gpt3-175b", "llama2-7b", "megatron-530b", "megatron-1t"} <= set(PRESETS)
    for name, entry in PRESETS.items():
        assert entry.spec.name == name
        assert "{}" not in entry.source and any(year in entry.source for year in map(str, range(2018, 2026)))
    assert preset("gpt3-175b").vocab == 50257 and preset("gpt3-175b").head_dim == 128


def test_unknown_preset_lists_close_names():
    with pytest.raises(ModelError, match=r"model 'llama3-9b' is unknown: did you mean llama3-8b or .*config\.json"):
        preset("llama3-9b")
    with pytest.raises(ModelError, match=r"the names are bert-base, .*qwen3-8b"):
        preset("zzz")
