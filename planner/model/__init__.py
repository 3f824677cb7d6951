"""Model: the numbers that define a transformer, named presets of real ones, and Hugging Face's configurations."""

from planner.model.spec import (
    BYTE_VOCAB,
    CLS,
    MASK,
    NUM_BYTES,
    PAD,
    SEP,
    Activation,
    ForwardFlops,
    ModelSpec,
    ParameterCount,
    attention_pairs,
    base_spec,
    forward_flops,
    model_flops,
    parameters,
    with_sizes,
)

__all__ = [
    "BYTE_VOCAB",
    "CLS",
    "MASK",
    "NUM_BYTES",
    "PAD",
    "SEP",
    "Activation",
    "ForwardFlops",
    "ModelSpec",
    "ParameterCount",
    "attention_pairs",
    "base_spec",
    "forward_flops",
    "model_flops",
    "parameters",
    "with_sizes",
]
