"""The discriminator of TDM-unify-GAN: tells diffused student samples from diffused real latents (Eq. 16, App. F.1)."""

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
    """The teacher's UNet encoder with a small head on its middle features.

    Called as a denoiser is, it returns logits [B, 1, h, w], high for real; K enters where the student's does.

    Raises:
        ValueError: the teacher is no UNet.
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
    """Both sides of the game, on x_tau, in the interval of the student's step."""

    def __init__(self, method: TDM, discriminator: Denoiser) -> None:
        self.method = method
        self.discriminator = discriminator

    def logits(self, x_tau: Tensor, batch: Batch, forward: Forward) -> Tensor:
        told = self.method.told(batch, "fake")
        timesteps = forward.tau.to(x_tau.device, torch.float32)
        with autocast(x_tau.device, self.method.config.precision):
            logits: Tensor = self.discriminator(
                x_tau, timesteps, None if told is None else told.to(x_tau.device), *batch.conditioning.tensors()
            )
        return logits.float()

    def discriminator_loss(self, batch: Batch, sample: StudentSample, forward: Forward) -> Tensor:
        """Real latents of the same prompts against the student's samples, both at tau."""
        assert batch.latents is not None, "the distiller refuses a source without latents"
        kernel, sample = self.method.kernel(sample, forward), sample.detach()
        of_real = self.logits(kernel.diffuse_clean(batch.latents, forward.noise), batch, forward)
        return discriminator_loss(of_real, self.logits(kernel.diffuse(sample.x_m, forward.noise), batch, forward))

    def generator_loss(self, batch: Batch, sample: StudentSample, forward: Forward) -> Tensor:
        """ADVLoss of Eq. (16)."""
        return adversarial_loss(
            self.logits(self.method.kernel(sample, forward).diffuse(sample.x_m, forward.noise), batch, forward)
        )
