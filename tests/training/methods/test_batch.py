"""The random numbers of an iteration, and their parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.sampling.schedule import FlowSchedule
from tests.training.methods.known import CONFIG, COORDINATES, EMPTY, SHAPE
from training.config import DistillConfig
from training.methods.batch import Draws, draw, draw_tau, part_of
from training.methods.trajectory import Coordinates, draw_places
from training.run.distill import trajectories_of

SMALL = replace(CONFIG, batch_size=6, fake_updates=3, step_counts=(1, 3))
TRAJECTORIES = trajectories_of(SMALL, COORDINATES)
FLOW = Coordinates(FlowSchedule(shift=3.0), "flow_prediction")
CPU = torch.device("cpu")


class Numbered:
    """Prompts and latents that hold their number."""

    def conditioning(self, numbers: range) -> Conditioning:
        return Conditioning(torch.tensor([float(n) for n in numbers]).view(-1, 1, 1))

    def empty(self) -> Conditioning:
        return EMPTY

    def latents(self, numbers: range) -> Tensor | None:
        return torch.tensor([float(n) for n in numbers]).view(-1, 1, 1, 1)


def drawn(rollout: str = "ode", seed: int = 0, interval: str = "disjoint") -> Draws:
    config = replace(SMALL, rollout=rollout, interval=interval)  # type: ignore[arg-type]
    return draw(config, TRAJECTORIES, SHAPE, torch.Generator().manual_seed(seed))


def test_an_iteration_draws_numbers_for_every_sample_and_update() -> None:
    draws = drawn()
    forwards = (*draws.fake, draws.generator)
    assert len(draws.fake) == 3 and draws.noise.shape == (6, *SHAPE) and draws.renoise is None
    assert set(draws.places.step_counts.tolist()) == {1, 3}
    for forward in forwards:
        assert forward.noise.shape == (6, *SHAPE) and forward.tau.shape == (6,)
        inside = (forward.tau > draws.places.next_timestep) & (forward.tau <= draws.places.timestep)
        assert bool(inside.all())
    noises = [draws.noise, *(forward.noise for forward in forwards)]
    assert len({float(noise.flatten()[0]) for noise in noises}) == 5, "each noise is a draw of its own"
    assert len({tuple(forward.tau.tolist()) for forward in forwards}) == 4


@pytest.mark.parametrize(("rollout", "interval"), [("ode", "disjoint"), ("ode", "full"), ("stochastic", "reverse")])
def test_an_iteration_is_a_function_of_its_generator(rollout: str, interval: str) -> None:
    """Every number, the noise of a stochastic rollout too."""

    def numbers(draws: Draws) -> list[Tensor]:
        forwards = [t for f in (*draws.fake, draws.generator) for t in (f.tau, f.noise)]
        return [
            draws.places.step_counts,
            draws.places.row,
            draws.noise,
            *forwards,
            *([] if draws.renoise is None else [draws.renoise]),
        ]

    first, second, other = (numbers(drawn(rollout, seed, interval)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[-1], other[-1])


def test_a_stochastic_rollout_gets_noise_for_the_steps_of_the_greatest_k() -> None:
    renoise = drawn("stochastic").renoise
    assert renoise is not None and renoise.shape == (6, 3, *SHAPE)
    assert not torch.equal(renoise[:, 0], renoise[:, 1])


@pytest.mark.parametrize("has_latents", [False, True])
@pytest.mark.parametrize("rollout", ["ode", "stochastic"])
def test_a_part_has_its_slice_of_the_numbers_and_its_own_prompts(rollout: str, has_latents: bool) -> None:
    draws, part = drawn(rollout), slice(2, 5)
    batch = part_of(draws, part, Numbered(), 60, CPU, has_latents=has_latents)
    assert torch.equal(batch.places.step_counts, draws.places.step_counts[part])
    assert torch.equal(batch.places.timestep, draws.places.timestep[part])
    assert torch.equal(batch.noise, draws.noise[part])
    for ours, whole in zip((*batch.fake, batch.generator), (*draws.fake, draws.generator), strict=True):
        assert torch.equal(ours.tau, whole.tau[part]) and torch.equal(ours.noise, whole.noise[part])
    assert batch.conditioning.prompt_embeds.flatten().tolist() == [62.0, 63.0, 64.0]
    assert (batch.latents is None) == (not has_latents)
    if batch.latents is not None:
        assert batch.latents.flatten().tolist() == [62.0, 63.0, 64.0]
    assert (batch.renoise is None) == (rollout == "ode")
    if batch.renoise is not None and draws.renoise is not None:
        assert torch.equal(batch.renoise, draws.renoise[part])


@pytest.mark.parametrize("coordinates", [COORDINATES, FLOW])
def test_the_full_interval_begins_above_t_m_if_noisy_samples_are_matched(coordinates: Coordinates) -> None:
    """Below t_m there is no q(x_tau | x_m). Clean samples and LCM's data are diffused from the clean end."""
    trajectories = trajectories_of(replace(SMALL, step_counts=(4,), timesteps={4: (999, 990, 700, 250)}), coordinates)
    places = draw_places(trajectories, 4000, torch.Generator().manual_seed(0))

    def tau_of(config: DistillConfig) -> Tensor:
        return draw_tau(replace(config, interval="full"), coordinates, places, torch.Generator().manual_seed(1))

    noisy = tau_of(SMALL)
    assert bool((noisy > places.next_timestep).all())
    last = noisy[places.row == 3]
    assert last.min().item() == pytest.approx(20, abs=9)
    assert 990 < noisy.max().item() <= 991, "above 980 the interval is the timestep after t_m"
    for config in (replace(SMALL, matching="clean"), replace(SMALL, method="lcm")):
        tau = tau_of(config)
        assert (tau.min().item(), tau.max().item()) == (pytest.approx(20, abs=5), pytest.approx(979, abs=2))
        assert float((tau < places.next_timestep).float().mean()) > 0.3


def test_a_part_lies_on_its_device() -> None:
    draws, meta = drawn("stochastic"), torch.device("meta")
    batch = part_of(draws, slice(0, 2), Numbered(), 0, meta, has_latents=True)
    on_device = (batch.noise, batch.renoise, batch.latents, batch.conditioning.prompt_embeds, batch.generator.noise)
    assert all(t is not None and t.device == meta for t in on_device)
    assert all(forward.noise.device == meta for forward in batch.fake)
    assert batch.places.timestep.device == CPU, "the schedule is computed on the CPU"
