"""Models by name: what `planner models` lists, each with the publication its numbers come from."""

from __future__ import annotations

import difflib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from planner.errors import ModelError
from planner.model.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Mapping


class Preset(msgspec.Struct, frozen=True):
    """A published model and where its sizes are printed."""

    spec: ModelSpec
    source: str


_BERT = "Devlin et al. 2019, arXiv 1810.04805; google-bert/{} config.json"
_ROBERTA = "Liu et al. 2019, arXiv 1907.11692; FacebookAI/{} config.json"
_GPT2 = "Radford et al. 2019, table 2; openai-community/{} config.json"
_GPT3 = "Brown et al. 2020, arXiv 2005.14165, table 2.1; every layer attends densely, as in Megatron-LM and MLPerf"
_SC21 = "Narayanan et al. 2021, arXiv 2104.04473, table 1"
_RECOMPUTE = "Korthikanti et al. 2022, arXiv 2205.05198, table 3"
_LLAMA2 = "Touvron et al. 2023, arXiv 2307.09288, table 1; meta-llama/{} config.json"
_LLAMA3 = (
    "Llama team 2024, arXiv 2407.21783, table 3; meta-llama/{} config.json; 8192 tokens, the main pre-training phase"
)
_MISTRAL = "Jiang et al. 2023, arXiv 2310.06825, table 1; mistralai/Mistral-7B-v0.1 config.json"
_QWEN2 = "Yang et al. 2024, arXiv 2407.10671, table 1; Qwen/{} config.json; 32768 tokens, its longest training phase"
_QWEN3 = "Yang et al. 2025, arXiv 2505.09388, table 1; Qwen/{} config.json; 32768 tokens, its longest training phase"
_MODERNBERT = "Warner et al. 2024, arXiv 2412.13663, table 4; answerdotai/{} config.json"


def _bert(**sizes: Any) -> ModelSpec:
    """Post-norm encoder with the masked-LM head of BERT: dense, activation, norm, tied output with a bias."""
    family: dict[str, Any] = {
        "kv_heads": sizes["heads"],
        "head_dim": 64,
        "ffn_hidden": 4 * sizes["hidden"],
        "seq_len": 512,
        "vocab": 30522,
        "token_types": 2,
        "embedding_norm": True,
        "head_bias": True,
        "head_transform": True,
    }
    return ModelSpec(**(family | sizes))


def _roberta(**sizes: Any) -> ModelSpec:
    """BERT with a byte-pair vocabulary, one token type, and two rows of the position table left to padding."""
    family: dict[str, Any] = {"vocab": 50265, "token_types": 1, "max_positions": 514, "norm_epsilon": 1e-5}
    return _bert(**(family | sizes))


def _gpt(**sizes: Any) -> ModelSpec:
    """Pre-norm decoder with learned positions and tied output: GPT-2, GPT-3 and the models of the Megatron papers."""
    family: dict[str, Any] = {
        "kv_heads": sizes["heads"],
        "head_dim": sizes["hidden"] // sizes["heads"],
        "ffn_hidden": 4 * sizes["hidden"],
        "vocab": 50257,
        "causal": True,
        "activation": "gelu_tanh",
        "norm_position": "pre",
        "norm_epsilon": 1e-5,
        "final_norm": True,
        "max_positions": sizes["seq_len"],
    }
    return ModelSpec(**(family | sizes))


def _megatron(**sizes: Any) -> ModelSpec:
    """GPT as the Megatron papers train it: 2048 tokens, vocabulary padded to 51200."""
    return _gpt(**({"seq_len": 2048, "vocab": 51200} | sizes))


def _llama(**sizes: Any) -> ModelSpec:
    """Pre-norm decoder with RMS norms, rotary positions, SwiGLU and no biases: Llama, Mistral, Qwen."""
    family: dict[str, Any] = {
        "kv_heads": sizes["heads"],
        "head_dim": sizes["hidden"] // sizes["heads"],
        "causal": True,
        "gated_ffn": True,
        "activation": "silu",
        "norm": "rms",
        "norm_position": "pre",
        "norm_epsilon": 1e-5,
        "norm_bias": False,
        "positions": "rotary",
        "final_norm": True,
        "qkv_bias": False,
        "out_bias": False,
        "ffn_bias": False,
        "tie_embeddings": False,
    }
    return ModelSpec(**(family | sizes))


