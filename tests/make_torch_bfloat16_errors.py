"""Writes tests/data/torch_bfloat16_errors.json: how far PyTorch's own bfloat16 gradients are from float64.

Run with a Python that has PyTorch (2.13.0 made the stored file; it is no dependency) and NumPy:

    python tests/make_torch_bfloat16_errors.py

The models are those of make_torch_model_values.py at the same parameters and data, with parameters and activations in
bfloat16, as `model.bfloat16()` has them and as Megatron-LM trains; the error is the 2-norm of the difference of all
gradients over the norm of all gradients in float64.
"""

import json
from pathlib import Path

import numpy as np
import torch
from make_torch_model_values import FAMILIES, Model

DATA = Path(__file__).parent / "data"


class NarrowModel(Model):
    """The same model at given parameters, rounded to bfloat16."""

    def __init__(self, spec, values):
        super().__init__(spec, 0)
        for name, value in values.items():
            self.parameters[name] = torch.from_numpy(value).to(torch.bfloat16).requires_grad_()

    def rotate(self, x):
        return super().rotate(x).to(x.dtype)


def main():
    errors = {}
    with np.load(DATA / "torch_model_values.npz") as stored:
        for family, spec in FAMILIES.items():
            start = f"{family}/parameter/"
            model = NarrowModel(spec, {n.removeprefix(start): stored[n] for n in stored.files if n.startswith(start)})
            model.loss(
                *(torch.from_numpy(stored[f"{family}/{name}"]) for name in ("ids", "targets", "weights"))
            ).backward()
            wrong = right = 0.0
            for name, value in model.parameters.items():
                wanted = stored[f"{family}/gradient/{name}"]
                found = 0.0 if value.grad is None else value.grad.double().numpy()
                wrong, right = wrong + float(((found - wanted) ** 2).sum()), right + float((wanted**2).sum())
            errors[family] = (wrong / right) ** 0.5
    text = json.dumps({"torch": torch.__version__, "errors": errors}, indent=1)
    (DATA / "torch_bfloat16_errors.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
