"""OpenVINO GenAI's text-to-image pipeline over a Stable Diffusion checkpoint, converted to the folder that it reads."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.peers.refusal import exit_without, refuse
from tdm_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from tdm_runtime.media.image_file import encode_image

GenAIPrecision = Literal["fp32", "bf16", "int8"]
CONVERTED = Path("build/genai")
"""Folder of converted checkpoints, each in a folder with its fingerprint and weights."""
TRACED_SIDE = 16
"""Height and width of the latents that are traced. Programs take any; tracing large ones takes minutes."""
KNOWN_BETAS = ("linear", "scaled_linear")
"""Beta schedules that GenAI computes; it reads any other one as a list."""


class GenAIPipeline:
    """`Text2ImagePipeline` as its documentation shows it, reshaped to one size.

    Pictures of different prompts are made one after the other: a call makes several pictures of one prompt only.
    """

    def __init__(self, folder: Path, precision: GenAIPrecision) -> None:
        openvino_genai = _package()
        checkpoint = open_checkpoint(folder)
        self._generator = openvino_genai.TorchGenerator
        self._is_conditioned = checkpoint.recipe.step_condition == "timestep_cond"
        width, height = checkpoint.recipe.native_sizes[0]
        self._size = {"width": width, "height": height}
        converted = converted_folder(checkpoint, "int8" if precision == "int8" else "fp16")
        self._pipeline: Any = openvino_genai.Text2ImagePipeline(converted)
        self._pipeline.reshape(1, height, width, self._scale(checkpoint.recipe.default_steps))
        self._pipeline.compile("CPU", INFERENCE_PRECISION_HINT="f32" if precision == "fp32" else "bf16")

    def make(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[bytes]:
        """Return the PNG bytes of each picture. Noise is that of the stock pipeline for the same seed."""
        return [self._picture(prompt, seed, steps) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _picture(self, prompt: str, seed: int, steps: int) -> bytes:
        noise = self._generator(seed)
        scale = self._scale(steps)
        pixels = self._pipeline.generate(
            prompt, num_inference_steps=steps, guidance_scale=scale, generator=noise, **self._size
        )
        return encode_image(pixels.data[0], "png")

    def _scale(self, steps: int) -> float:
        """Return the guidance scale: it passes K to a UNet with an input for it, and 1 is no guidance."""
        return steps + 1.0 if self._is_conditioned else 1.0


def _package() -> Any:
    """Return the module `openvino_genai`; exit if it is not installed."""
    try:
        import openvino_genai
    except ImportError:
        exit_without("openvino-genai")
    return openvino_genai


def converted_folder(checkpoint: Checkpoint, weights: Literal["fp16", "int8"]) -> Path:
    """Return the folder that GenAI reads, which is written where it is missing.

    It has what optimum-intel's export writes: each model by OpenVINO's own conversion from PyTorch, float16 weights
    (or int8, by NNCF's compression of weights, activations stay float), and the tokenizer as a model too.
    """
    if checkpoint.family.name != "stable_diffusion":
        refuse(f"OpenVINO GenAI runs Stable Diffusion 1.5 and 2.1 here; this checkpoint is of {checkpoint.family.name}")
    folder = CONVERTED / f"{checkpoint.fingerprint[:16]}-{weights}"
    if folder.is_dir():
        return folder
    _package()
    print(f"converting {checkpoint.folder} for OpenVINO GenAI", file=sys.stderr, flush=True)
    CONVERTED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CONVERTED) as unfinished:
        _convert(checkpoint, weights, Path(unfinished) / "model")
        (Path(unfinished) / "model").rename(folder)
    return folder


@torch.no_grad()
def _convert(checkpoint: Checkpoint, weights: str, folder: Path) -> None:
    import openvino
    from diffusers import StableDiffusionPipeline
    from openvino_tokenizers import convert_tokenizer

    stock: Any = StableDiffusionPipeline.from_pretrained(checkpoint.base_folder, dtype=torch.float32)
    for part, (module, inputs) in _programs(stock).items():
        (folder / part).mkdir(parents=True)
        model = openvino.convert_model(module.eval(), example_input=inputs)
        if weights == "int8":
            import nncf

            model = nncf.compress_weights(model)
        openvino.save_model(model, folder / part / "openvino_model.xml")  # float32 constants become float16
        source = checkpoint.base_folder / part.removesuffix("_decoder") / "config.json"
        shutil.copy(source, folder / part)
    tokenizer = convert_tokenizer(stock.tokenizer)
    openvino.save_model(tokenizer, folder / "tokenizer" / "openvino_tokenizer.xml")
    shutil.copy(checkpoint.base_folder / "model_index.json", folder)
    schedule = dict(stock.scheduler.config)
    if schedule["beta_schedule"] not in KNOWN_BETAS:
        schedule["trained_betas"] = stock.scheduler.betas.tolist()
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule), encoding="utf-8")


def _programs(stock: Any) -> dict[str, tuple[nn.Module, dict[str, torch.Tensor]]]:
    """Return each model's folder, module and example inputs, which have the names that GenAI sets."""
    config = stock.unet.config
    tokens, embedding = stock.text_encoder.config.max_position_embeddings, stock.text_encoder.config.hidden_size
    latents = torch.zeros(2, config.in_channels, TRACED_SIDE, TRACED_SIDE)
    denoiser = {
        "sample": latents,
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.zeros(2, tokens, embedding),
    }
    if config.time_cond_proj_dim is not None:
        denoiser["timestep_cond"] = torch.zeros(2, config.time_cond_proj_dim)
    return {
        "text_encoder": (_Text(stock.text_encoder), {"input_ids": torch.zeros(1, tokens, dtype=torch.int64)}),
        "unet": (_Denoiser(stock.unet), denoiser),
        "vae_decoder": (_Decoder(stock.vae), {"latent_sample": latents}),
    }


class _Text(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.model(input_ids)[0]


class _Denoiser(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
    ) -> Any:
        return self.model(sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False)[0]


class _Decoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent_sample: torch.Tensor) -> Any:
        return self.model.decode(latent_sample, return_dict=False)[0]
