"""The discriminator of TDM-unify-GAN, between diffused student samples and diffused real latents (Eq. 16, App. F.1)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tdm_runtime.families.denoiser import Denoiser
from tdm_runtime.families.unet import UNetDenoiser
from training.methods.batch import Batch, Forward
from training.methods.losses import adversarial_loss, discriminator_loss
from training.methods.precision import autocast
from training.methods.tdm import TDM, StudentSample


def build_discriminator(teacher: Denoiser) -> Denoiser:
    """Return the teacher's UNet encoder with a small head on its middle features.

    It takes the arguments of a denoiser, K included, and returns logits [B, 1, h, w], which are high for real latents.

    Raises:
        ValueError: The teacher is not a UNet.
    """
    if not isinstance(teacher, UNetDenoiser):
        raise ValueError(
            f"adversarial_weight needs a UNet as teacher, got {type(teacher).__name__}; set adversarial_weight to 0"
        )
    discriminator = copy.deepcopy(teacher).train().requires_grad_(True)
    unet = discriminator.model
    channels = unet.config.block_out_channels[-1]
    unet.up_blocks, unet.conv_norm_out = nn.ModuleList(), None
    unet.conv_out = nn.Sequential(nn.GroupNorm(1, channels), nn.SiLU(), nn.Conv2d(channels, 1, 1))
    return discriminator


class Adversary:
    """Losses of discriminator and student, on x_tau in the interval of the student's step."""

    def __init__(self, method: TDM, discriminator: Denoiser) -> None:
        self.method = method
        self.discriminator = discriminator

    def logits(self, x_tau: Tensor, batch: Batch, forward: Forward) -> Tensor:
        step_counts = self.method.step_counts_for(batch, "fake")
        if step_counts is not None:
            step_counts = step_counts.to(x_tau.device)
        timesteps = forward.tau.to(x_tau.device, torch.float32)
        with autocast(x_tau.device, self.method.config.precision):
            logits: Tensor = self.discriminator(x_tau, timesteps, step_counts, *batch.conditioning.tensors())
        return logits.float()

    def discriminator_loss(self, batch: Batch, sample: StudentSample, forward: Forward) -> Tensor:
        """Return the loss of the discriminator on real latents of the same prompts and student samples, at tau."""
        assert batch.latents is not None, "the distiller refuses a source without latents"
        kernel, sample = self.method.kernel(sample, forward), sample.detach()
        of_real = self.logits(kernel.diffuse_clean(batch.latents, forward.noise), batch, forward)
        return discriminator_loss(of_real, self.logits(kernel.diffuse(sample.x_m, forward.noise), batch, forward))

    def generator_loss(self, batch: Batch, sample: StudentSample, forward: Forward) -> Tensor:
        """Return the loss of the student, ADVLoss of Eq. (16)."""
        return adversarial_loss(
            self.logits(self.method.kernel(sample, forward).diffuse(sample.x_m, forward.noise), batch, forward)
        )
