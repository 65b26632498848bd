"""TDM and TDM-unify (sec. 3, Algorithm 1), with every choice that the paper ablates. DMD2 is one combination of them.

An iteration is a rollout, an update of the fake score (`fake_loss`) and an update of the student (`generator_loss`).
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
    """Sample x_m at the end of the student's step, which is diffused further and matched."""

    x_m: Tensor
    x_0: Tensor
    timestep: Tensor
    """t_m of each sample, [B], or the clean end if clean samples are matched."""

    def detach(self) -> StudentSample:
        return StudentSample(self.x_m.detach(), self.x_0.detach(), self.timestep)


@dataclass(frozen=True)
class TDM:
    """The method, with its networks and settings."""

    roles: Roles
    trajectories: Trajectories
    config: DistillConfig
    real: Guided
    """The real score: the teacher with guidance."""

    def step_counts_for(self, batch: Batch, role: TrainedRole) -> Tensor | None:
        """Return K of each sample, [B], if the config gives K to this role."""
        return batch.places.step_counts if self.config.step_condition_for in ("both", role) else None

    def roll_out(self, batch: Batch) -> Start:
        """Run the student to the start of each sample's step (Algorithm 1, lines 3-5)."""
        return roll_out(
            self.roles.student,
            self.trajectories,
            batch.noise,
            batch.places,
            batch.conditioning,
            with_k=self.config.student_receives_k,
            renoise=batch.renoise,
        )

    def student_step(self, batch: Batch, start: Start) -> StudentSample:
        """Take the one step that gradients pass through."""
        x_m, x_0 = advance(
            self.roles.student,
            self.trajectories,
            start.x,
            batch.places,
            batch.conditioning,
            start.previous,
            step_counts=self.step_counts_for(batch, "student"),
        )
        if self.config.matching == "noisy":
            return StudentSample(x_m, x_0, batch.places.next_timestep)
        clean_end = torch.full_like(batch.places.next_timestep, self.trajectories.coordinates.clean_end)
        return StudentSample(x_0, x_0, clean_end)

    def fake_loss(self, batch: Batch, sample: StudentSample, forward: Forward) -> Tensor:
        """Return the fake score's loss on the student's samples, Eq. (7) in the form that `fake_target` names."""
        sample, target = sample.detach(), self.config.fake_target
        kernel = self.kernel(sample, forward)
        diffuse, origin = (kernel.diffuse_clean, sample.x_0) if target == "clean" else (kernel.diffuse, sample.x_m)
        x_tau = diffuse(origin, forward.noise)
        denoised = self.roles.fake(x_tau, forward.tau, batch.conditioning, self.step_counts_for(batch, "fake"))
        if target == "trajectory_score":
            return trajectory_score_loss(kernel, denoised, sample.x_m, forward.noise)
        weight = torch.ones(len(x_tau), device=x_tau.device)
        if target in ("importance", "importance_exact"):
            exact = target == "importance_exact"
            weight = importance_weight(kernel, x_tau, sample.x_0, forward.noise, exact=exact)
        return fake_score_loss(kernel, denoised, sample.x_0, weight)

    def generator_loss(self, batch: Batch, sample: StudentSample, forward: Forward) -> tuple[Tensor, Tensor]:
        """Return the student's loss, and the root mean square of real minus fake.

        The loss moves samples from the fake score's estimate towards the teacher's.
        """
        with torch.set_grad_enabled(self.config.generator_loss == "fisher"):
            x_tau = self.kernel(sample, forward).diffuse(sample.x_m, forward.noise)
            real = self.real(x_tau, forward.tau, batch.conditioning)
            fake = self.roles.fake(x_tau, forward.tau, batch.conditioning, self.step_counts_for(batch, "fake"))
        return self._divergence(sample, real, fake), (real - fake).detach().square().mean().sqrt()

    def kernel(self, sample: StudentSample, forward: Forward) -> ForwardKernel:
        """Return the kernel from the sample's timestep to tau."""
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