def _llama3(**sizes: Any) -> ModelSpec:
    family: dict[str, Any] = {"kv_heads": 8, "seq_len": 8192, "vocab": 128256, "rope_theta": 500000.0}
    return _llama(**(family | sizes))


def _qwen2(**sizes: Any) -> ModelSpec:
    """Llama with biases on query, key and value alone."""
    family: dict[str, Any] = {"seq_len": 32768, "rope_theta": 1e6, "norm_epsilon": 1e-6, "qkv_bias": True}
    return _llama(**(family | sizes))


def _qwen3(**sizes: Any) -> ModelSpec:
    """Llama with a norm on every query and key head of 128, whatever the hidden size."""
    family: dict[str, Any] = {
        "kv_heads": 8,
        "head_dim": 128,
        "seq_len": 32768,
        "vocab": 151936,
        "rope_theta": 1e6,
        "norm_epsilon": 1e-6,
        "qk_norm": True,
    }
    return _llama(**(family | sizes))


def _modernbert(**sizes: Any) -> ModelSpec:
    """Pre-norm encoder with rotary positions, GeGLU, no biases but the output's; two layers of three attend locally."""
    family: dict[str, Any] = {
        "kv_heads": sizes["heads"],
        "head_dim": 64,
        "seq_len": 8192,
        "vocab": 50368,
        "gated_ffn": True,
        "norm_position": "pre",
        "norm_epsilon": 1e-5,
        "norm_bias": False,
        "positions": "rotary",
        "rope_theta": 160000.0,
        "rope_local_theta": 10000.0,
        "embedding_norm": True,
        "final_norm": True,
        "first_attention_norm": False,
        "qkv_bias": False,
        "out_bias": False,
        "ffn_bias": False,
        "head_bias": True,
        "head_transform": True,
        "head_transform_bias": False,
        "attention_window": 128,
        "global_attention_every": 3,
    }
    return ModelSpec(**(family | sizes))


