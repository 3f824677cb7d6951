"""Hugging Face config.json -> ModelSpec, or a refusal that names what is not modelled.

Absent keys take the defaults of the configuration classes in transformers (models/*/configuration_*.py), under the key
names of its versions 4 and 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from planner.errors import ModelError
from planner.model.huggingface_config import ConfigFile
from planner.model.presets import preset

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.model import ModelSpec

_FULL, _SLIDING = "full_attention", "sliding_attention"  # the entries of layer_types

# The other names that transformers accepts for the keys of GPT-2 (`attribute_map`).
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def _sizes(
    config: ConfigFile,
    *,
    layers: int,
    hidden: int,
    heads: int,
    head_dim: int | None = None,
    names: tuple[str, str, str] = ("num_hidden_layers", "hidden_size", "num_attention_heads"),
) -> dict[str, Any]:
    """Depth and width; the arguments are the defaults of the keys `names`, and the head size where the file has one.

    Raises:
        ModelError: The heads do not divide the hidden size, and no head size is given.
    """
    layers, hidden, heads = (config.integer(key, n) for key, n in zip(names, (layers, hidden, heads), strict=True))
    if head_dim is None and (heads < 1 or hidden % heads):
        raise ModelError(f"{config.origin}: {names[2]}={heads} does not divide {names[1]}={hidden}; correct the file")
    size = hidden // heads if head_dim is None else head_dim
    return {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": heads, "head_dim": size}


def _rope_theta(config: ConfigFile) -> float:
    """Rotary base, from `rope_theta` (4.x) or `rope_parameters` (5.x); scaled frequencies are refused."""
    theta = config.number("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        theta = _unscaled_theta(config, key, config.keys.get(key), theta)
    return theta


def _unscaled_theta(config: ConfigFile, key: str, rope: object, default: float) -> float:
    """Rotary base of one table of rotary parameters at or under a key; it may ask for the plain frequencies only."""
    config.used.add(key)
    if rope is None:
        return default
    if not isinstance(rope, dict):
        raise ModelError(f"{config.origin}: {key} holds {rope!r}, not a table of rotary parameters; correct the file")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise config.refusal(key, f"{kind} rotary scaling")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise config.refusal(key, "rotary positions on a part of each head")
    if unknown := rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
        raise config.refusal(key, f"rotary scaling ({', '.join(sorted(unknown))})")
    theta = rope.get("rope_theta", default)
    if isinstance(theta, bool) or not isinstance(theta, (int, float)):
        raise ModelError(f"{config.origin}: rope_theta={theta!r} in {key} is not a number; correct the file")
    return float(theta)


def _layer_types(config: ConfigFile, layers: int) -> list[str] | None:
    """Attention kind of every layer where the file lists them."""
    types: list[str] | None = config.get("layer_types", None, (list, type(None)), "a list or null")
    if types is None:
        return None
    if len(types) != layers:
        raise ModelError(f"{config.origin}: layer_types has {len(types)} entries for {layers} layers; correct the file")
    if unknown := {str(kind) for kind in types} - {_FULL, _SLIDING}:
        raise config.refusal("layer_types", ", ".join(sorted(unknown)))
    return types


def _windows(config: ConfigFile, window: int | None, types: list[str], stated: int | None = None) -> dict[str, Any]:
    """Fields for layers that are windowed or global in a regular pattern: all alike, or global every n from the first.

    The `stated` n goes before the one read off `types`, for a model too shallow to show it.

    Raises:
        ModelError: The pattern is another one.
    """
    full = [layer for layer, kind in enumerate(types) if kind == _FULL]
    if window is None or len(full) == len(types):
        return {"attention_window": None, "global_attention_every": 0}
    if not full:
        return {"attention_window": window, "global_attention_every": 0}
    periods = (stated or len(types), full[1] if len(full) > 1 else len(types))
    every = next((n for n in periods if full == list(range(0, len(types), n))), None)
    if every is None:
        key = "layer_types" if config.keys.get("layer_types") is not None else "use_sliding_window"
        raise config.refusal(key, f"attention windows in an irregular pattern (global layers {full})")
    return {"attention_window": window, "global_attention_every": every}


def _bert(config: ConfigFile) -> dict[str, Any]:
    """BertForMaskedLM; with `is_decoder` its causal sibling."""
    positions = config.integer("max_position_embeddings", 512)
    return _sizes(config, layers=12, hidden=768, heads=12) | {
        "ffn_hidden": config.integer("intermediate_size", 3072),
        "seq_len": positions,
        "max_positions": positions,
        "vocab": config.integer("vocab_size", 30522),
        "causal": config.flag("is_decoder", False),
        "activation": config.activation("hidden_act", "gelu"),
        "norm_epsilon": config.number("layer_norm_eps", 1e-12),
        "token_types": config.integer("type_vocab_size", 2),
        "tie_embeddings": config.flag("tie_word_embeddings", True),
    }


def _roberta(config: ConfigFile) -> dict[str, Any]:
    """RobertaForMaskedLM: BERT whose positions start after the padding row, so those rows are held and never read."""
    fields = _bert(config)
    if fields["activation"] != "gelu":
        raise config.refusal("hidden_act", "another activation than the gelu of RoBERTa's head")
    padding = config.integer("pad_token_id", 1)
    return fields | {
        "vocab": config.integer("vocab_size", 50265),
        "seq_len": fields["max_positions"] - padding - 1,
    }


def _gpt2(config: ConfigFile) -> dict[str, Any]:
    """GPT2LMHeadModel, whose keys have names of their own beside the usual ones."""
    config.rename({usual: own for usual, own in _GPT2_NAMES.items() if own not in config.keys})
    sizes = _sizes(config, layers=12, hidden=768, heads=12, names=("n_layer", "n_embd", "n_head"))
    ffn, positions = config.optional("n_inner", None), config.integer("n_positions", 1024)
    return sizes | {
        "ffn_hidden": 4 * sizes["hidden"] if ffn is None else ffn,
        "seq_len": positions,
        "max_positions": positions,
        "vocab": config.integer("vocab_size", 50257),
        "activation": config.activation("activation_function", "gelu_new"),
        "norm_epsilon": config.number("layer_norm_epsilon", 1e-5),
        "tie_embeddings": config.flag("tie_word_embeddings", True),
    }


def _decoder(
    config: ConfigFile,
    *,
    vocab: int,
    ffn_hidden: int,
    kv_heads: int | None,
    positions: int,
    head_dim: int | None = None,
) -> dict[str, Any]:
    """What Llama, Mistral and Qwen share; the arguments are the defaults in which their classes differ."""
    sizes = _sizes(config, layers=32, hidden=4096, heads=32, head_dim=config.optional("head_dim", head_dim))
    groups = config.optional("num_key_value_heads", kv_heads)
    return sizes | {
        "kv_heads": sizes["heads"] if groups is None else groups,
        "ffn_hidden": config.integer("intermediate_size", ffn_hidden),
        "seq_len": config.integer("max_position_embeddings", positions),
        "vocab": config.integer("vocab_size", vocab),
        "activation": config.activation("hidden_act", "silu"),
        "norm_epsilon": config.number("rms_norm_eps", 1e-6),
        "rope_theta": _rope_theta(config),
        "tie_embeddings": config.flag("tie_word_embeddings", False),
    }


def _llama(config: ConfigFile) -> dict[str, Any]:
    """LlamaForCausalLM; `attention_bias` puts biases on all four projections."""
    bias = config.flag("attention_bias", False)
    fields = _decoder(config, vocab=32000, ffn_hidden=11008, kv_heads=None, positions=2048)
    return fields | {"qkv_bias": bias, "out_bias": bias, "ffn_bias": config.flag("mlp_bias", False)}


def _mistral(config: ConfigFile) -> dict[str, Any]:
    """MistralForCausalLM: a query sees keys at a distance below `sliding_window`, null for all of them."""
    fields = _decoder(config, vocab=32000, ffn_hidden=14336, kv_heads=8, positions=131072)
    window = config.optional("sliding_window", 4096)
    types = _layer_types(config, fields["layers"]) or [_SLIDING] * fields["layers"]
    return fields | _windows(config, window, types)


def _qwen_windows(config: ConfigFile, layers: int) -> dict[str, Any]:
    """Qwen's windows: none unless `use_sliding_window`, and then on the layers from `max_window_layers` on."""
    window = config.optional("sliding_window", 4096)
    first = config.integer("max_window_layers", 28)
    types = _layer_types(config, layers) or [_FULL if layer < first else _SLIDING for layer in range(layers)]
    return _windows(config, window if config.flag("use_sliding_window", False) else None, types)


