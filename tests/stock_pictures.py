"""Pictures and clips of `tdm-generate` beside those of stock diffusers pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tdm_runtime.cli import main as tdm_generate
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

MIN_PSNR_DB = 50.0
"""Least similarity of pictures that count as equal. Equal pixels read 59 dB, because files hold whole levels."""
SEED = 7
WIDTH, HEIGHT = 96, 64


def run_generate(folder: Path, prompt: str, steps: int, *more: str) -> int:
    """Run `tdm-generate` on torch in float32. Return its exit status."""
    sizes = ["--seed", str(SEED), "--steps", str(steps), "--size", f"{WIDTH}x{HEIGHT}"]
    backend = ["--backend", "torch", "--precision", "fp32", "--threads", "1"]
    return tdm_generate(["--checkpoint", str(folder), prompt, *sizes, *backend, *more])


def load_fp32(folder: Path) -> LoadedModel:
    """Load a folder as `run_generate` does, for many pictures."""
    return load_model(folder, BackendConfig("torch", "fp32", threads=1, device="cpu"))


def made_by(model: LoadedModel, prompt: str, steps: int, frames: int | None = None) -> Any:
    """Return the picture or clip of a loaded model as floats in [0, 1]. It is that of `picture` or `clip`."""
    return generate(model, SamplingParams(prompt, SEED, steps, WIDTH, HEIGHT, frames=frames)) / 255.0


def picture(folder: Path, prompt: str, steps: int, tmp_path: Path, *more: str) -> Any:
    """Return the picture of `tdm-generate` as floats in [0, 1]."""
    file = tmp_path / "picture.png"
    assert run_generate(folder, prompt, steps, *more, "--force", "-o", str(file)) == 0
    return np.asarray(Image.open(file).convert("RGB")) / 255.0


def stock_picture(pipeline: Any, prompt: str, **arguments: Any) -> Any:
    """Return the picture of a stock pipeline as floats in [0, 1]."""
    noise = torch.Generator("cpu").manual_seed(SEED)
    call = {"prompt": prompt, "width": WIDTH, "height": HEIGHT, "generator": noise, "output_type": "np"}
    return pipeline(**call, **arguments).images[0]


def clip(folder: Path, prompt: str, steps: int, frames: int, tmp_path: Path, *more: str) -> Any:
    """Return the raw frames of `tdm-generate` as floats in [0, 1], [F, H, W, 3]."""
    file = tmp_path / "clip.npy"
    assert run_generate(folder, prompt, steps, "--frames", str(frames), *more, "--force", "-o", str(file)) == 0
    return np.load(file) / 255.0


def stock_clip(pipeline: Any, prompt: str, frames: int, **arguments: Any) -> Any:
    """Return the clip of a stock pipeline as floats in [0, 1], [F, H, W, 3]."""
    noise = torch.Generator("cpu").manual_seed(SEED)
    call = {"prompt": prompt, "width": WIDTH, "height": HEIGHT, "generator": noise, "output_type": "np"}
    return pipeline(num_frames=frames, **call, **arguments).frames[0]


def psnr_db(ours: Any, theirs: Any) -> float:
    return float(-10 * np.log10(np.mean((ours - theirs) ** 2)))
