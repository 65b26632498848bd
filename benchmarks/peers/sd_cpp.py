"""stable-diffusion.cpp's Python binding over a Stable Diffusion 1.5 checkpoint."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from benchmarks.peers.refusal import exit_without, refuse
from tdm_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from tdm_runtime.checkpoint.stock.pipeline_folder import read_json

SDCppType = Literal["fp16", "q8_0"]
READABLE = Path("build/sd-cpp")
"""Folder of checkpoints as stable-diffusion.cpp reads them, each in a folder with its fingerprint."""
TEXT_WIDTH = 768
"""Width of the text encoder by which stable-diffusion.cpp knows Stable Diffusion 1.x."""
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}


def sd_cpp(folder: Path, weights: SDCppType, steps: int) -> Callable[[str, int], bytes]:
    """Return a maker of pictures, (prompt, seed) -> PNG bytes: trailing DDIM without guidance, on all cores.

    The UNet is the checkpoint's, but has no K; noise is torch's for the same seed. Betas are always "scaled_linear" and
    the tokenizer is CLIP's, so the pictures of a checkpoint with others differ. The work is the same.
    """
    try:
        from stable_diffusion_cpp import StableDiffusion
    except ImportError:
        exit_without("stable-diffusion-cpp-python")
    checkpoint = open_checkpoint(folder)
    width, height = checkpoint.recipe.native_sizes[0]
    model: Any = StableDiffusion(
        model_path=str(readable_folder(checkpoint)),
        wtype="f16" if weights == "fp16" else weights,
        prediction=PREDICTIONS[checkpoint.recipe.prediction_type],
        rng_type="cpu",
        sampler_rng_type="cpu",
        vae_decode_only=True,
        n_threads=len(os.sched_getaffinity(0)),
        verbose=False,
    )

    def make(prompt: str, seed: int) -> bytes:
        from numpy import asarray

        from tdm_runtime.media.image_file import encode_image

        (picture,) = model.generate_image(
            prompt=prompt,
            width=width,
            height=height,
            cfg_scale=1.0,
            sample_method="ddim_trailing",
            sample_steps=steps,
            seed=seed,
        )
        return encode_image(asarray(picture.convert("RGB")), "png")

    return make


def readable_folder(checkpoint: Checkpoint) -> Path:
    """Return a folder of the checkpoint's weights whose text encoder has its published names.

    Transformers 5 leaves out their first part, by which stable-diffusion.cpp knows the model.
    """
    import safetensors.torch

    text_config = checkpoint.base_folder / "text_encoder" / "config.json"
    width = read_json(text_config)["hidden_size"] if text_config.is_file() else 0
    if checkpoint.family.name != "stable_diffusion" or width != TEXT_WIDTH:
        refuse(
            f"stable-diffusion.cpp runs Stable Diffusion 1.5, but {checkpoint.recipe.name} has another architecture; "
            "`python -m export.real_sizes --checkpoint sd15 DIR` writes one with random weights"
        )
    folder = (READABLE / checkpoint.fingerprint[:16]).absolute()
    if folder.is_dir():
        return folder
    READABLE.mkdir(parents=True, exist_ok=True)
    text, base = "text_encoder/model.safetensors", checkpoint.base_folder.absolute()
    with tempfile.TemporaryDirectory(dir=READABLE) as unfinished:
        made = Path(unfinished) / "model"
        for part in ("unet", "vae"):
            (made / part).mkdir(parents=True)
            name = f"{part}/diffusion_pytorch_model.safetensors"
            (made / name).symlink_to(base / name)
        (made / "text_encoder").mkdir()
        weights = safetensors.torch.load_file(base / text)
        named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}
        safetensors.torch.save_file(named, made / text)
        made.rename(folder)
    return folder
