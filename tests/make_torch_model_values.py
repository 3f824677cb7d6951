"""Writes tests/data/torch_model_values.npz: losses and gradients of whole models as PyTorch's autograd finds them.

Run with a Python that has PyTorch (2.13.0 made the stored file; it is no dependency) and NumPy:

    python tests/make_torch_model_values.py

The models are written here once more, in float64 and with torch.nn.functional, from the papers and not from the code
under test: BERT (Devlin et al. 2019), GPT-2 (Radford et al. 2019), Llama with grouped-query attention (Touvron et al.
2023) and Qwen3 (query and key norms). Parameters carry the names under which the product knows them, and are random
everywhere, biases and gains too, so that no gradient is zero by accident.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 - the name everyone knows

LAYERS, HIDDEN, HEADS, WIDTH, FFN, SEQ, BATCH, VOCAB = 2, 12, 3, 4, 10, 7, 3, 19
EPSILON = 1e-5
BASE = {
    "layers": LAYERS, "hidden": HIDDEN, "heads": HEADS, "kv_heads": HEADS, "head_dim": WIDTH, "ffn_hidden": FFN,
    "seq_len": SEQ, "vocab": VOCAB, "max_positions": SEQ + 2, "norm_epsilon": EPSILON,
}  # fmt: skip
FAMILIES = {
    "bert": BASE | {"embedding_norm": True, "head_transform": True, "head_bias": True, "token_types": 2},
    "gpt": BASE | {"norm_position": "pre", "final_norm": True, "causal": True, "activation": "gelu_tanh"},
    "llama": BASE | {
        "norm_position": "pre", "final_norm": True, "causal": True, "positions": "rotary", "norm": "rms",
        "norm_bias": False, "gated_ffn": True, "activation": "silu", "kv_heads": 1, "qkv_bias": False,
        "out_bias": False, "ffn_bias": False, "tie_embeddings": False,
    },
}  # fmt: skip
FAMILIES["qwen3"] = FAMILIES["llama"] | {"qk_norm": True, "tie_embeddings": True, "attention_window": 4}


class Model:
    """Parameters made on first use, so that names and shapes stand where they are used."""

    def __init__(self, spec, seed):
        self.spec, self.parameters = spec, {}
        self.generator = torch.Generator().manual_seed(seed)

    def get(self, key, default):
        return self.spec.get(key, default)

    def parameter(self, name, *shape, around=0.0):
        if name not in self.parameters:
            value = around + 0.3 * torch.randn(*shape, dtype=torch.float64, generator=self.generator)
            self.parameters[name] = value.requires_grad_()
        return self.parameters[name]

    def norm(self, name, x):
        gain = self.parameter(f"{name}.gain", HIDDEN, around=1.0)
        if self.get("norm", "layer") == "rms":
            return F.rms_norm(x, (HIDDEN,), gain, EPSILON)
        return F.layer_norm(x, (HIDDEN,), gain, self.parameter(f"{name}.bias", HIDDEN), EPSILON)

    def activate(self, x):
        kind = self.get("activation", "gelu")
        return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def rotate(self, x):
        """Rotary positions in the half-split form, [batch, heads, seq, width]."""
        exponents = torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH
        angles = torch.outer(torch.arange(SEQ, dtype=torch.float64), 10000.0**-exponents)
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        half = WIDTH // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def attention(self, block, x):
        kv = self.spec["kv_heads"]
        columns = (HEADS + 2 * kv) * WIDTH
        packed = x @ self.parameter(f"{block}.qkv.weight", HIDDEN, columns)
        if self.get("qkv_bias", True):
            packed = packed + self.parameter(f"{block}.split_heads.bias", columns)
        q, k, v = (
            part.reshape(SEQ, BATCH, -1, WIDTH).permute(1, 2, 0, 3)
            for part in packed.split([HEADS * WIDTH, kv * WIDTH, kv * WIDTH], -1)
        )
        if self.get("qk_norm", False):
            q = F.rms_norm(q, (WIDTH,), self.parameter(f"{block}.split_heads.q_gain", WIDTH, around=1.0), EPSILON)
            k = F.rms_norm(k, (WIDTH,), self.parameter(f"{block}.split_heads.k_gain", WIDTH, around=1.0), EPSILON)
        if self.get("positions", "learned") == "rotary":
            q, k = self.rotate(q), self.rotate(k)
        seen = torch.ones(SEQ, SEQ, dtype=torch.bool)
        if self.get("causal", False):
            seen = seen.tril()
        if self.get("attention_window", None):
            seen = seen & torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1 - self.spec["attention_window"])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        out = out.permute(2, 0, 1, 3).reshape(SEQ, BATCH, HEADS * WIDTH)
        out = out @ self.parameter(f"{block}.attention_out.weight", HEADS * WIDTH, HIDDEN)
        if self.get("out_bias", True):
            out = out + self.parameter(f"{block}.attention_residual.bias_in", HIDDEN)
        return out

    def feed_forward(self, block, x):
        gated, bias = self.get("gated_ffn", False), self.get("ffn_bias", True)
        inner = 2 * FFN if gated else FFN
        h = x @ self.parameter(f"{block}.ffn_in.weight", HIDDEN, inner)
        if bias:
            h = h + self.parameter(f"{block}.activation.bias", inner)
        h = self.activate(h[..., :FFN]) * h[..., FFN:] if gated else self.activate(h)
        out = h @ self.parameter(f"{block}.ffn_out.weight", FFN, HIDDEN)
        return out + self.parameter(f"{block}.ffn_residual.bias_in", HIDDEN) if bias else out

    def layer(self, block, x):
        if self.get("norm_position", "post") == "pre":
            x = x + self.attention(block, self.norm(f"{block}.attention_norm", x))
            return x + self.feed_forward(block, self.norm(f"{block}.attention_residual", x))
        x = self.norm(f"{block}.attention_residual", x + self.attention(block, x))
        return self.norm(f"{block}.ffn_residual", x + self.feed_forward(block, x))

    def loss(self, ids, targets, weights):
        table = self.parameter("embedding.tokens.weight", VOCAB, HIDDEN)
        x = table[ids]
        if self.get("positions", "learned") == "learned":
            x = x + self.parameter("embedding.positions.weight", SEQ + 2, HIDDEN)[:SEQ, None]
        if self.get("token_types", 0):
            x = x + self.parameter("embedding.types.weight", 2, HIDDEN)[0]
        if self.get("embedding_norm", False):
            x = self.norm("embedding.norm", x)
        for index in range(LAYERS):
            x = self.layer(f"layers.{index}", x)
        if self.get("final_norm", False):
            x = self.norm("head.norm", x)
        if self.get("head_transform", False):
            x = x @ self.parameter("head.transform.weight", HIDDEN, HIDDEN)
            x = self.norm("head.transform_norm", self.activate(x + self.parameter("head.activation.bias", HIDDEN)))
        tied = self.get("tie_embeddings", True)
        logits = x @ (table.T if tied else self.parameter("head.vocab.weight", HIDDEN, VOCAB))
        if self.get("head_bias", False):
            logits = logits + self.parameter("head.logits_max.bias", VOCAB)
        each = F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1), reduction="none")
        return (each * weights.reshape(-1)).sum() / weights.sum()


def main():
    stored = {}
    for seed, (family, spec) in enumerate(FAMILIES.items()):
        model, data = Model(spec, seed), torch.Generator().manual_seed(100 + seed)
        ids, targets = (torch.randint(VOCAB, (SEQ, BATCH), generator=data) for _ in range(2))
        weights = (torch.rand(SEQ, BATCH, generator=data) < 0.6).to(torch.float64)
        loss = model.loss(ids, targets, weights)
        loss.backward()
        stored |= {f"{family}/ids": ids, f"{family}/targets": targets, f"{family}/weights": weights}
        stored[f"{family}/loss"] = loss.detach()
        for name, value in model.parameters.items():
            stored[f"{family}/parameter/{name}"] = value.detach()
            stored[f"{family}/gradient/{name}"] = torch.zeros_like(value) if value.grad is None else value.grad
    arrays = {name: value.numpy() for name, value in stored.items()}
    np.savez_compressed(Path(__file__).parent / "data" / "torch_model_values.npz", **arrays)


if __name__ == "__main__":
    main()
