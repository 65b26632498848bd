"""The student's K-step trajectories: places of samples on them, and rollouts.

Legend: B samples; latents are [B, C, H, W] or [B, C, F, H, W]; per-sample numbers are [B], and
"levels" are shaped [B, 1, 1, ...] to multiply latents. t_i = T i / K (sec. 3.1): a step starts at
t_{m+1} and ends at t_m. "Eq." refers to the TDM paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from tdm_runtime.errors import RecipeError
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.sampling.schedule import (
    DiffusionSchedule,
    FlowSchedule,
    TeacherSchedule,
    flow_timesteps,
    spaced_timesteps,
)
from tdm_runtime.sampling.solvers import DeterministicSolver, Solver
from tdm_runtime.sampling.step_table import PredictionType, StepTable, build_step_table, denoise_columns
from training.methods.losses import ForwardKernel

CleanEstimate = Callable[[Tensor, Tensor, Conditioning, Tensor | None], Tensor]
"""(x [B, ...], timesteps [B], conditioning, step_counts [B] or None) -> estimate of x_0, float32, shaped as x."""


def level_columns(values: np.ndarray, like: Tensor) -> Tensor:
    """Convert numbers [B] to float32 [B, 1, 1, ...] on the device of `like`."""
    column = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(like.device)
    return column.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Coordinates:
    """The noise schedule of a denoiser, x_t = alpha_t x_0 + sigma_t noise, and its prediction type."""

    schedule: TeacherSchedule
    prediction_type: PredictionType
    shifts: Mapping[int, float] = field(default_factory=dict)
    """K -> shift of the timesteps of K steps, where it may differ from that of the flow schedule (FLUX.2)."""

    def even_timesteps(self, step_count: int) -> tuple[float, ...]:
        """Return t_i = T i / K, falling, without the clean end. In a flow it is even before the shift."""
        schedule = self.schedule
        if isinstance(schedule, FlowSchedule):
            shifted = replace(schedule, shift=self.shifts.get(step_count, schedule.shift))
            return tuple(flow_timesteps(shifted, step_count).tolist())
        return tuple(spaced_timesteps("trailing", step_count, schedule.num_train_timesteps).tolist())

    @property
    def clean_end(self) -> float:
        """Timestep at which a sample has no noise."""
        return -1.0 if isinstance(self.schedule, DiffusionSchedule) else 0.0

    def levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at timesteps [B], shaped to multiply `like`."""
        levels = self.schedule.levels(timesteps.double().cpu().numpy())
        return level_columns(levels.alphas, like), level_columns(levels.sigmas, like)

    def to_clean(self, x: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """Compute x_0 from a model output, in float32."""
        p, q = self._denoise_columns(x, timesteps)
        return p * x.float() + q * output.float()

    def to_output(self, x: Tensor, clean: Tensor, timesteps: Tensor) -> Tensor:
        """Compute the model output whose estimate of x_0 is `clean`, in float32."""
        p, q = self._denoise_columns(x, timesteps)
        return (clean.float() - p * x.float()) / q

    def _denoise_columns(self, x: Tensor, timesteps: Tensor) -> list[Tensor]:
        columns = denoise_columns(self.prediction_type, self.schedule.levels(timesteps.double().cpu().numpy()))
        return [level_columns(column, x) for column in columns]

    def kernel(self, tau: Tensor, start: Tensor, like: Tensor) -> ForwardKernel:
        """Return the kernel q(x_tau | x_start)."""
        return ForwardKernel(*self.levels(tau, like), *self.levels(start, like))

    def draw_between(self, low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
        """Draw timesteps [B] in (low, high].

        For a diffusion schedule they are whole and uniform. For a flow schedule they are uniform before the
        shift, because the teacher was trained with shifted timesteps.
        """
        share = torch.rand(len(low), generator=generator, dtype=torch.float64)
        if isinstance(self.schedule, FlowSchedule):
            total = self.schedule.num_train_timesteps
            ends = [self.schedule.unshifted(t.double().numpy() / total) for t in (low, high)]
            sigmas = ends[1] - share.numpy() * (ends[1] - ends[0])
            return torch.from_numpy(self.schedule.shifted(sigmas) * total)
        return low + 1 + (share * (high - low)).floor()


@dataclass(frozen=True)
class Trajectories:
    """The solver's step tables, one for each step count K in training."""

    coordinates: Coordinates
    tables: Mapping[int, StepTable]

    @property
    def step_counts(self) -> tuple[int, ...]:
        return tuple(sorted(self.tables))

    def ends(self, step_count: int) -> list[float]:
        """Return the K timesteps, falling, and the clean end."""
        return [*self.tables[step_count].timesteps.tolist(), self.coordinates.clean_end]

    def column(self, name: str, places: Places, like: Tensor) -> Tensor:
        """Return a table column at each sample's own row, shaped to multiply `like`."""
        rows = zip(places.step_counts.tolist(), places.row.tolist(), strict=True)
        return level_columns(np.array([getattr(self.tables[k], name)[j] for k, j in rows]), like)


def build_trajectories(
    coordinates: Coordinates, solver: Solver, timesteps: Mapping[int, Sequence[float]]
) -> Trajectories:
    """Build a step table for each step count.

    Args:
        timesteps: K -> its K timesteps, falling.

    Raises:
        RecipeError: the solver draws fresh noise, which a rollout gets by `renoise` only.
    """
    if solver not in get_args(DeterministicSolver):
        raise RecipeError(f"solver is {solver!r}; training rolls out by {', '.join(get_args(DeterministicSolver))}")
    tables = {
        k: build_step_table(
            coordinates.schedule, coordinates.prediction_type, solver, np.asarray(values, dtype=np.float64)
        )
        for k, values in timesteps.items()
    }
    return Trajectories(coordinates, tables)


@dataclass(frozen=True)
class Places:
    """Places of samples: each stands before step `row` of its trajectory of `step_counts` steps. All [B]."""

    step_counts: Tensor
    row: Tensor
    timestep: Tensor
    """t_{m+1}, float64, where the step starts."""
    next_timestep: Tensor
    """t_m, float64, where the step ends."""

    def __getitem__(self, index: Tensor | slice) -> Places:
        return Places(*(getattr(self, f.name)[index] for f in fields(self)))

    def at_row(self, row: int, trajectories: Trajectories) -> Places:
        """Return the places of the same samples before step `row`."""
        return places_at(trajectories, self.step_counts, torch.full_like(self.row, row))


def places_at(trajectories: Trajectories, step_counts: Tensor, row: Tensor) -> Places:
    """Return places, with both ends of each sample's step looked up."""
    pairs = [trajectories.ends(k)[j : j + 2] for k, j in zip(step_counts.tolist(), row.tolist(), strict=True)]
    ends = torch.tensor(pairs, dtype=torch.float64)
    return Places(step_counts, row, ends[:, 0], ends[:, 1])


def draw_places(trajectories: Trajectories, batch_size: int, generator: torch.Generator) -> Places:
    """Draw K uniformly from the step counts (Eq. 8), and a step uniformly from its K steps."""
    counts = torch.tensor(trajectories.step_counts)
    step_counts = counts[torch.randint(len(counts), (batch_size,), generator=generator)]
    row = (torch.rand(batch_size, generator=generator) * step_counts).floor().long()
    return places_at(trajectories, step_counts, row)


def advance(
    student: CleanEstimate,
    trajectories: Trajectories,
    x: Tensor,
    places: Places,
    conditioning: Conditioning,
    previous: Tensor | None = None,
    *,
    step_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one solver step of each sample. Return (x_{t_m}, x_0).

    Args:
        previous: x_0 of the step before, for solvers of second order, or None before the first step.
        step_counts: K of each sample, [B], which the student receives, or None for a student without K.
    """
    x_0 = student(x, places.timestep, conditioning, step_counts)
    a, b, c = (trajectories.column(name, places, x) for name in "abc")
    x_next = a * x + b * x_0
    return (x_next if previous is None else x_next + c * previous), x_0


@dataclass(frozen=True)
class Start:
    """Samples before their step, as the rollout leaves them, without gradient."""

    x: Tensor
    previous: Tensor
    """x_0 of the step before. It is zero before the first step, where solvers do not read it."""


@torch.no_grad()
def roll_out(
    student: CleanEstimate,
    trajectories: Trajectories,
    noise: Tensor,
    places: Places,
    conditioning: Conditioning,
    *,
    with_k: bool = True,
    renoise: Tensor | None = None,
) -> Start:
    """Run each sample from noise to the start of its step (Algorithm 1, lines 3-5).

    Args:
        with_k: Whether the student receives K.
        renoise: Fresh noise [B, rows, ...]. With it, each step goes to x_0 and adds this noise, as DMD2 and
            LCM sample. By default the rollout is deterministic.
    """
    x, previous = noise.clone(), torch.zeros_like(noise)
    for row in range(int(places.row.max())):
        going = (places.row > row).nonzero().flatten()
        here = places[going].at_row(row, trajectories)
        step_counts = here.step_counts if with_k else None
        x_next, x_0 = advance(
            student, trajectories, x[going], here, conditioning[going], previous[going], step_counts=step_counts
        )
        if renoise is not None:
            alphas, sigmas = trajectories.coordinates.levels(here.next_timestep, x_0)
            x_next = alphas * x_0 + sigmas * renoise[going, row]
        x[going], previous[going] = x_next, x_0
    return Start(x, previous)


def sample(
    student: CleanEstimate,
    trajectories: Trajectories,
    noise: Tensor,
    step_count: int,
    conditioning: Conditioning,
    *,
    with_k: bool = True,
    renoise: Tensor | None = None,
) -> Tensor:
    """Take all K steps from noise [B, ...] to clean samples."""
    done = torch.full((len(noise),), step_count)
    end = torch.zeros(len(noise), dtype=torch.float64)
    places = Places(done, done, end, end)
    return roll_out(student, trajectories, noise, places, conditioning, with_k=with_k, renoise=renoise).x
