"""Students of flow transformers are trained at the timesteps of their stock pipelines, which run here as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from tests.tiny_pipelines import STOCK_RUNS, build_pipeline
from tests.training.tiny_runs import UNIFY
from training.pretrained.base_model import load_base_model
from training.pretrained.train import coordinates_of
from training.run.distill import timesteps_of

FlowEuler = diffusers.FlowMatchEulerDiscreteScheduler
BY_SIZE = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
"""Scheduler of FLUX.1 [dev]; FLUX.2 [klein] has a rule of its own in its pipeline."""
CASES: dict[str, tuple[str, Any, float]] = {
    "SD3": ("sd3", FlowEuler(shift=3.0), 1e-3),
    "SD3.5 shifted by size": ("sd3", FlowEuler(**BY_SIZE), 1e-3),
    "FLUX.1 schnell": ("flux", FlowEuler(shift=1.0), 1e-3),
    "FLUX.1 dev": ("flux", FlowEuler(**BY_SIZE), 1e-3),
    "FLUX.2 klein": ("flux2", FlowEuler(**BY_SIZE, time_shift_type="exponential"), 1e-3),
    "Z-Image": ("z_image", FlowEuler(shift=6.0), 1e-3),
    "Wan": (  # its scheduler rounds down to whole timesteps and starts at 999
        "wan",
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        1.001,
    ),
}
SIZES = ((96, 64), (256, 192))


def stock_timesteps(pipeline: Any, family: str, steps: int, width: int, height: int) -> list[float]:
    """Return the timesteps of a run of a stock pipeline."""
    given: dict[str, Any] = {"num_inference_steps": steps, "width": width, "height": height, "output_type": "latent"}
    if family == "sd3":  # without sigmas its last step would start at timestep 9, with nothing left to do
        given["sigmas"] = [1.0 - j / steps for j in range(steps)]
    if family == "wan":
        given["num_frames"] = 1
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipeline(prompt="a fox", **{"guidance_scale": 1.0, **STOCK_RUNS.get(family, {}), **given})
    timesteps: list[float] = pipeline.scheduler.timesteps.double().tolist()
    return timesteps


@pytest.mark.parametrize("case", CASES)
def test_a_student_is_trained_at_the_timesteps_of_the_stock_pipeline(case: str, tmp_path: Path) -> None:
    family, scheduler, tolerance = CASES[case]
    pipeline = build_pipeline(family)
    pipeline.register_modules(scheduler=scheduler)
    pipeline.save_pretrained(tmp_path)
    base = load_base_model(tmp_path)
    for width, height in SIZES:
        config = replace(UNIFY, width=width, height=height)
        coordinates = coordinates_of(base, config)
        for steps in config.step_counts:
            ours = timesteps_of(config, coordinates, steps)
            assert ours == pytest.approx(stock_timesteps(pipeline, family, steps, width, height), abs=tolerance)


def test_a_flow_shift_of_the_config_replaces_the_shift_by_size(tmp_path: Path) -> None:
    pipeline = build_pipeline("flux2")
    pipeline.save_pretrained(tmp_path)
    coordinates = coordinates_of(load_base_model(tmp_path), replace(UNIFY, flow_shift=2.0))
    assert timesteps_of(UNIFY, coordinates, 4) == pytest.approx([1000, 6000 / 7, 2000 / 3, 400])
