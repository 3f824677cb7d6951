"""The keys of a Hugging Face config.json: typed reading, and refusal of every key that is not accounted for.

The reader is a closed world: a key is either used, known to leave the computation alone (token ids, dropout,
initialisation, bookkeeping), known to matter and accepted only at the value that is modelled, or refused by name. So a
configuration that asks for something new is never approximated silently.
"""

from __future__ import annotations

from typing import Any

from planner.errors import ModelError
from planner.model.spec import Activation

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Keys that leave parameters, matrix products and masks alone in every family read here. Dropout is the training's.
_HARMLESS = frozenset(
    {
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "initializer_range",
        "task_specific_params",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_return_dict",
        "torchscript",
        "auto_map",
        "attn_implementation",
        "is_decoder",
        "tie_encoder_decoder",
        "attention_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "pretraining_tp",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "reorder_and_upcast_attn",
        "n_ctx",
        "embedding_dropout",
        "mlp_dropout",
        "classifier_pooling",
        "initializer_cutoff_factor",
        "deterministic_flash_attn",
        "sparse_pred_ignore_index",
        "reference_compile",
        "repad_logits_with_grad",
        "unsloth_version",
        "unsloth_fixed",
        "model_max_length",
        "tokenizer_class",
        "directionality",
        "chunk_size_feed_forward",
        "output_past",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "num_beams",
        "repetition_penalty",
        "max_length",
        "min_length",
    }
)
_HARMLESS_PREFIXES = ("_", "pooler_")  # `_name_or_path` and its like; the pooler is no part of the masked-LM model
_HARMLESS_SUFFIXES = ("_token_id", "_token_ids")

# Keys that matter: the one value that is modelled, and what another value asks for.
_REQUIRED: dict[str, tuple[Any, str]] = {
    "add_cross_attention": (False, "cross-attention"),
    "is_encoder_decoder": (False, "an encoder-decoder model"),
    "position_embedding_type": ("absolute", "relative position embeddings"),
    "scale_attn_weights": (True, "attention scores that are not divided by the root of the head size"),
    "scale_attn_by_inverse_layer_idx": (False, "attention scores scaled by layer"),
    "sparse_prediction": (False, "logits of masked tokens alone"),
    "partial_rotary_factor": (1.0, "rotary positions on a part of each head"),
    "use_parallel_residual": (False, "attention and feed-forward blocks in parallel"),
    "pruned_heads": ({}, "heads pruned per layer"),
}
_MIXTURE = frozenset(
    {
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "n_routed_experts",
        "n_shared_experts",
        "moe_intermediate_size",
        "router_aux_loss_coef",
    }
)
_REASONS = {
    "quantization_config": "quantised weights",
    "rope_interleaved": "another pairing of rotary coordinates",
    "attn_logit_softcapping": "soft-capped attention scores",
    "final_logit_softcapping": "soft-capped logits",
    "qk_layernorm": "layer norms on query and key",
    "alibi": "linear position biases",
} | dict.fromkeys(_MIXTURE, "a mixture of experts")


class ConfigFile:
    """The keys of one config.json, remembering which were asked for."""

    def __init__(self, keys: dict[str, Any], origin: str) -> None:
        self.keys = keys
        self.origin = origin
        self.used: set[str] = set()

    def refusal(self, key: str, what: str) -> ModelError:
        """The error for a key whose value is not modelled."""
        value = str(self.keys[key])
        value = value if len(value) <= 60 else value[:57] + "..."
        return ModelError(
            f"{self.origin}: {key}={value} asks for {what}, which is not modelled; "
            f"choose another model, or take {key} out of the file to plan without it"
        )

    def get(self, key: str, default: Any, kinds: type | tuple[type, ...], what: str) -> Any:
        """Value of a key, or the default where it is absent.

        Raises:
            ModelError: The value is of another kind.
        """
        self.used.add(key)
        value = self.keys.get(key, default)
        if value is default:
            return value
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ModelError(f"{self.origin}: {key}={value!r} is not {what}; correct the file")
        return value

    def integer(self, key: str, default: int) -> int:
        """A whole number; ModelSpec checks its range."""
        value: int = self.get(key, default, int, "an integer")
        return value

    def optional(self, key: str, default: int | None) -> int | None:
        """A whole number, or None where the file says null."""
        value: int | None = self.get(key, default, (int, type(None)), "an integer or null")
        return value

    def number(self, key: str, default: float) -> float:
        """A number."""
        return float(self.get(key, default, (int, float), "a number"))

    def table(self, key: str) -> dict[str, Any]:
        """A table of keys, empty where the file has none or says null."""
        value: dict[str, Any] | None = self.get(key, None, (dict, type(None)), "a table or null")
        return value or {}

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value: bool = self.get(key, default, bool, "true or false")
        return value

    def activation(self, key: str, default: str) -> Activation:
        """An activation by its name in transformers.

        Raises:
            ModelError: An activation that is not modelled.
        """
        name: str = self.get(key, default, str, "the name of an activation")
        if name not in _ACTIVATIONS:
            raise self.refusal(key, f"the activation {name} (modelled are {', '.join(_ACTIVATIONS)})")
        return _ACTIVATIONS[name]

    def rename(self, names: dict[str, str]) -> None:
        """Give keys the name under which they are read."""
        self.keys = {names.get(key, key): value for key, value in self.keys.items()}

    def refuse_rest(self) -> None:
        """Refuse every key that was not used and may change the model.

        Raises:
            ModelError: Naming the first such key.
        """
        for key, value in self.keys.items():
            known = key in _HARMLESS or key.startswith(_HARMLESS_PREFIXES) or key.endswith(_HARMLESS_SUFFIXES)
            if key in self.used or known or value is None:
                continue
            if key not in _REQUIRED:
                raise self.refusal(key, _REASONS.get(key, "something this reader does not know"))
            modelled, what = _REQUIRED[key]
            if value != modelled:
                raise self.refusal(key, what)
