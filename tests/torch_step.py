"""The same training step in PyTorch, for `bench.py` and `gpu.py`: a process that times one step for each line it reads.

Run by an interpreter that has torch: `torch_step.py H F heads batch seq layers [--compile] [--ranks N --rank R]`, on a
GPU with `--device cuda --precision bfloat16` (float32, tf32; bfloat16 is autocast, which keeps float32 parameters, as
the executor's mixed precision does). It prints `ready {...}` with what it runs on, then for each line on stdin the
seconds of one step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.nn import functional

VOCAB, POSITIONS = 260, 512
WARMUP_STEPS = 3
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


class Encoder(nn.Module):
    """A post-norm encoder with token, position and type tables, a masked-LM head and a tied output matrix."""

    def __init__(self, hidden: int, ffn: int, heads: int, layers: int, positions: int = POSITIONS) -> None:
        super().__init__()
        self.tokens, self.types = nn.Embedding(VOCAB, hidden), nn.Embedding(2, hidden)
        self.positions, self.norm = nn.Embedding(positions, hidden), nn.LayerNorm(hidden, 1e-12)
        options: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(hidden, heads, ffn, **options) for _ in range(layers))
        self.transform = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden, 1e-12))
        self.bias = nn.Parameter(torch.zeros(VOCAB))

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of ids, targets [B, S]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.tokens(ids) + self.positions(places) + self.types.weight[0])
        for layer in self.layers:
            x = layer(x)
        logits = functional.linear(self.transform(x), self.tokens.weight, self.bias)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_step(sizes: argparse.Namespace) -> Callable[[], float]:
    """A function that runs one step of SGD and returns its seconds."""
    torch.manual_seed(0)
    positions = max(POSITIONS, sizes.seq)
    model: Any = Encoder(sizes.hidden, sizes.ffn, sizes.heads, sizes.layers, positions).to(sizes.device)
    if sizes.ranks > 1:
        torch.distributed.init_process_group("gloo", rank=sizes.rank, world_size=sizes.ranks)
        model = nn.parallel.DistributedDataParallel(model)
    forward = torch.compile(model) if sizes.compile else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ids = torch.randint(0, VOCAB, (sizes.batch, sizes.seq), device=sizes.device)
    narrow = sizes.precision == "bfloat16"

    def step() -> float:
        synchronise(sizes.device)
        begun = perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(sizes.device, torch.bfloat16, enabled=narrow):
            loss = forward(ids, ids)
        loss.backward()
        optimizer.step()
        synchronise(sizes.device)
        return perf_counter() - begun

    return step


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def gemm_flops_per_second(device: str, precision: str) -> float:
    """Best rate of a square product."""
    size = GEMM_SIZE[device]
    a = torch.randn(size, size, device=device).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    best = float("inf")
    for _ in range(4):
        synchronise(device)
        begun = perf_counter()
        torch.mm(a, a)
        synchronise(device)
        best = min(best, perf_counter() - begun)
    return 2 * size**3 / best


def main() -> None:
    """Serve steps until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("hidden", "ffn", "heads", "batch", "seq", "layers"):
        parser.add_argument(name, type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="float32", choices=("float32", "tf32", "bfloat16"))
    sizes = parser.parse_args()
    if sizes.device == "cpu":
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if sizes.precision == "tf32" else "highest")
    step = make_step(sizes)
    for _ in range(WARMUP_STEPS):
        step()
    facts = {
        "torch": torch.__version__,
        "gemm_flops_per_second": gemm_flops_per_second(sizes.device, sizes.precision) if sizes.rank == 0 else 0.0,
        "mkl": os.environ.get("MKL_ENABLE_INSTRUCTIONS", "as installed"),
    }
    print("ready", json.dumps(facts), flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


if __name__ == "__main__":
    main()
