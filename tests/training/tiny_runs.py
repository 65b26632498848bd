"""Distillations of tiny random models of the real classes, without folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tdm_runtime.families import FAMILIES, Conditioning, denoiser_for
from tdm_runtime.sampling.schedule import DiffusionSchedule, FlowSchedule, NoiseSchedule
from tdm_runtime.sampling.step_table import PredictionType
from tests.tiny_models import TINY_MODELS, TINY_SHAPES, tiny_conditioning
from training.config import DistillConfig
from training.pretrained.base_model import BaseModel
from training.pretrained.train import build_roles, coordinates_of
from training.run.distill import Distiller, Run
from training.run.loop import step_generator
from training.run.processes import Processes

PROMPTS = 8
NOISE: Mapping[str, tuple[NoiseSchedule, PredictionType]] = {
    "stable_diffusion": (DiffusionSchedule(), "epsilon"),
    "sdxl": (DiffusionSchedule(), "v_prediction"),
    "pixart": (DiffusionSchedule("linear", 0.0001, 0.02), "epsilon"),
    "sd3": (FlowSchedule(shift=3.0), "flow_prediction"),
    "flux": (FlowSchedule(), "flow_prediction"),
    "flux2": (FlowSchedule(shift=3.0), "flow_prediction"),
    "cogvideox": (DiffusionSchedule(rescale_zero_terminal_snr=True, snr_shift_scale=3.0), "v_prediction"),
    "z_image": (FlowSchedule(shift=3.0), "flow_prediction"),
}
"""Family -> noise of its teacher. SANA-Sprint is no teacher: it is distilled already, and its noise is TrigFlow's."""
UNIFY = DistillConfig(
    steps=3,
    batch_size=4,
    guidance_scale=2.0,
    student_learning_rate=1e-3,
    fake_learning_rate=2e-3,
    precision="fp32",
    width=64,
    height=64,
)
"""TDM-unify, with learning rates that change a tiny model in one iteration."""
LORA = replace(UNIFY, lora_rank=2, lora_alpha=4.0)
"""TDM-unify with LoRA. Alpha differs from the rank, so that a forgotten alpha fails a test."""


class TinyPrompts:
    """Random prompts of a family and, with `has_latents`, random latents."""

    def __init__(self, family: str, *, has_latents: bool = False) -> None:
        self._rows, self._empty = tiny_conditioning(family, PROMPTS), tiny_conditioning(family, 1, seed=1)
        self._shape = TINY_SHAPES[family] if has_latents else None

    def conditioning(self, numbers: range) -> Conditioning:
        return self._rows[torch.tensor([n % PROMPTS for n in numbers])]

    def empty(self) -> Conditioning:
        return self._empty

    def latents(self, numbers: range) -> Tensor | None:
        if self._shape is None:
            return None
        draws = [torch.randn(self._shape, generator=step_generator(0, "latents", n)) for n in numbers]
        return torch.stack(draws)


def tiny_base(family: str) -> BaseModel:
    """Return a teacher with random weights, which are the same on every call."""
    denoiser = denoiser_for(TINY_MODELS[family]())
    geometry = FAMILIES[family].geometry(denoiser.model.config, {"block_out_channels": [4] * 4})
    return BaseModel(FAMILIES[family], denoiser, *NOISE[family], geometry)


def tiny_distiller(
    family: str, config: DistillConfig, *, has_latents: bool = False, latent_shape: tuple[int, ...] | None = None
) -> Distiller:
    """Return a distillation before its first iteration, by default of latents of `TINY_SHAPES`."""
    base, processes = tiny_base(family), Processes()
    coordinates = coordinates_of(base, config)
    roles = build_roles(base, coordinates, config, processes.device)
    prompts = TinyPrompts(family, has_latents=has_latents)
    shape = latent_shape or TINY_SHAPES[family]
    return Distiller(Run(roles, coordinates, prompts, shape, config), processes)


def iterate(distiller: Distiller, count: int) -> list[dict[str, float]]:
    """Run the first `count` iterations. Return their numbers."""
    return [distiller.train_step(n, step_generator(distiller.config.seed, "tdm", n)) for n in range(count)]


def weights_of(distiller: Distiller) -> dict[str, Tensor]:
    """Return copies of all trained weights by role and name."""
    modules = {"student": distiller.roles.module("student"), "fake": distiller.roles.module("fake")}
    modules["average"] = distiller.average
    return {f"{role}.{name}": p.detach().clone() for role, m in modules.items() for name, p in m.named_parameters()}
