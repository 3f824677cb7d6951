"""The compute kernels of the executor, forward and backward apart, over caller-given arrays.

Each exists twice, with one signature: `executor.reference` in plain NumPy, where the documentation is, and
`executor.fused` in Numba. ``FUSED`` says which this process runs: the fused ones where Numba is installed, unless
the environment variable MESHWRIGHT_KERNELS is ``reference``.

Conventions: float32 or float64 throughout a call, indices int64; activations sequence-first, [S, B, H], C-contiguous;
results go into given buffers, gradients of weights are added to theirs. Attention takes its scale, mask and dropout as
one `Masking`.
"""

from __future__ import annotations

import importlib.util
import os

from executor.blas import gemm_addresses
from executor.reference.arrays import Activation, Floats, Ints
from executor.reference.masking import Masking

FUSED: bool = (
    os.environ.get("MESHWRIGHT_KERNELS") != "reference"
    and importlib.util.find_spec("numba") is not None
    and gemm_addresses() is not None
)

if FUSED:
    from executor.fused.activation import activation_backward, activation_forward, gated_backward, gated_forward
    from executor.fused.attention import attention_backward, attention_forward
    from executor.fused.blocked import (
        attention_delta,
        block_attention_finish,
        block_attention_start,
        block_attention_step,
        block_attention_step_backward,
        blocked_attention_backward,
        blocked_attention_forward,
    )
    from executor.fused.embedding import (
        add_positions_backward,
        add_positions_forward,
        embedding_backward,
        embedding_forward,
    )
    from executor.fused.heads import split_heads_backward, split_heads_forward
    from executor.fused.loss import (
        cross_entropy_backward,
        cross_entropy_loss,
        cross_entropy_max,
        cross_entropy_sum,
    )
    from executor.fused.matmul import matmul
    from executor.fused.norm import (
        dropout_residual_backward,
        dropout_residual_forward,
        norm_backward,
        norm_forward,
        residual_norm_backward,
        residual_norm_forward,
    )
    from executor.fused.optimizer import adamw, scale, sgd, sum_of_squares
else:
    from executor.reference.activation import activation_backward, activation_forward, gated_backward, gated_forward
    from executor.reference.attention import attention_backward, attention_forward
    from executor.reference.blocked import (
        attention_delta,
        block_attention_finish,
        block_attention_start,
        block_attention_step,
        block_attention_step_backward,
        blocked_attention_backward,
        blocked_attention_forward,
    )
    from executor.reference.embedding import (
        add_positions_backward,
        add_positions_forward,
        embedding_backward,
        embedding_forward,
    )
    from executor.reference.heads import split_heads_backward, split_heads_forward
    from executor.reference.loss import (
        cross_entropy_backward,
        cross_entropy_loss,
        cross_entropy_max,
        cross_entropy_sum,
    )
    from executor.reference.matmul import matmul
    from executor.reference.norm import (
        dropout_residual_backward,
        dropout_residual_forward,
        norm_backward,
        norm_forward,
        residual_norm_backward,
        residual_norm_forward,
    )
    from executor.reference.optimizer import adamw, scale, sgd, sum_of_squares

__all__ = [
    "FUSED",
    "Activation",
    "Floats",
    "Ints",
    "Masking",
    "activation_backward",
    "activation_forward",
    "adamw",
    "add_positions_backward",
    "add_positions_forward",
    "attention_backward",
    "attention_delta",
    "attention_forward",
    "block_attention_finish",
    "block_attention_start",
    "block_attention_step",
    "block_attention_step_backward",
    "blocked_attention_backward",
    "blocked_attention_forward",
    "cross_entropy_backward",
    "cross_entropy_loss",
    "cross_entropy_max",
    "cross_entropy_sum",
    "dropout_residual_backward",
    "dropout_residual_forward",
    "embedding_backward",
    "embedding_forward",
    "gated_backward",
    "gated_forward",
    "matmul",
    "norm_backward",
    "norm_forward",
    "residual_norm_backward",
    "residual_norm_forward",
    "scale",
    "sgd",
    "split_heads_backward",
    "split_heads_forward",
    "sum_of_squares",
]