_TABLE = (
    (_bert(name="bert-base", layers=12, hidden=768, heads=12), _BERT.format("bert-base-uncased")),
    (_bert(name="bert-large", layers=24, hidden=1024, heads=16), _BERT.format("bert-large-uncased")),
    (_roberta(name="roberta-base", layers=12, hidden=768, heads=12), _ROBERTA.format("roberta-base")),
    (_roberta(name="roberta-large", layers=24, hidden=1024, heads=16), _ROBERTA.format("roberta-large")),
    (
        _modernbert(name="modernbert-base", layers=22, hidden=768, heads=12, ffn_hidden=1152),
        _MODERNBERT.format("ModernBERT-base"),
    ),
    (
        _modernbert(name="modernbert-large", layers=28, hidden=1024, heads=16, ffn_hidden=2624),
        _MODERNBERT.format("ModernBERT-large"),
    ),
    (_gpt(name="gpt2", layers=12, hidden=768, heads=12, seq_len=1024), _GPT2.format("gpt2")),
    (_gpt(name="gpt2-medium", layers=24, hidden=1024, heads=16, seq_len=1024), _GPT2.format("gpt2-medium")),
    (_gpt(name="gpt2-large", layers=36, hidden=1280, heads=20, seq_len=1024), _GPT2.format("gpt2-large")),
    (_gpt(name="gpt2-xl", layers=48, hidden=1600, heads=25, seq_len=1024), _GPT2.format("gpt2-xl")),
    (_gpt(name="gpt3-6.7b", layers=32, hidden=4096, heads=32, seq_len=2048), _GPT3),
    # The table prints 5140 for 13B, which 40 heads of 128 contradict.
    (_gpt(name="gpt3-13b", layers=40, hidden=5120, heads=40, seq_len=2048), _GPT3),
    (_gpt(name="gpt3-175b", layers=96, hidden=12288, heads=96, seq_len=2048), _GPT3),
    (_megatron(name="megatron-1.7b", layers=24, hidden=2304, heads=24), _SC21),
    (_megatron(name="megatron-3.6b", layers=30, hidden=3072, heads=32), _SC21),
    (_megatron(name="megatron-7.5b", layers=36, hidden=4096, heads=32), _SC21),
    (_megatron(name="megatron-18b", layers=40, hidden=6144, heads=48), _SC21),
    (_megatron(name="megatron-22b", layers=48, hidden=6144, heads=64), _RECOMPUTE),
    (_megatron(name="megatron-39b", layers=48, hidden=8192, heads=64), _SC21),
    (_megatron(name="megatron-76b", layers=60, hidden=10240, heads=80), _SC21),
    (_megatron(name="megatron-145b", layers=80, hidden=12288, heads=96), _SC21),
    (_megatron(name="megatron-310b", layers=96, hidden=16384, heads=128), _SC21),
    (_megatron(name="megatron-530b", layers=105, hidden=20480, heads=128), _SC21),
    (_megatron(name="megatron-1t", layers=128, hidden=25600, heads=160), _SC21),
    (
        _llama(name="llama2-7b", layers=32, hidden=4096, heads=32, ffn_hidden=11008, vocab=32000, seq_len=4096),
        _LLAMA2.format("Llama-2-7b-hf"),
    ),
    (
        _llama(name="llama2-13b", layers=40, hidden=5120, heads=40, ffn_hidden=13824, vocab=32000, seq_len=4096),
        _LLAMA2.format("Llama-2-13b-hf"),
    ),
    (
        _llama(
            name="llama2-70b",
            layers=80,
            hidden=8192,
            heads=64,
            kv_heads=8,
            ffn_hidden=28672,
            vocab=32000,
            seq_len=4096,
        ),
        _LLAMA2.format("Llama-2-70b-hf"),
    ),
    (
        _llama3(name="llama3-8b", layers=32, hidden=4096, heads=32, ffn_hidden=14336),
        _LLAMA3.format("Meta-Llama-3-8B"),
    ),
    (
        _llama3(name="llama3-70b", layers=80, hidden=8192, heads=64, ffn_hidden=28672),
        _LLAMA3.format("Meta-Llama-3-70B"),
    ),
    (
        _llama3(name="llama3-405b", layers=126, hidden=16384, heads=128, ffn_hidden=53248),
        _LLAMA3.format("Llama-3.1-405B"),
    ),
    (
        _llama(
            name="mistral-7b",
            layers=32,
            hidden=4096,
            heads=32,
            kv_heads=8,
            ffn_hidden=14336,
            vocab=32000,
            seq_len=8192,
            attention_window=4096,
        ),
        _MISTRAL,
    ),
    (
        _qwen2(
            name="qwen2-0.5b",
            layers=24,
            hidden=896,
            heads=14,
            kv_heads=2,
            ffn_hidden=4864,
            vocab=151936,
            tie_embeddings=True,
        ),
        _QWEN2.format("Qwen2-0.5B"),
    ),
    (
        _qwen2(name="qwen2-7b", layers=28, hidden=3584, heads=28, kv_heads=4, ffn_hidden=18944, vocab=152064),
        _QWEN2.format("Qwen2-7B"),
    ),
    (
        _qwen2(name="qwen2-72b", layers=80, hidden=8192, heads=64, kv_heads=8, ffn_hidden=29568, vocab=152064),
        _QWEN2.format("Qwen2-72B"),
    ),
    (
        _qwen3(name="qwen3-0.6b", layers=28, hidden=1024, heads=16, ffn_hidden=3072, tie_embeddings=True),
        _QWEN3.format("Qwen3-0.6B"),
    ),
    (_qwen3(name="qwen3-8b", layers=36, hidden=4096, heads=32, ffn_hidden=12288), _QWEN3.format("Qwen3-8B")),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({spec.name: Preset(spec, source) for spec, source in _TABLE})


def preset(name: str) -> ModelSpec:
    """The published model of that name.

    Raises:
        ModelError: No such name; the message lists the closest ones.
    """
    if name in PRESETS:
        return PRESETS[name].spec
    close = difflib.get_close_matches(name.lower(), PRESETS, n=4, cutoff=0.5)
    known = f"did you mean {' or '.join(close)}?" if close else f"the names are {', '.join(PRESETS)}."
    raise ModelError(f"model {name!r} is unknown: {known} A model is also the path of a Hugging Face config.json")