def _qwen2(config: ConfigFile) -> dict[str, Any]:
    """Qwen2ForCausalLM: biases on query, key and value, which the class has and the file does not mention."""
    fields = _decoder(config, vocab=151936, ffn_hidden=22016, kv_heads=32, positions=32768)
    return fields | _qwen_windows(config, fields["layers"])


def _qwen3(config: ConfigFile) -> dict[str, Any]:
    """Qwen3ForCausalLM: RMS norms on query and key heads of 128 by default."""
    bias = config.flag("attention_bias", False)
    fields = _decoder(config, vocab=151936, ffn_hidden=22016, kv_heads=32, positions=32768, head_dim=128)
    return fields | {"qkv_bias": bias, "out_bias": bias} | _qwen_windows(config, fields["layers"])


def _modernbert_thetas(config: ConfigFile) -> tuple[float, float]:
    """Rotary bases of global and of windowed layers, one key each (4.x) or one table with both (5.x)."""
    thetas = {_FULL: config.number("global_rope_theta", 160000.0)}
    local = config.get("local_rope_theta", 10000.0, (int, float, type(None)), "a number or null")
    thetas[_SLIDING] = thetas[_FULL] if local is None else float(local)  # null: as the global layers (4.x)
    tables = config.table("rope_parameters")
    if unknown := tables.keys() - thetas.keys():
        raise config.refusal("rope_parameters", f"rotary parameters of {', '.join(sorted(unknown))}")
    for kind, table in tables.items():
        thetas[kind] = _unscaled_theta(config, "rope_parameters", table, thetas[kind])
    _unscaled_theta(config, "rope_scaling", config.keys.get("rope_scaling"), thetas[_FULL])
    return thetas[_FULL], thetas[_SLIDING]


