"""Store what PyTorch computes for the functions that the kernels implement: tests/data/torch_values.npz.

Needs PyTorch, which the project otherwise does not: ``pip install torch==2.13.0 && python tests/make_torch_values.py``.
The values are float64 and the inputs come from a seeded NumPy generator, so the file changes only with PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

TARGET = Path(__file__).parent / "data" / "torch_values.npz"
generator = np.random.default_rng(20260101)
stored: dict[str, np.ndarray] = {"torch_version": np.array(torch.__version__)}


def leaf(*shape: int) -> Tensor:
    """A float64 tensor of normal numbers that records gradients."""
    return torch.tensor(generator.standard_normal(shape), requires_grad=True)


def store(name: str, function: Callable[..., Tensor], **inputs: Tensor) -> None:
    """Store inputs, output, a random gradient of the output, and the gradients of the inputs."""
    out = function(**inputs)
    dout = torch.tensor(generator.standard_normal(tuple(out.shape)))
    out.backward(dout)
    stored[f"{name}.out"], stored[f"{name}.dout"] = out.detach().numpy(), dout.numpy()
    for key, value in inputs.items():
        stored[f"{name}.{key}"], stored[f"{name}.d_{key}"] = value.detach().numpy(), value.grad.numpy()


def rotary(x: Tensor) -> Tensor:
    """Half-split rotary positions as in Hugging Face Llama; x is [S, B, n, d], theta 10000."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(x.shape[0], dtype=torch.float64), frequency)
    cos = torch.cat([angle.cos(), angle.cos()], dim=-1)[:, None, None, :]
    sin = torch.cat([angle.sin(), angle.sin()], dim=-1)[:, None, None, :]
    stored["rotary.angle"] = angle.numpy()
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def attention(causal: bool) -> Callable[..., Tensor]:
    """Grouped-query attention on sequence-first tensors."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        out = functional.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
        return out.permute(2, 0, 1, 3)

    return function


def store_adamw() -> None:
    """Three steps of AdamW with weight decay."""
    param = leaf(50)
    stored["adamw.start"] = param.detach().numpy().copy()
    optimizer = torch.optim.AdamW([param], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        param.grad = torch.tensor(generator.standard_normal(50))
        stored[f"adamw.grad{step}"] = param.grad.numpy().copy()
        optimizer.step()
        stored[f"adamw.param{step}"] = param.detach().numpy().copy()


def main() -> None:
    """Compute and store everything."""
    store("gelu", lambda x: functional.gelu(x * 3), x=leaf(40, 9))
    store("gelu_tanh", lambda x: functional.gelu(x * 3, approximate="tanh"), x=leaf(40, 9))
    store("silu", lambda x: functional.silu(x * 3), x=leaf(40, 9))
    store("swiglu", lambda x: functional.silu(x[:, :7]) * x[:, 7:], x=leaf(12, 14))
    layer = {"x": leaf(6, 2, 24), "gamma": leaf(24), "beta": leaf(24)}
    store("layer_norm", lambda x, gamma, beta: functional.layer_norm(x, (24,), gamma, beta, 1e-5), **layer)
    root = {"x": leaf(6, 2, 24), "gamma": leaf(24)}
    store("rms_norm", lambda x, gamma: functional.rms_norm(x, (24,), gamma, 1e-6), **root)
    targets = generator.integers(0, 31, 20)
    targets[3] = -100
    stored["cross_entropy.targets"] = targets
    loss = functional.cross_entropy
    store("cross_entropy", lambda x: loss(x * 4, torch.tensor(targets), reduction="sum"), x=leaf(20, 31))
    for name, causal in (("attention", False), ("attention_causal", True)):
        store(name, attention(causal), q=leaf(10, 2, 6, 8), k=leaf(10, 2, 2, 8), v=leaf(10, 2, 2, 8))
    store("rotary", rotary, x=leaf(7, 2, 3, 8))
    store_adamw()
    assert all(math.prod(value.shape) < 4000 for value in stored.values())
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(TARGET, **stored)


if __name__ == "__main__":
    main()
