"""Inception-v3's pool3 features, whose Frechet distance is the FID (Heusel et al. 2017).

The weights are those of TensorFlow's graph of 2015-12-05. pytorch-fid, torch-fidelity and StyleGAN2-ADA publish them in
files that give the same features here. Pictures are resized as clean-fid does (Parmar et al. 2022), so the distance is
that of its mode "clean".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tdm_runtime.model.decoder import Pixels
from training.measure.metrics import Features
from training.measure.weights import INCEPTION, is_torchscript, load_state

BATCH_SIZE = 32
SIDE_PX = 299
NUM_FEATURES = 2048


class InceptionFeatures:
    """A network that maps pictures to features [N, 2048]. `metrics.frechet_distance` of them is the FID."""

    def __init__(self, network: Callable[[Tensor], Tensor], device: str = "cpu") -> None:
        self._network, self._device = network, device

    @classmethod
    def open(cls, file: Path, device: str = "cpu") -> InceptionFeatures:
        """Load the state dict of pytorch-fid or torch-fidelity, or the TorchScript file of StyleGAN2-ADA and clean-fid.

        Raises:
            FileNotFoundError: The file is missing.
            ValueError: The file holds no such network.
        """
        if is_torchscript(INCEPTION.require(file)):
            archive = torch.jit.load(str(file), map_location=device)  # type: ignore[no-untyped-call]
            return cls(archive.eval().layers, device)
        state = load_state(file, INCEPTION)
        if "Mixed_7c.branch_pool.conv.weight" not in state:
            raise ValueError(f"{file} holds no Inception-v3; get {INCEPTION.name} from {INCEPTION.source}")
        return cls(InceptionNetwork({name: tensor.to(device) for name, tensor in state.items()}), device)

    @torch.inference_mode()
    def features(self, pictures: Sequence[Pixels]) -> Features:
        """Return features of pictures, float64 [N, 2048].

        Raises:
            ValueError: The network returns features of another size.
        """
        found = []
        for start in range(0, len(pictures), BATCH_SIZE):
            batch = torch.stack([fid_pixels(p) for p in pictures[start : start + BATCH_SIZE]]).to(self._device)
            found.append(self._network((batch - 128.0) / 128.0).reshape(len(batch), -1))
        features: Features = torch.cat(found).double().cpu().numpy()
        if features.shape[1] != NUM_FEATURES:
            raise ValueError(
                f"the network returned {features.shape[1]} features instead of {NUM_FEATURES}; use {INCEPTION.name}"
            )
        return features


def fid_pixels(picture: Pixels) -> Tensor:
    """Resize a picture as clean-fid does: each channel alone, bicubic with antialiasing, without rounding.

    Returns:
        float [3, 299, 299] in 0..255.
    """
    size = (SIDE_PX, SIDE_PX)
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(picture, -1, 0)]
    resized = [np.asarray(channel.resize(size, Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized).clip(0.0, 255.0))


class InceptionNetwork:
    """Inception-v3 as TensorFlow's graph of 2015 runs it, on a state dict with the names of pytorch-fid's.

    It differs from the network of Szegedy et al. 2015 (arXiv 1512.00567) in its poolings: averages leave the border
    out, and the last block takes the maximum. The sizes of all layers come from the weights.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return features [B, 2048] of pictures [B, 3, 299, 299] in [-1, 1)."""
        x = self._chain(pixels, ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"))
        x = self._chain(F.max_pool2d(x, 3, 2), ("Conv2d_3b_1x1", "Conv2d_4a_3x3"))
        x = F.max_pool2d(x, 3, 2)
        for block, (branches, pooling) in BLOCKS.items():
            parts = [self._chain(x, [f"{block}.{name}" for name in branch]) for branch in branches]
            if pooling == "halve":
                pooled = F.max_pool2d(x, 3, 2)
            elif pooling == "maximum":
                pooled = self._convolved(F.max_pool2d(x, 3, 1, padding=1), f"{block}.branch_pool")
            else:
                average = F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
                pooled = self._convolved(average, f"{block}.branch_pool")
            x = torch.cat([*parts, pooled], dim=1)
        return x.mean((2, 3))

    def _chain(self, x: Tensor, names: Sequence[str]) -> Tensor:
        for name in names:
            x = self._convolved(x, name)
        return x

    def _convolved(self, x: Tensor, name: str) -> Tensor:
        """Convolution, batch normalisation and ReLU."""
        weight = self._state[f"{name}.conv.weight"]
        padding = (0, 0) if name in UNPADDED else (weight.shape[2] // 2, weight.shape[3] // 2)
        x = F.conv2d(x, weight, stride=UNPADDED.get(name, 1), padding=padding)
        mean, variance, scale, shift = (self._state[f"{name}.bn.{part}"] for part in BATCH_NORM)
        return F.relu(F.batch_norm(x, mean, variance, scale, shift, eps=1e-3))


BATCH_NORM = ("running_mean", "running_var", "weight", "bias")
UNPADDED: Mapping[str, int] = {
    "Conv2d_1a_3x3": 2, "Conv2d_2a_3x3": 1, "Conv2d_4a_3x3": 1, "Mixed_6a.branch3x3": 2, "Mixed_6a.branch3x3dbl_3": 2,
    "Mixed_7a.branch3x3_2": 2, "Mixed_7a.branch7x7x3_4": 2,
}  # fmt: skip
"""Stride of each convolution without padding. The others have stride 1 and keep the size."""

Branches = tuple[tuple[str, ...], ...]
Pooling = Literal["average", "maximum", "halve"]
DOUBLE = ("branch3x3dbl_1", "branch3x3dbl_2")
SMALL: Branches = (("branch1x1",), ("branch5x5_1", "branch5x5_2"), (*DOUBLE, "branch3x3dbl_3"))
MIDDLE: Branches = (
    ("branch1x1",),
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
)
LARGE: Branches = (
    ("branch1x1",),
    ("branch3x3_1", "branch3x3_2a"),
    ("branch3x3_1", "branch3x3_2b"),
    (*DOUBLE, "branch3x3dbl_3a"),
    (*DOUBLE, "branch3x3dbl_3b"),
)
LAST_SEVENS = ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4")
BLOCKS: Mapping[str, tuple[Branches, Pooling]] = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), (SMALL, "average")),
    "Mixed_6a": ((("branch3x3",), (*DOUBLE, "branch3x3dbl_3")), "halve"),
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), (MIDDLE, "average")),
    "Mixed_7a": ((("branch3x3_1", "branch3x3_2"), LAST_SEVENS), "halve"),
    "Mixed_7b": (LARGE, "average"),
    "Mixed_7c": (LARGE, "maximum"),
}
"""Blocks in order: their branches, whose outputs are joined, and the pooling of the last one."""
