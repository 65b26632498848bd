"""`python -m training.pretrained.iteration --output DIR`: TDM iterations at the size of Stable Diffusion 1.5, timed.

The denoiser has random weights and prompts are random embeddings; the settings are those of a preset of Stable
Diffusion 1.5 with a smaller batch. Seconds and peak memory, of the GPU or of the process, are kept in
DIR/iteration.json beside the memory that `tdm-train plan` computes. `--device cpu --tiny` tries it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tdm_runtime.families import FAMILIES, Conditioning, denoiser_for
from tdm_runtime.sampling.schedule import DiffusionSchedule
from training.config import DistillConfig
from training.pretrained.base_model import BaseModel
from training.pretrained.plan import PUBLISHED, plan
from training.pretrained.presets import PRESETS, PUBLISHED_BASES
from training.pretrained.train import build_roles, coordinates_of
from training.run.distill import Distiller, Run
from training.run.loop import MIB, peak_memory_mib, step_generator
from training.run.processes import Processes

ITERATION_FILE = "iteration.json"
BATCH_SIZE, ACCUMULATION = 32, 8
"""Samples of an iteration, and parts of it. The preset has 256 and 8."""
TOKENS = 77
UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""Stable Diffusion 1.5; block types are the class's own."""
TINY: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


class RandomPrompts:
    """Random embeddings in place of encoded prompts."""

    def __init__(self, width: int) -> None:
        self._width = width

    def conditioning(self, numbers: range) -> Conditioning:
        draws = [torch.randn(TOKENS, self._width, generator=step_generator(0, "prompts", n)) for n in numbers]
        return Conditioning(torch.stack(draws))

    def empty(self) -> Conditioning:
        return Conditioning(torch.zeros(1, TOKENS, self._width))

    def latents(self, numbers: range) -> Tensor | None:
        return None


def build(config: DistillConfig, unet: dict[str, Any]) -> Distiller:
    """Return the distillation of a UNet with random weights, before its first iteration."""
    torch.manual_seed(config.seed)
    family = FAMILIES["stable_diffusion"]
    denoiser = denoiser_for(UNet2DConditionModel(**unet))
    geometry = family.geometry(denoiser.model.config, {"block_out_channels": [0] * 4})
    base, processes = BaseModel(family, denoiser, DiffusionSchedule(), "epsilon", geometry), Processes()
    coordinates = coordinates_of(base, config)
    roles = build_roles(base, coordinates, config, processes.device)
    shape = geometry.latent_shape(config.width, config.height)
    return Distiller(Run(roles, coordinates, RandomPrompts(unet["cross_attention_dim"]), shape, config), processes)


def measure(distiller: Distiller, iterations: int) -> dict[str, object]:
    """Run a first iteration, then time some. Returns their figures."""
    is_cuda = distiller.device.type == "cuda"
    seconds: list[float] = []
    for step in range(1 + iterations):
        if step == 1:
            process_s = time.process_time()
        started_s = time.monotonic()
        numbers = distiller.train_step(step, step_generator(distiller.config.seed, "tdm", step))
        if is_cuda:
            torch.cuda.synchronize(distiller.device)
        seconds.append(time.monotonic() - started_s)
    config, student = distiller.config, distiller.roles.module("student")
    return {
        "parameters": sum(weight.numel() for weight in student.parameters()),
        "batch_size": config.batch_size,
        "accumulation": config.accumulation,
        "pixels": [config.width, config.height],
        "first_s": seconds[0],
        "iteration_s": sum(seconds[1:]) / iterations,
        "iteration_cpu_s": (time.process_time() - process_s) / iterations,
        "losses": numbers,
        "peak_bytes": round(peak_memory_mib() * MIB),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.pretrained.iteration", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="(%(default)s)")
    presets = sorted(name for name, base in PUBLISHED_BASES.items() if base == "sd15")
    parser.add_argument("--preset", choices=presets, default="sd15-4step", help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="samples of an iteration (%(default)s)")
    parser.add_argument("--accumulation", type=int, default=ACCUMULATION, help="parts of the batch (%(default)s)")
    parser.add_argument("--size", type=int, default=512, help="width and height in pixels (%(default)s)")
    parser.add_argument("--iterations", type=int, default=3, help="timed iterations after the first (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and batch, only to try the script")
    given = parser.parse_args(arguments)
    if (found := "cuda" if torch.cuda.is_available() else "cpu") != given.device:
        parser.error(f"--device is {given.device} and training takes {found} here; choose --device {found}")
    if given.iterations < 1:
        parser.error(f"--iterations is {given.iterations}; it must be at least 1")
    batch = {"batch_size": given.batch_size, "accumulation": given.accumulation}
    config = replace(PRESETS[given.preset], **batch, width=given.size, height=given.size)
    if given.tiny:
        config = replace(config, batch_size=2, accumulation=2, width=64, height=64)
    figures: dict[str, object] = {"preset": given.preset}
    figures |= measure(build(config, UNET | (TINY if given.tiny else {})), given.iterations)
    if not given.tiny:
        figures["planned_bytes"] = plan(config, PUBLISHED["sd15"]).total
    given.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures, indent=2)
    (given.output / ITERATION_FILE).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
