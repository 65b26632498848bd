"""TDM and TDM-unify (sec. 3, Algorithm 1), with every choice the paper ablates. DMD2 is one setting of them.

An iteration: roll out, one update of the fake score (`fake_loss`), one of the student (`generator_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.config import DistillConfig
from training.methods.batch import Batch, Forward
from training.methods.losses import (
    ForwardKernel,
    elementwise_pseudo_huber,
    fake_score_loss,
    fisher_divergence,
    importance_weight,
    normalised_l2,
    pseudo_huber,
    revised_samples,
    trajectory_score_loss,
)
from training.methods.roles import Guided, Roles, TrainedRole
from training.methods.trajectory import Start, Trajectories, advance, roll_out


@dataclass(frozen=True)
class StudentSample:
    """What is matched: x_m at the end of the student's step, diffused onward from there."""

    x_m: Tensor
    x_0: Tensor
    timestep: Tensor
    """[B], t_m, or the clean end where clean samples are matched."""

    def detach(self) -> StudentSample:
        return StudentSample(self.x_m.detach(), self.x_0.detach(), self.timestep)


@dataclass(frozen=True)
class TDM:
    """The method, given its networks and choices."""

    roles: Roles
    trajectories: Trajectories
    config: DistillConfig
    real: Guided
    """The real score: the teacher with guidance."""

    def told(self, batch: Batch, role: TrainedRole) -> Tensor | None:
        """K, where the role is told it."""
        is_told = self.config.told == "both" or self.config.told == role
        return batch.places.step_counts if is_told else None

    def roll_out(self, batch: Batch) -> Start:
        """Algorithm 1, lines 3-5."""
        return roll_out(
            self.roles.student,
            self.trajectories,
            batch.noise,
            batch.places,
            batch.conditioning,
            tells_k=self.config.tells_student,
            renoise=batch.renoise,
        )

    def student_step(self, batch: Batch, start: Start) -> StudentSample:
        """The one step that gradients pass through."""
        x_m, x_0 = advance(
            self.roles.student,
            self.trajectories,
            start.x,
            batch.places,
            batch.conditioning,
            start.previous,
            told=self.told(batch, "student"),
        )
        if self.config.matching == "noisy":
            return StudentSample(x_m, x_0, batch.places.next_timestep)
        clean_end = torch.full_like(batch.places.next_timestep, self.trajectories.coordinates.clean_end)
        return StudentSample(x_0, x_0, clean_end)

    def fake_loss(self, batch: Batch, sample: StudentSample, forward: Forward) -> Tensor:
        """Train the fake score on the student's samples, Eq. (7) in the form that `fake_target` names."""
        sample, target = sample.detach(), self.config.fake_target
        kernel = self.kernel(sample, forward)
        diffuse, origin = (kernel.diffuse_clean, sample.x_0) if target == "clean" else (kernel.diffuse, sample.x_m)
        x_tau = diffuse(origin, forward.noise)
        denoised = self.roles.fake(x_tau, forward.tau, batch.conditioning, self.told(batch, "fake"))
        if target == "trajectory_score":
            return trajectory_score_loss(kernel, denoised, x_tau, forward.noise)
        weight = torch.ones(len(x_tau), device=x_tau.device)
        if target != "clean":
            exact = target == "importance_exact"
            weight = importance_weight(kernel, x_tau, sample.x_0, forward.noise, exact=exact)
        return fake_score_loss(kernel, denoised, sample.x_0, weight)

    def generator_loss(self, batch: Batch, sample: StudentSample, forward: Forward) -> tuple[Tensor, Tensor]:
        """Move the student's samples from where the fake score puts them to where the teacher does.

        Returns the loss and the root mean square of real minus fake.
        """
        with torch.set_grad_enabled(self.config.generator_loss == "fisher"):
            x_tau = self.kernel(sample, forward).diffuse(sample.x_m, forward.noise)
            real = self.real(x_tau, forward.tau, batch.conditioning)
            fake = self.roles.fake(x_tau, forward.tau, batch.conditioning, self.told(batch, "fake"))
        return self._divergence(sample, real, fake), (real - fake).detach().square().mean().sqrt()

    def kernel(self, sample: StudentSample, forward: Forward) -> ForwardKernel:
        """From where the sample stands to tau."""
        return self.trajectories.coordinates.kernel(forward.tau, sample.timestep, sample.x_m)

    def _divergence(self, sample: StudentSample, real: Tensor, fake: Tensor) -> Tensor:
        choice = self.config.generator_loss
        if choice == "fisher":
            return fisher_divergence(real, fake, sample.x_0)
        revised = revised_samples(sample.x_m, real, fake)
        if choice == "pseudo_huber":
            return pseudo_huber(sample.x_m, revised)
        loss = elementwise_pseudo_huber if choice == "elementwise_pseudo_huber" else normalised_l2
        return loss(sample.x_m, revised, sample.x_0, real)
