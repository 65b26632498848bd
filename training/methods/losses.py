"""The losses of Trajectory Distribution Matching and of its baselines, as pure functions.

Legend: B samples of d elements. x_m is the student's sample on its trajectory, x_tau is x_m diffused
further to timestep tau, x_0 is the student's clean estimate. `real` and `fake` are the estimates of
x_0 at x_tau by the teacher and the fake score. A score is s = -(x_tau - alpha_tau x_0) / sigma_tau^2,
so s_real - s_fake = alpha_tau / sigma_tau^2 (real - fake). "Eq." refers to the TDM paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu

HUBER_C_PER_ROOT_DIM = 0.00054
"""c of the pseudo-Huber loss for the norm of a sample, from iCT (Song and Dhariwal 2024)."""
ELEMENTWISE_HUBER_C = 1e-3
IMPORTANCE_CLIP = 20.0
SNR_CLIP = 5.0


@dataclass(frozen=True)
class ForwardKernel:
    """The densities q(x_tau | x_m) and q(x_tau | x_0). Each level is shaped [B, 1, 1, ...]."""

    alpha_tau: Tensor
    sigma_tau: Tensor
    alpha_m: Tensor
    sigma_m: Tensor

    @property
    def scale(self) -> Tensor:
        """Factor on the signal from m to tau."""
        return self.alpha_tau / self.alpha_m

    @property
    def beta(self) -> Tensor:
        """Deviation of the noise that is added from m to tau."""
        return (self.sigma_tau**2 - (self.scale * self.sigma_m) ** 2).clamp_min(0).sqrt()

    def diffuse(self, x_m: Tensor, noise: Tensor) -> Tensor:
        """Draw x_tau ~ q(x_tau | x_m)."""
        return self.scale * x_m + self.beta * noise

    def diffuse_clean(self, x_0: Tensor, noise: Tensor) -> Tensor:
        """Draw x_tau ~ q(x_tau | x_0)."""
        return self.alpha_tau * x_0 + self.sigma_tau * noise


def per_sample(x: Tensor) -> Tensor:
    """Return the mean over all axes but the first, [B]."""
    return x.flatten(1).mean(1)


def like_levels(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] to [B, 1, 1, ...], so that it multiplies `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


# ---- the fake score ------------------------------------------------------------------------------


def importance_weight(
    kernel: ForwardKernel, x_tau: Tensor, x_0: Tensor, noise: Tensor, *, exact: bool = False
) -> Tensor:
    """Return the weights q(x_tau | x_0) / q(x_tau | x_m) of the fake score's loss (sec. 3.1), [B].

    The exact ratio of two Gaussians in d dimensions under- or overflows (log-weights around -1000
    at d = 1024). So by default the weight is tempered: the exponent is averaged over dimensions instead
    of summed, the weight is clipped to [1/20, 20], and omega_tau covers the factor that depends on tau alone.

    Args:
        exact: Whether to return the exact ratio, for few dimensions.
    """
    noise_from_clean = (x_tau - kernel.alpha_tau * x_0) / kernel.sigma_tau
    exponent = 0.5 * (per_sample(noise.square()) - per_sample(noise_from_clean.square()))
    if exact:
        of_tau_alone = (kernel.beta / kernel.sigma_tau).flatten()
        return (exponent * noise[0].numel()).exp() * of_tau_alone ** noise[0].numel()
    return exponent.exp().clamp(1.0 / IMPORTANCE_CLIP, IMPORTANCE_CLIP)


def fake_score_loss(kernel: ForwardKernel, denoised: Tensor, x_0: Tensor, weight: Tensor) -> Tensor:
    """Return the denoising loss of the fake score, Eq. (7), with importance weights. Scalar.

    Args:
        denoised: The fake score's estimate of x_0 at (x_tau, tau, K).
        x_0: The student's clean estimate, without gradient.
        weight: Weights [B] from `importance_weight`, or ones.
    """
    loss: Tensor = (weight * omega(kernel) * per_sample((denoised - x_0).square())).mean()
    return loss


def omega(kernel: ForwardKernel) -> Tensor:
    """Return omega_tau = 1 + min(SNR, 5), the v-prediction weight clipped at the clean end (Hang et al. 2023), [B]."""
    return 1.0 + (kernel.alpha_tau / kernel.sigma_tau).square().flatten().clamp_max(SNR_CLIP)


def trajectory_score_loss(kernel: ForwardKernel, denoised: Tensor, x_m: Tensor, noise: Tensor) -> Tensor:
    """Return the denoising score matching loss for q(x_tau | x_m) (Vincent 2011). Scalar. It is not in the paper.

    Its optimum is the score of the diffused trajectory distribution p_{theta, tau | t_i} that Eq. (5) needs. The
    score of q(x_tau | x_m) is -noise / beta. Written as an estimate of x_0 it is

        target = x_m / alpha_m - alpha_tau sigma_m^2 / (alpha_m^2 beta) noise.

    The weight is omega_tau / (1 + v). v = (sigma_m sigma_tau / (alpha_m beta))^2 is the variance of target - x_0 if the
    noise in x_m is independent of x_0, so the loss stays finite as beta goes to 0. At the clean end v is 0, the target
    is x_0, and the loss is Eq. (7).
    """
    to_clean = kernel.sigma_m / kernel.alpha_m
    beta_target_error = kernel.beta * (denoised - x_m / kernel.alpha_m) + kernel.alpha_tau * to_clean**2 * noise
    norm = (kernel.beta**2 + (to_clean * kernel.sigma_tau) ** 2).sqrt()
    loss: Tensor = (omega(kernel) * per_sample((beta_target_error / norm).square())).mean()
    return loss


# ---- the generator -------------------------------------------------------------------------------


def revised_samples(x_m: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Return x~_m of Eq. (6). With lambda_tau = sigma_tau^2 / alpha_tau the scores become clean estimates."""
    return x_m + (real - fake)


