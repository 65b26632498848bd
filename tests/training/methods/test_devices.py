"""Where tensors lie: timesteps, places and K on the CPU, networks and latents on a device. `meta` stands for a GPU.

PyTorch refuses an operation on tensors of `meta` and of the CPU, as it refuses one of a GPU's and the CPU's.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from tdm_runtime.families.conditioning import Conditioning
from tests.training.methods.known import CONFIG, COORDINATES, EMPTY, SHAPE, KnownDenoiser, batch_of, method_of, normal
from training.methods import adversarial, denoising, roles
from training.methods.adversarial import Adversary
from training.methods.batch import Batch, Forward
from training.methods.denoising import DenoisingDraws, denoising_loss_at
from training.methods.lcm import LCM, ConsistencyFunction
from training.methods.losses import dmd_norm
from training.methods.roles import CleanEstimator, Guided
from training.methods.tdm import TDM, StudentSample

META = torch.device("meta")


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has no autocast for `meta`."""
    for module in (roles, denoising, adversarial):
        monkeypatch.setattr(module, "autocast", lambda *_, **__: nullcontext())


def known_on_device(gain: float) -> nn.Module:
    return KnownDenoiser(gain).to(META)


def estimator(gain: float) -> CleanEstimator:
    return CleanEstimator(known_on_device(gain), COORDINATES, "fp32")


def guided() -> Guided:
    return Guided(estimator(0.9), EMPTY.to(META), 2.5)


def on_device(batch: Batch) -> Batch:
    """Return the batch as `part_of` makes it for a device."""
    assert batch.latents is not None
    whole = slice(0, len(batch.noise))
    return replace(
        batch,
        noise=batch.noise.to(META),
        fake=tuple(forward.part(whole, META) for forward in batch.fake),
        generator=batch.generator.part(whole, META),
        renoise=torch.zeros(4, 4, *SHAPE, device=META),
        conditioning=batch.conditioning.to(META),
        latents=batch.latents.to(META),
    )


def method_on_device(**changes: str) -> TDM:
    method = method_of(replace(CONFIG, **changes))  # type: ignore[arg-type]
    for role in ("student", "fake"):
        method.roles.module(role).to(META)  # type: ignore[arg-type]
    method.roles.teacher.denoiser.to(META)
    return replace(method, real=guided())


def student_sample(method: TDM, batch: Batch) -> StudentSample:
    return method.student_step(batch, method.roll_out(batch))


@pytest.mark.parametrize("matching", ["noisy", "clean"])
@pytest.mark.parametrize("target", ["importance", "importance_exact", "clean", "trajectory_score"])
def test_the_fake_score_learns_on_its_device(target: str, matching: str) -> None:
    method = method_on_device(fake_target=target, matching=matching)
    batch = on_device(batch_of(method))
    assert method.fake_loss(batch, student_sample(method, batch), batch.fake[0]).device == META


@pytest.mark.parametrize("choice", ["pseudo_huber", "elementwise_pseudo_huber", "normalised_l2", "fisher"])
def test_the_student_learns_on_its_device(choice: str) -> None:
    method = method_on_device(generator_loss=choice)
    batch = on_device(batch_of(method))
    loss, gap = method.generator_loss(batch, student_sample(method, batch), batch.generator)
    assert loss.device == gap.device == META


def test_the_discriminator_learns_on_its_device() -> None:
    method = method_on_device()
    batch, adversary = on_device(batch_of(method)), Adversary(method, known_on_device(0.3))  # type: ignore[arg-type]
    sample = student_sample(method, batch)
    for loss in (adversary.discriminator_loss, adversary.generator_loss):
        assert loss(batch, sample, batch.generator).device == META


def test_lcm_learns_on_its_device() -> None:
    student, target = (ConsistencyFunction(estimator(gain)) for gain in (0.5, 0.7))
    assert LCM(guided(), student, target, COORDINATES).loss(on_device(batch_of(method_of(CONFIG)))).device == META


def test_a_teacher_learns_on_its_device_from_numbers_on_the_cpu() -> None:
    prompts = Conditioning(torch.zeros(4, 1, 1, device=META))
    timesteps = torch.tensor([900.0, 500.0, 60.0, 3.0], dtype=torch.float64)
    draws = DenoisingDraws(timesteps, normal(4, *SHAPE, seed=1), torch.tensor([False, True, False, True]))
    latents = torch.zeros(4, *SHAPE, device=META)
    assert denoising_loss_at(estimator(0.5), latents, prompts, EMPTY.to(META), draws).device == META


def test_an_operation_on_both_devices_is_refused() -> None:
    """Otherwise the tests above could not fail."""
    with pytest.raises(RuntimeError, match="device"):
        dmd_norm(torch.zeros(2, 3, device=META), torch.zeros(2, 3))
    assert Forward(torch.zeros(2), torch.zeros(2, 3)).part(slice(0, 1), META).tau.device == torch.device("cpu")
