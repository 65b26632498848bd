"""The losses of Trajectory Distribution Matching, as pure functions.

Legend: B samples, C H W latent axes. x_m is the student's sample on its trajectory, x_tau the same
diffused further to timestep tau, x_0 a clean estimate. "Eq." is the TDM paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HUBER_C_PER_ROOT_DIM = 0.00054
IMPORTANCE_CLIP = 20.0
SNR_CLIP = 5.0


@dataclass(frozen=True)
class ForwardKernel:
    """q(x_tau | x_m) and q(x_tau | x_0), each scale shaped [B, 1, 1, 1]."""

    alpha_tau: Tensor
    sigma_tau: Tensor
    alpha_m: Tensor
    sigma_m: Tensor

    @property
    def scale(self) -> Tensor:
        """Signal scale from m to tau."""
        return self.alpha_tau / self.alpha_m

    @property
    def beta(self) -> Tensor:
        """Noise scale from m to tau: what is missing to sigma_tau."""
        return (self.sigma_tau**2 - (self.scale * self.sigma_m) ** 2).clamp_min(0).sqrt()

    def diffuse(self, x_m: Tensor, noise: Tensor) -> Tensor:
        """Draw x_tau ~ q(x_tau | x_m)."""
        return self.scale * x_m + self.beta * noise


def importance_weight(kernel: ForwardKernel, x_tau: Tensor, x_0: Tensor, noise: Tensor) -> Tensor:
    """q(x_tau | x_0) / q(x_tau | x_m) of the fake score's loss (sec. 3.1), tempered. Shape [B].

    The exact ratio of two Gaussians in d dimensions under- or overflows (log-weights around -1000
    at d = 1024), so the exponent is averaged over dimensions instead of summed, and clipped. The
    ratio's factor that depends on tau alone is left to the weight omega_tau.
    """
    noise_from_clean = (x_tau - kernel.alpha_tau * x_0) / kernel.sigma_tau
    exponent = 0.5 * (noise.square().flatten(1).mean(1) - noise_from_clean.square().flatten(1).mean(1))
    return exponent.exp().clamp(1.0 / IMPORTANCE_CLIP, IMPORTANCE_CLIP)


def fake_score_loss(kernel: ForwardKernel, denoised: Tensor, x_0: Tensor, weight: Tensor) -> Tensor:
    """Denoising loss of the fake score, Eq. (7) with importance weights. Scalar.

    omega_tau = 1 + min(SNR, 5): the v-prediction weight, clipped at the clean end (Hang et al. 2023).

    Args:
        denoised: the fake score's estimate of x_0 at (x_tau, tau, K).
        x_0: the student's clean estimate, no gradient.
        weight: [B], from `importance_weight`.
    """
    snr = (kernel.alpha_tau / kernel.sigma_tau).square().flatten()
    error = (denoised - x_0).square().flatten(1).mean(1)
    loss: Tensor = (weight * (1.0 + snr.clamp_max(SNR_CLIP)) * error).mean()
    return loss


def pseudo_huber(x_m: Tensor, revised: Tensor) -> Tensor:
    """Generator loss, Eq. (11): sqrt(||x_m - sg(x~_m)||^2 + c^2) - c, c = 0.00054 sqrt(d). Scalar.

    Args:
        x_m: with gradient.
        revised: x~_m of Eq. (6); its gradient is stopped here.
    """
    c = HUBER_C_PER_ROOT_DIM * x_m[0].numel() ** 0.5
    squared = (x_m - revised.detach()).square().flatten(1).sum(1)
    loss: Tensor = (torch.sqrt(squared + c * c) - c).mean()
    return loss


def revised_samples(x_m: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """x~_m of Eq. (6), with lambda_tau = sigma_tau^2 / alpha_tau, so scores become clean estimates.

    s_phi - s_psi = alpha_tau / sigma_tau^2 (x_0^real - x_0^fake).
    """
    return x_m + (real - fake)


def guided(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance."""
    return unconditional + guidance_scale * (conditional - unconditional)