def _modernbert(config: ConfigFile) -> dict[str, Any]:
    """ModernBertForMaskedLM; `position_embedding_type` and `layer_norm_eps` are left-overs that its class ignores."""
    config.used |= {"position_embedding_type", "layer_norm_eps"}
    sizes, every = _sizes(config, layers=22, hidden=768, heads=12), config.integer("global_attn_every_n_layers", 3)
    layers = sizes["layers"]
    activation = config.activation("hidden_activation", "gelu")
    if config.activation("classifier_activation", "gelu") != activation:
        key = "classifier_activation" if "classifier_activation" in config.keys else "hidden_activation"
        raise config.refusal(key, "different activations in the layers and the head")
    if every < 1:
        raise ModelError(f"{config.origin}: global_attn_every_n_layers={every} is below 1; correct the file")
    types = _layer_types(config, layers) or [_SLIDING if i % every else _FULL for i in range(layers)]
    windows = _windows(config, config.integer("local_attention", 128), types, every)
    global_theta, local_theta = _modernbert_thetas(config)
    bias = config.flag("attention_bias", False)
    return (
        sizes
        | windows
        | {
            "ffn_hidden": config.integer("intermediate_size", 1152),
            "seq_len": config.integer("max_position_embeddings", 8192),
            "vocab": config.integer("vocab_size", 50368),
            "activation": activation,
            "norm_epsilon": config.number("norm_eps", 1e-5),
            "norm_bias": config.flag("norm_bias", False),
            "rope_theta": global_theta,
            "rope_local_theta": None if windows["attention_window"] is None else local_theta,
            "qkv_bias": bias,
            "out_bias": bias,
            "ffn_bias": config.flag("mlp_bias", False),
            "head_bias": config.flag("decoder_bias", True),
            "head_transform_bias": config.flag("classifier_bias", False),
            "tie_embeddings": config.flag("tie_word_embeddings", True),
        }
    )


# What a family is built of comes from one of its presets; its reader gives every size, rate and switch of the file.
_FAMILIES: dict[str, tuple[str, Callable[[ConfigFile], dict[str, Any]]]] = {
    "bert": ("bert-base", _bert),
    "roberta": ("roberta-base", _roberta),
    "xlm-roberta": ("roberta-base", _roberta),
    "gpt2": ("gpt2", _gpt2),
    "llama": ("llama2-7b", _llama),
    "mistral": ("mistral-7b", _mistral),
    "qwen2": ("qwen2-7b", _qwen2),
    "qwen3": ("qwen3-8b", _qwen3),
    "modernbert": ("modernbert-base", _modernbert),
}

# Families that come up often, and what they need that a ModelSpec cannot say.
_UNMODELLED = {
    "bloom": "linear position biases (ALiBi)",
    "deepseek_v2": "latent attention and a mixture of experts",
    "deepseek_v3": "latent attention and a mixture of experts",
    "falcon": "attention and feed-forward blocks in parallel",
    "gemma": "scaled embeddings and norm gains offset by one",
    "gemma2": "soft-capped scores and four norms a layer",
    "gemma3_text": "four norms a layer",
    "gpt_neox": "attention and feed-forward blocks in parallel, and rotary positions on a part of each head",
    "gptj": "attention and feed-forward blocks in parallel",
    "mixtral": "a mixture of experts",
    "qwen2_moe": "a mixture of experts",
    "qwen3_moe": "a mixture of experts",
    "t5": "an encoder-decoder model with relative position biases",
}


def from_huggingface(path: str | Path) -> ModelSpec:
    """The model that a Hugging Face config.json describes, with its language-model head.

    The sequence length is the longest that the file allows (`max_position_embeddings`; RoBERTa's less its padding
    rows); `with_sizes(spec, seq_len=...)` sets another. The name is the last part of `_name_or_path`, else the
    model type.

    Args:
        path: The file, or the folder that holds it as config.json.

    Raises:
        ModelError: The file cannot be read, or asks for something that is not modelled, by name.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        keys = msgspec.json.decode(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}); give the path of a config.json") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: is not JSON ({error}); give the config.json of a model") from error
    if not isinstance(keys, dict):
        raise ModelError(f"{file}: holds a {type(keys).__name__}, not a table of keys; give the config.json of a model")
    kind = keys.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        reason = f" needs {_UNMODELLED[kind]}, which" if isinstance(kind, str) and kind in _UNMODELLED else ""
        raise ModelError(f"{file}: model_type={kind!r}{reason} is not modelled; use one of {', '.join(_FAMILIES)}")
    config = ConfigFile(keys, str(file))
    base, reader = _FAMILIES[kind]
    fields = reader(config)
    config.refuse_rest()
    origin = keys.get("_name_or_path")
    name = Path(origin).name if isinstance(origin, str) else ""
    try:
        return msgspec.structs.replace(preset(base), name=name or kind, **fields)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
