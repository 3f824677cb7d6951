"""Every kernel on an NVIDIA GPU: the functions of `executor.kernels` over CuPy arrays, with the same parameters.

Arrays are float32, float64, float16 or bfloat16 (`ml_dtypes.bfloat16`, which CuPy 14 takes); arithmetic is float32 for
the 16-bit types. Statistics of rows (mean, rstd, row maxima and sums, logsumexp, delta) and angles are float32 then,
and gradients of parameters may be. Index arrays come from the host or the device, see `executor.cuda.indices`.

Everything runs on the current stream and nothing waits for the device: `cross_entropy_loss` and `sum_of_squares` return
float64 arrays of no dimensions, where the other backends return numbers. Results are the same bits run to run.

Importing this package needs CuPy; nothing else in the executor does.
"""

from executor.cuda.activation import activation_backward, activation_forward, gated_backward, gated_forward
from executor.cuda.attention import attention_backward, attention_forward
from executor.cuda.blocked import (
    attention_delta,
    block_attention_finish,
    block_attention_start,
    block_attention_step,
    block_attention_step_backward,
    blocked_attention_backward,
    blocked_attention_forward,
)
from executor.cuda.embedding import (
    add_positions_backward,
    add_positions_forward,
    embedding_backward,
    embedding_forward,
)
from executor.cuda.heads import split_heads_backward, split_heads_forward
from executor.cuda.loss import cross_entropy_backward, cross_entropy_loss, cross_entropy_max, cross_entropy_sum
from executor.cuda.matmul import matmul
from executor.cuda.norm import (
    dropout_residual_backward,
    dropout_residual_forward,
    norm_backward,
    norm_forward,
    residual_norm_backward,
    residual_norm_forward,
)
from executor.cuda.optimizer import adamw, scale, sgd, sum_of_squares

__all__ = [
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
