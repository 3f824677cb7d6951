"""config.json files as published, the defaults of the configuration classes, and refusals by name."""

import json

import msgspec
import pytest

from planner.errors import ModelError
from planner.model import parameters
from planner.model.huggingface import from_huggingface
from planner.model.presets import preset

BERT = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
ROBERTA = {
    "architectures": ["RobertaForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "roberta",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 50265,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
LLAMA2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MODERNBERT = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "sep_token_id": 50282,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0",
    "vocab_size": 50368,
}
PUBLISHED = {
    "bert-base": BERT,
    "roberta-base": ROBERTA,
    "gpt2": GPT2,
    "llama2-7b": LLAMA2,
    "llama3-8b": LLAMA3,
    "mistral-7b": MISTRAL,
    "qwen2-7b": QWEN2,
    "qwen3-0.6b": QWEN3,
    "modernbert-base": MODERNBERT,
}


@pytest.fixture
def read(tmp_path):
    """Write keys as config.json and read them back as a model."""

    def read_keys(keys):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(keys))
        return from_huggingface(file)

    return read_keys


def refusal(read, keys):
    with pytest.raises(ModelError) as error:
        read(keys)
    return str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_is_the_preset(read, name):
    spec = read(PUBLISHED[name])
    # A preset has the sequence length of the pre-training, a file the longest it allows.
    assert spec.seq_len == {"roberta-base": 512}.get(name, PUBLISHED[name].get("max_position_embeddings", 1024))
    assert spec == msgspec.structs.replace(preset(name), name=spec.name, seq_len=spec.seq_len)
    assert parameters(spec).total == parameters(preset(name)).total


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("bert", {"layers": 12, "hidden": 768, "vocab": 30522, "token_types": 2, "seq_len": 512, "causal": False}),
        ("roberta", {"vocab": 50265, "token_types": 2, "max_positions": 512, "seq_len": 510, "norm_epsilon": 1e-12}),
        ("gpt2", {"layers": 12, "ffn_hidden": 3072, "vocab": 50257, "seq_len": 1024, "activation": "gelu_tanh"}),
        (
            "llama",
            {"kv_heads": 32, "ffn_hidden": 11008, "seq_len": 2048, "norm_epsilon": 1e-6, "tie_embeddings": False},
        ),
        ("mistral", {"kv_heads": 8, "ffn_hidden": 14336, "seq_len": 131072, "attention_window": 4096, "vocab": 32000}),
        ("qwen2", {"vocab": 151936, "ffn_hidden": 22016, "kv_heads": 32, "seq_len": 32768, "rope_theta": 1e4}),
        ("qwen3", {"vocab": 151936, "head_dim": 128, "qk_norm": True, "qkv_bias": False, "attention_window": None}),
        ("modernbert", {"layers": 22, "ffn_hidden": 1152, "head_bias": True, "head_transform_bias": False}),
    ],
)
def test_absent_keys_take_the_class_defaults(read, kind, fields):
    spec = read({"model_type": kind})
    assert {field: getattr(spec, field) for field in fields} == fields
    assert spec.name == kind


def test_reads_a_folder_and_names_the_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2))
    assert from_huggingface(tmp_path).name == "Llama-2-7b-hf"
    assert from_huggingface(str(tmp_path)) == from_huggingface(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("base", "changes", "fields"),
    [
        (BERT, {"is_decoder": True}, {"causal": True}),
        (BERT, {"hidden_act": "gelu_new"}, {"activation": "gelu_tanh"}),
        (BERT, {"tie_word_embeddings": False}, {"tie_embeddings": False}),
        (ROBERTA, {"model_type": "xlm-roberta", "vocab_size": 250002, "output_past": True}, {"vocab": 250002}),
        (GPT2, {"n_inner": 1000}, {"ffn_hidden": 1000}),
        (LLAMA2, {"attention_bias": True}, {"qkv_bias": True, "out_bias": True, "ffn_bias": False}),
        (LLAMA2, {"mlp_bias": True}, {"qkv_bias": False, "ffn_bias": True}),
        (LLAMA2, {"head_dim": 64}, {"head_dim": 64, "hidden": 4096}),
        (LLAMA2, {"num_key_value_heads": None}, {"kv_heads": 32}),
        (LLAMA2, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (LLAMA2, {"rope_scaling": {"type": "default"}}, {"rope_theta": 1e4}),
        (MISTRAL, {"sliding_window": None}, {"attention_window": None}),
        (
            QWEN2,
            {"use_sliding_window": True, "max_window_layers": 0},
            {"attention_window": 131072, "global_attention_every": 0},
        ),
        (
            QWEN2,
            {"use_sliding_window": True, "max_window_layers": 1},
            {"attention_window": 131072, "global_attention_every": 28},
        ),
        (QWEN2, {"use_sliding_window": True}, {"attention_window": None}),  # max_window_layers = all layers
        (QWEN2, {"layer_types": ["full_attention"] * 28}, {"attention_window": None}),
        (
            QWEN3,
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["full_attention", "sliding_attention"] * 14,
            },
            {"attention_window": 64, "global_attention_every": 2},
        ),
        (MODERNBERT, {"norm_bias": True, "mlp_bias": True}, {"norm_bias": True, "ffn_bias": True, "qkv_bias": False}),
        (
            MODERNBERT,
            {"global_attn_every_n_layers": 1},
            {"attention_window": None, "global_attention_every": 0, "rope_local_theta": None},
        ),
        (MODERNBERT, {"num_hidden_layers": 2}, {"attention_window": 128, "global_attention_every": 3}),
        (
            MODERNBERT,
            {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
            {"attention_window": 128, "global_attention_every": 2},
        ),
        (MODERNBERT, {"local_rope_theta": None}, {"rope_local_theta": 160000.0}),
        (
            MODERNBERT,
            {"rope_parameters": {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 5.0}}},
            {"rope_theta": 7.0, "rope_local_theta": 5.0},
        ),
    ],
)
def test_switches(read, base, changes, fields):
    spec = read(base | changes)
    assert {field: getattr(spec, field) for field in fields} == fields


