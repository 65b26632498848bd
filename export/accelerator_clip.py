"""`python -m export.accelerator_clip --output DIR`: one clip of CogVideoX-2B's size with random weights, on torch.

4 steps in bf16 from a random prompt embedding, then the whole decode, part by part; 49 frames of 720x480. The seconds
of both and the peak GPU memory are kept in DIR/clip.json. `--device cpu --tiny` tries the script.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from export.real_sizes import module_of
from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.checkpoint.recipe import load_recipe
from tdm_runtime.families import FAMILIES, decoder_for
from tdm_runtime.families.architectures import REAL_SIZES, RealSize, random_model
from tdm_runtime.families.call import denoiser_arguments
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.latent_space import ClipDecoderModule, ClipParts
from tdm_runtime.model.decoder import decoder_on
from tdm_runtime.sampling.sampler import solve

CLIP_FILE = "clip.json"
STEPS = 4


def components(tiny: bool) -> tuple[RealSize, RealSize]:
    """Return the transformer and the autoencoder."""
    real = REAL_SIZES["cogvideox-2b"]
    denoiser, decoder = real["denoiser"], real["decoder_first_3"]
    if not tiny:
        return denoiser, decoder
    small = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "text_embed_dim": 16}
    small |= {"time_embed_dim": 16, "sample_width": 8, "sample_height": 8, "sample_frames": 9}
    vae = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    sizes = {"batch": 1, "frames": 3, "height": 8, "width": 8}
    return (
        replace(denoiser, config={**denoiser.config, **small}, sizes=sizes),
        replace(decoder, config={**decoder.config, **vae}, sizes=sizes),
    )


@torch.inference_mode()
def make_clip(device: torch.device, dtype: torch.dtype, tiny: bool) -> dict[str, object]:
    """Make one clip after a first call of the transformer. Returns its figures."""
    large, autoencoder = components(tiny)
    module, interface = module_of(large, dtype)
    vae = random_model(autoencoder, dtype=dtype)
    decoder = decoder_for(vae)
    assert isinstance(decoder, ClipDecoderModule)
    geometry = FAMILIES["cogvideox"].geometry(module.model.config, vae.config)  # type: ignore[union-attr, arg-type]
    denoise = TorchBackend(module, device, dtype, interface=interface)
    decode = decoder_on(TorchBackend(ClipParts(decoder), device, dtype), geometry)

    names = [spec.name for spec in interface.inputs]
    inputs = interface.random_inputs(large.sizes, torch.Generator().manual_seed(0))
    drawn = {name: tensor.to(device) for name, tensor in zip(names, inputs, strict=True)}
    noise = drawn.pop("latents")
    fixed = {name: drawn.pop(name) for name in ("timesteps", "step_counts") if name in drawn}
    prompt, step_counts = Conditioning(**drawn), torch.tensor([STEPS], device=device)

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        return denoise(*denoiser_arguments(names, latents, timesteps, step_counts, prompt))

    predict(noise, fixed["timesteps"])  # libraries load at the first call
    recipe = load_recipe(DEFAULT_CHECKPOINT)
    started_s = _now_s(device)
    *_, (latents, _) = solve(recipe.step_table(STEPS, *recipe.native_sizes[0]), noise, predict)
    denoised_s = _now_s(device)
    pixels = decode.decode(latents)
    figures: Mapping[str, object] = {
        "pixels": list(pixels.shape),
        "steps": STEPS,
        "dtype": str(dtype).removeprefix("torch."),
        "step_s": (denoised_s - started_s) / STEPS,
        "decode_s": _now_s(device) - denoised_s,
    }
    peak = {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    return {**figures, **peak}


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m export.accelerator_clip", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--device", default="cuda", help="torch device (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and clip, only to try the script")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; run this on a machine with an NVIDIA GPU, or try --device cpu --tiny")
    figures = make_clip(device, torch.bfloat16 if device.type == "cuda" else torch.float32, given.tiny)
    given.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures, indent=2)
    (given.output / CLIP_FILE).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
