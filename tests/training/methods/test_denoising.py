"""The denoising loss of teachers: targets, draws and prompt dropout."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.sampling.schedule import DiffusionSchedule, FlowSchedule
from tdm_runtime.sampling.step_table import PredictionType
from tests.training.methods.known import COORDINATES, EMPTY, SHAPE, KnownDenoiser, known, levels, normal
from training.methods.denoising import (
    DenoisingDraws,
    denoising_loss_at,
    denoising_target,
    draw_denoising,
    finetuning_loss,
)
from training.methods.losses import denoising_loss
from training.methods.roles import CleanEstimator
from training.methods.trajectory import Coordinates

LATENTS, NOISE = normal(4, *SHAPE, seed=0), normal(4, *SHAPE, seed=1)
TIMESTEPS = torch.tensor([900.0, 500.0, 60.0, 3.0], dtype=torch.float64)
PROMPTS = Conditioning(torch.tensor([0.3, -0.2, 0.5, 0.1]).view(4, 1, 1))


@pytest.mark.parametrize("prediction", get_args(PredictionType))
def test_an_output_that_equals_its_target_gives_the_clean_latents(prediction: PredictionType) -> None:
    schedule = FlowSchedule() if prediction == "flow_prediction" else DiffusionSchedule()
    coordinates = Coordinates(schedule, prediction)
    alphas, sigmas = coordinates.levels(TIMESTEPS, LATENTS)
    target = denoising_target(coordinates, LATENTS, NOISE, TIMESTEPS)
    clean = coordinates.to_clean(alphas * LATENTS + sigmas * NOISE, target, TIMESTEPS)
    torch.testing.assert_close(clean, LATENTS, rtol=1e-3, atol=1e-4)


def test_the_loss_is_the_mean_squared_error_in_float32() -> None:
    assert denoising_loss(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 2.0])).item() == 5.0
    assert denoising_loss(torch.ones(2, dtype=torch.bfloat16), torch.ones(2)).dtype == torch.float32


@pytest.mark.parametrize(("schedule", "least", "greatest"), [(DiffusionSchedule(), 0, 999), (FlowSchedule(), 0, 1000)])
def test_timesteps_are_uniform_and_a_share_of_the_prompts_is_dropped(
    schedule: DiffusionSchedule | FlowSchedule, least: int, greatest: int
) -> None:
    coordinates = Coordinates(schedule, "sample" if isinstance(schedule, DiffusionSchedule) else "flow_prediction")
    draws = draw_denoising(coordinates, (40_000, 2, 1), 0.2, torch.Generator().manual_seed(0))
    assert draws.noise.shape == (40_000, 2, 1) and draws.timesteps.shape == draws.is_dropped.shape == (40_000,)
    assert draws.timesteps.min().item() == pytest.approx(least, abs=0.5)
    assert draws.timesteps.max().item() == pytest.approx(greatest, abs=0.5)
    assert draws.timesteps.mean().item() == pytest.approx((least + greatest) / 2, abs=8)
    assert draws.is_dropped.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert (draws.noise.mean().item(), draws.noise.std().item()) == (pytest.approx(0, abs=0.02), pytest.approx(1, 0.02))
    part = draws[1:3]
    assert torch.equal(part.timesteps, draws.timesteps[1:3]) and torch.equal(part.noise, draws.noise[1:3])
    assert torch.equal(part.is_dropped, draws.is_dropped[1:3])
    again = draw_denoising(coordinates, (40_000, 2, 1), 0.2, torch.Generator().manual_seed(0))
    assert torch.equal(again.noise, draws.noise) and torch.equal(again.is_dropped, draws.is_dropped)


@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
def test_a_dropped_sample_trains_on_the_empty_prompt(prediction: PredictionType) -> None:
    coordinates = Coordinates(DiffusionSchedule(), prediction)
    model = CleanEstimator(KnownDenoiser(0.5), coordinates, "fp32")
    draws = DenoisingDraws(TIMESTEPS, NOISE, torch.tensor([False, True, False, True]))
    loss = denoising_loss_at(model, LATENTS, PROMPTS, EMPTY, draws)
    alphas, sigmas = levels(TIMESTEPS)
    read = Conditioning(torch.tensor([0.3, -0.6, 0.5, -0.6]).view(4, 1, 1))
    output = known(0.5, alphas * LATENTS + sigmas * NOISE, TIMESTEPS, read)
    expected = (output - (NOISE if prediction == "epsilon" else LATENTS)).square().mean()
    torch.testing.assert_close(loss, expected)


def test_the_fine_tuning_loss_draws_what_its_generator_gives() -> None:
    model = CleanEstimator(KnownDenoiser(0.5), COORDINATES, "fp32")
    found = finetuning_loss(model, LATENTS, PROMPTS, EMPTY, 0.5, torch.Generator().manual_seed(3))
    draws = draw_denoising(COORDINATES, LATENTS.shape, 0.5, torch.Generator().manual_seed(3))
    assert 0 < draws.is_dropped.sum() < 4
    torch.testing.assert_close(found, denoising_loss_at(model, LATENTS, PROMPTS, EMPTY, draws))


def test_the_model_runs_in_its_precision_and_receives_no_k(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    seen: list[tuple[bool, torch.dtype, object]] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, k: Tensor | None, *_: object) -> Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), timesteps.dtype, k))
            return x

    draws = DenoisingDraws(TIMESTEPS, NOISE, torch.zeros(4, dtype=torch.bool))
    for precision in ("fp32", "bf16"):
        denoising_loss_at(CleanEstimator(Watching(), COORDINATES, precision), LATENTS, PROMPTS, EMPTY, draws)  # type: ignore[arg-type]
    assert seen == [(False, torch.float32, None), (True, torch.float32, None)]