def pseudo_huber(x_m: Tensor, revised: Tensor) -> Tensor:
    """Return the surrogate loss, Eq. (11): sqrt(||x_m - sg(x~_m)||^2 + c^2) - c, c = 0.00054 sqrt(d). Scalar.

    Args:
        x_m: The student's sample, with gradient.
        revised: x~_m of Eq. (6). This function stops its gradient.
    """
    c = HUBER_C_PER_ROOT_DIM * x_m[0].numel() ** 0.5
    squared = (x_m - revised.detach()).square().flatten(1).sum(1)
    loss: Tensor = (torch.sqrt(squared + c * c) - c).mean()
    return loss


def elementwise_pseudo_huber(x_m: Tensor, revised: Tensor, x_0: Tensor, real: Tensor) -> Tensor:
    """Return the element-wise pseudo-Huber loss sqrt(e^2 + c^2) - c, c = 0.001, with DMD's normalisation. Scalar."""
    error = x_m - revised.detach()
    c = ELEMENTWISE_HUBER_C
    return (per_sample(torch.sqrt(error.square() + c * c) - c) / dmd_norm(x_0, real)).mean()


def normalised_l2(x_m: Tensor, revised: Tensor, x_0: Tensor, real: Tensor) -> Tensor:
    """Return the L2 loss of Eq. (6) with DMD's normalisation (Yin et al. 2024, eq. 8). Scalar.

    It is Table 5's "w/o surrogate".
    """
    return (0.5 * per_sample((x_m - revised.detach()).square()) / dmd_norm(x_0, real)).mean()


def dmd_norm(x_0: Tensor, real: Tensor) -> Tensor:
    """Return the mean |x_0 - real| of each sample, [B], without gradient."""
    return per_sample((x_0 - real).detach().abs()).clamp_min(1e-4)


def fisher_divergence(real: Tensor, fake: Tensor, x_0: Tensor, alpha: float = 1.0) -> Tensor:
    """Return the Fisher divergence, which replaces reverse KL (Table 8), by SiD's score identity. Scalar.

    SiD is Zhou et al. 2024, eq. 23. The gradient flows into x_0, and through x_tau into both networks, whose
    weights are fixed. That costs two more backward passes.

    Args:
        real, fake: Estimates at x_tau, which depends on the student.
        x_0: The student's clean estimate, with gradient.
        alpha: Weight of the squared difference that is subtracted. SiD uses 1 to 1.2.
    """
    gap = real - fake
    identity = gap * (fake - x_0) + (1.0 - alpha) * gap.square()
    loss: Tensor = (per_sample(identity) / dmd_norm(x_0, real)).mean()
    return loss


def guided(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Apply classifier-free guidance."""
    return unconditional + guidance_scale * (conditional - unconditional)


# ---- the discriminator of TDM-unify-GAN (Eq. 16) -------------------------------------------------


def discriminator_loss(of_real: Tensor, of_student: Tensor) -> Tensor:
    """Return the hinge loss of logits [B, ...] (Lim and Ye 2017). Scalar."""
    return relu(1.0 - of_real).mean() + relu(1.0 + of_student).mean()


def adversarial_loss(of_student: Tensor) -> Tensor:
    """Return ADVLoss of Eq. (16): it is least where the logits of diffused student samples are high. Scalar."""
    return -of_student.mean()


# ---- baselines -----------------------------------------------------------------------------------


def consistency_scalings(timesteps: Tensor, like: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return c_skip and c_out of a latent consistency model (Luo et al. 2023), which are 1 and 0 at the clean end.

    Args:
        timesteps: Timesteps [B], 0..T. LCM scales them by 10.
    """
    scaled = like_levels(timesteps.to(like.device, torch.float32) * 10.0, like)
    norm = scaled.square() + sigma_data**2
    return sigma_data**2 / norm, scaled / norm.sqrt()


def consistency_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """Return the pseudo-Huber loss of a consistency function at two neighbouring timesteps, Eq. (10). Scalar."""
    return pseudo_huber(estimate, target)


def denoising_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of a model output, the loss of teachers. Scalar."""
    return (output.float() - target).square().mean()
