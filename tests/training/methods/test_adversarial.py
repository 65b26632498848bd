"""The discriminator of TDM-unify-GAN: its inputs, its losses by hand, and its network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tdm_runtime.families import denoiser_for
from tests.tiny_models import TINY_SHAPES, tiny_conditioning
from tests.training.methods.known import (
    CONFIG,
    SHAPE,
    KnownDenoiser,
    batch_of,
    known,
    levels,
    method_of,
    normal,
)
from tests.training.tiny_runs import tiny_base
from training.methods.adversarial import Adversary, build_discriminator
from training.methods.tdm import StudentSample

GAIN = 0.3
X_0, X_M = normal(4, *SHAPE, seed=5), normal(4, *SHAPE, seed=6)


def adversary_of(condition_for: str) -> Adversary:
    method = method_of(replace(CONFIG, step_condition_for=condition_for))  # type: ignore[arg-type]
    return Adversary(method, KnownDenoiser(GAIN))  # type: ignore[arg-type]


@pytest.mark.parametrize("condition_for", ["both", "student"])
def test_the_discriminator_compares_diffused_latents_with_the_diffused_trajectory(condition_for: str) -> None:
    """Real latents are clean, so they are diffused from the clean end; the student's x_m from t_m. Both end at tau."""
    adversary = adversary_of(condition_for)
    batch = batch_of(adversary.method)
    forward, m = batch.generator, batch.places.next_timestep
    x_m = X_M.clone().requires_grad_()
    sample = StudentSample(x_m, X_0, m)
    (alpha, sigma), (alpha_m, sigma_m) = levels(forward.tau), levels(m)
    scale = alpha / alpha_m
    assert batch.latents is not None
    of_real = alpha * batch.latents + sigma * forward.noise
    of_student = scale * X_M + (sigma**2 - (scale * sigma_m) ** 2).sqrt() * forward.noise
    k = batch.places.step_counts if condition_for == "both" else None
    real, fake = (known(GAIN, x, forward.tau, batch.conditioning, k) for x in (of_real, of_student))

    loss = adversary.discriminator_loss(batch, sample, forward)
    expected = (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert x_m.grad is None and adversary.discriminator.gain.grad is not None

    loss = adversary.generator_loss(batch, sample, forward)
    torch.testing.assert_close(loss, -fake.mean(), rtol=1e-4, atol=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x_m.grad, (-GAIN * scale / x_m.numel()).expand_as(x_m), rtol=1e-4, atol=1e-6)


def test_logits_are_float32_in_the_precision_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    seen: list[tuple[bool, torch.dtype]] = []

    class Watching(KnownDenoiser):
        def forward(self, x: Tensor, timesteps: Tensor, *arguments: Tensor) -> Tensor:  # type: ignore[override]
            seen.append((torch.is_autocast_enabled("cpu"), timesteps.dtype))
            return super().forward(x, timesteps, *arguments).bfloat16()

    for precision in ("fp32", "bf16"):
        method = method_of(replace(CONFIG, precision=precision))  # type: ignore[arg-type]
        batch = batch_of(method)
        assert Adversary(method, Watching(GAIN)).logits(X_M, batch, batch.generator).dtype == torch.float32  # type: ignore[arg-type]
    assert seen == [(False, torch.float32), (True, torch.float32)]


def test_the_discriminator_is_a_trainable_copy_of_the_encoder_with_one_logit_for_each_place() -> None:
    teacher = tiny_base("stable_diffusion").denoiser.eval()
    teacher.add_step_condition(8)
    teacher.requires_grad_(False)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    discriminator = build_discriminator(teacher)
    assert discriminator.training and all(p.requires_grad for p in discriminator.parameters())
    unet = discriminator.model
    assert len(unet.up_blocks) == 0 and unet.conv_norm_out is None
    down = dict(unet.down_blocks.named_parameters())
    assert all(torch.equal(p, before[f"model.down_blocks.{name}"]) for name, p in down.items())
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.add_(0.1)
    assert all(torch.equal(before[name], p) and not p.requires_grad for name, p in teacher.named_parameters())

    x, prompts = normal(2, *TINY_SHAPES["stable_diffusion"], seed=0), tiny_conditioning("stable_diffusion", 2)
    logits = [
        discriminator(x, torch.tensor([500.0, 20.0]), torch.tensor([k, 4]), *prompts.tensors()).detach() for k in (1, 2)
    ]
    assert logits[0].shape[:2] == (2, 1) and logits[0].shape[2] < x.shape[2]
    assert not torch.equal(logits[0][0], logits[1][0]) and torch.equal(logits[0][1], logits[1][1])


def test_the_head_reads_normalised_features_through_silu() -> None:
    discriminator = build_discriminator(tiny_base("stable_diffusion").denoiser)
    norm, activation, conv = discriminator.model.conv_out
    features = normal(2, 32, 4, 4, seed=0)
    flat = features.flatten(1)
    normed = (features - flat.mean(1).view(2, 1, 1, 1)) / (flat.var(1, correction=0) + norm.eps).sqrt().view(2, 1, 1, 1)
    assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (32, 1, (1, 1))
    torch.testing.assert_close(activation(norm(features)), normed * normed.sigmoid(), rtol=1e-4, atol=1e-5)


def test_the_head_reads_the_deepest_features() -> None:
    """A UNet of three levels of different widths, as real ones have: the middle has the width of the last."""
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8, 12),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
    )
    discriminator = build_discriminator(denoiser_for(unet))
    prompts = torch.zeros(2, 3, 8)
    assert discriminator(normal(2, 4, 16, 16, seed=0), torch.tensor([500.0, 20.0]), None, prompts).shape == (2, 1, 4, 4)


def test_only_a_unet_has_the_encoder() -> None:
    with pytest.raises(ValueError, match="needs a UNet as teacher, got KnownDenoiser; set adversarial_weight to 0"):
        build_discriminator(KnownDenoiser(GAIN))  # type: ignore[arg-type]
