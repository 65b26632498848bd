"""An Inception-v3 with random weights, in the layout of pytorch-fid's and torch-fidelity's state dict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHAPES = Path(__file__).with_name("inception_shapes.txt")
"""Name of each convolution and the shape of its weights: outputs, inputs, height, width."""


def random_inception(seed: int = 0) -> dict[str, Tensor]:
    """Return a state dict with all names and shapes of the published one, whose features vary by about their mean."""
    rng = np.random.default_rng(seed)
    state: dict[str, Tensor] = {}
    for line in SHAPES.read_text().splitlines():
        name, *sizes = line.split()
        shape = [int(size) for size in sizes]
        deviation = np.sqrt(2 / np.prod(shape[1:]))
        state[f"{name}.conv.weight"] = torch.from_numpy(
            rng.standard_normal(shape, np.float32) * deviation.astype(np.float32)
        )
        for part, mean, spread in (
            ("weight", 1.0, 0.2),
            ("bias", 0.0, 0.1),
            ("running_mean", 0.0, 0.1),
            ("running_var", 1.0, 0.3),
        ):
            values = rng.uniform(mean - spread, mean + spread, shape[0])
            state[f"{name}.bn.{part}"] = torch.from_numpy(values.astype(np.float32))
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"] = torch.zeros(1008, 2048)
    state["fc.bias"] = torch.zeros(1008)
    return state