def test_gpt2_under_the_usual_names(read):
    usual = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    changed = GPT2 | {"n_embd": 1024, "n_layer": 3, "n_head": 8}
    assert read({usual.get(key, key): value for key, value in changed.items()}) == read(changed)


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (LLAMA3, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling", "llama3 rotary scaling"]),
        (LLAMA3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear"]),
        (LLAMA3, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["rope_parameters", "yarn"]),
        (LLAMA3, {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["rope_parameters", "part of each head"]),
        (LLAMA3, {"rope_scaling": "linear"}, ["rope_scaling", "not a table"]),
        (LLAMA3, {"partial_rotary_factor": 0.25}, ["partial_rotary_factor=0.25", "part of each head"]),
        (LLAMA3, {"num_local_experts": 8}, ["num_local_experts=8", "mixture of experts"]),
        (LLAMA3, {"quantization_config": {"bits": 4}}, ["quantization_config", "quantised"]),
        (LLAMA3, {"hidden_act": "xielu"}, ["hidden_act=xielu", "activation xielu", "gelu_new"]),
        (LLAMA3, {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0", "soft-capped"]),
        (LLAMA3, {"sliding_window": 4096}, ["sliding_window=4096", "does not know"]),
        (LLAMA3, {"brand_new_switch": True}, ["brand_new_switch=True", "does not know", "take brand_new_switch out"]),
        (MISTRAL, {"attention_bias": True}, ["attention_bias=True"]),
        (MISTRAL, {"layer_types": ["full_attention"] * 3}, ["layer_types has 3 entries for 32 layers"]),
        (
            MISTRAL,
            {"layer_types": ["sliding_attention", "full_attention"] * 16},
            ["layer_types", "irregular pattern"],
        ),
        (MISTRAL, {"layer_types": ["chunked_attention"] * 32}, ["layer_types", "chunked_attention"]),
        (
            QWEN2,
            {"use_sliding_window": True, "max_window_layers": 20},
            ["use_sliding_window=True", "attention windows in an irregular pattern"],
        ),
        (BERT, {"position_embedding_type": "relative_key"}, ["position_embedding_type=relative_key", "relative"]),
        (BERT, {"add_cross_attention": True}, ["add_cross_attention=True", "cross-attention"]),
        (BERT, {"is_encoder_decoder": True}, ["is_encoder_decoder"]),
        (BERT, {"pruned_heads": {"1": [0, 2]}}, ["pruned_heads", "heads pruned"]),
        (BERT, {"head_dim": 32}, ["head_dim=32"]),
        (BERT, {"rope_scaling": {"type": "linear"}}, ["rope_scaling"]),
        (ROBERTA, {"hidden_act": "relu"}, ["hidden_act=relu", "RoBERTa's head"]),
        (GPT2, {"scale_attn_weights": False}, ["scale_attn_weights=False"]),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True"]),
        (MODERNBERT, {"classifier_activation": "silu"}, ["classifier_activation=silu", "different activations"]),
        (MODERNBERT, {"sparse_prediction": True}, ["sparse_prediction=True", "masked tokens alone"]),
        (MODERNBERT, {"global_attn_every_n_layers": 0}, ["global_attn_every_n_layers=0"]),
        (MODERNBERT, {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, ["rope_parameters", "yarn"]),
        (MODERNBERT, {"rope_parameters": {"chunked": {}}}, ["rope_parameters", "chunked"]),
        (MODERNBERT, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear"]),
        (BERT, {"num_attention_heads": 7}, ["num_attention_heads=7 does not divide hidden_size=768"]),
        (BERT, {"num_attention_heads": 0}, ["num_attention_heads=0 does not divide"]),
        (BERT, {"num_hidden_layers": "12"}, ["num_hidden_layers='12' is not an integer"]),
        (BERT, {"vocab_size": 0}, ["vocab=0 is not an integer of at least 1"]),
        (BERT, {"is_decoder": 1}, ["is_decoder=1 is not true or false"]),
        (QWEN3, {"num_key_value_heads": 3}, ["kv_heads=3 does not divide the 16 attention heads"]),
        (QWEN3, {"rope_theta": True}, ["rope_theta=True is not a number"]),
    ],
)
def test_refuses_by_name(read, base, changes, words):
    message = refusal(read, base | changes)
    assert [word for word in words if word not in message] == [], message
    assert "config.json: " in message


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gpt_neox", ["model_type='gpt_neox'", "in parallel", "use one of bert, "]),
        ("mixtral", ["mixture of experts"]),
        ("mamba", ["model_type='mamba' is not modelled"]),
        (None, ["model_type=None"]),
        (["bert"], ["model_type=['bert']"]),
    ],
)
def test_refuses_other_families(read, kind, words):
    message = refusal(read, {"model_type": kind, "hidden_size": 64})
    assert [word for word in words if word not in message] == [], message


def test_unreadable_files(tmp_path, read):
    with pytest.raises(ModelError, match="cannot be read"):
        from_huggingface(tmp_path / "absent.json")
    with pytest.raises(ModelError, match="cannot be read"):
        from_huggingface(tmp_path)
    (tmp_path / "broken.json").write_text("{'model_type': 1}")
    with pytest.raises(ModelError, match="is not JSON"):
        from_huggingface(tmp_path / "broken.json")
    assert "holds a list" in refusal(read, [1, 2])
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="is not JSON"):
        from_huggingface(tmp_path / "deep.json")
