"""Where samples stand on the student's K-step trajectories, and how they get there.

Legend: B samples; latents are [B, C, H, W] or [B, C, F, H, W]; per-sample numbers are [B], and
"levels" are shaped [B, 1, 1, ...] to multiply latents. t_i = T i / K (sec. 3.1): t_m is where a
step ends, t_{m+1} where it starts. "Eq." is the TDM paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.sampling.schedule import DiffusionSchedule, FlowSchedule, NoiseSchedule
from tdm_runtime.sampling.step_table import PredictionType, Solver, StepTable, build_step_table, denoise_columns
from training.methods.losses import ForwardKernel

CleanEstimate = Callable[[Tensor, Tensor, Conditioning, Tensor | None], Tensor]
"""(x [B, ...], timesteps [B], conditioning, step_counts [B] or None) -> estimate of x_0, float32, shaped as x."""


def level_columns(values: np.ndarray, like: Tensor) -> Tensor:
    """Numbers [B] as float32 [B, 1, 1, ...] on the device of `like`."""
    column = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(like.device)
    return column.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Coordinates:
    """The space a denoiser works in: x_t = alpha_t x_0 + sigma_t noise, and what it predicts."""

    schedule: NoiseSchedule
    prediction_type: PredictionType

    @property
    def clean_end(self) -> float:
        """The timestep below which nothing is noise."""
        return -1.0 if isinstance(self.schedule, DiffusionSchedule) else 0.0

    def levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at timesteps [B], shaped to multiply `like`."""
        levels = self.schedule.levels(timesteps.double().cpu().numpy())
        return level_columns(levels.alphas, like), level_columns(levels.sigmas, like)

    def to_clean(self, x: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 from a model output, in float32."""
        columns = denoise_columns(self.prediction_type, self.schedule.levels(timesteps.double().cpu().numpy()))
        p, q = (level_columns(column, x) for column in columns)
        return p * x.float() + q * output.float()

    def kernel(self, tau: Tensor, start: Tensor, like: Tensor) -> ForwardKernel:
        """q(x_tau | x_start)."""
        return ForwardKernel(*self.levels(tau, like), *self.levels(start, like))

    def draw_between(self, low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
        """Timesteps [B], uniform in (low, high].

        Whole ones of a diffusion schedule. Of a flow schedule, uniform before the shift: the shift
        is how the teacher was told to spend its timesteps.
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
    """The solver's tables of every step count K that is trained."""

    coordinates: Coordinates
    tables: Mapping[int, StepTable]

    @property
    def step_counts(self) -> tuple[int, ...]:
        return tuple(sorted(self.tables))

    def ends(self, step_count: int) -> list[float]:
        """The K timesteps, falling, and the clean end."""
        return [*self.tables[step_count].timesteps.tolist(), self.coordinates.clean_end]

    def column(self, name: str, places: Places, like: Tensor) -> Tensor:
        """A column of each sample's own row, shaped to multiply `like`."""
        rows = zip(places.step_counts.tolist(), places.row.tolist(), strict=True)
        return level_columns(np.array([getattr(self.tables[k], name)[j] for k, j in rows]), like)


def build_trajectories(
    coordinates: Coordinates, solver: Solver, timesteps: Mapping[int, Sequence[float]]
) -> Trajectories:
    """Tables for step count K -> its K timesteps, falling."""
    tables = {
        k: build_step_table(
            coordinates.schedule, coordinates.prediction_type, solver, np.asarray(values, dtype=np.float64)
        )
        for k, values in timesteps.items()
    }
    return Trajectories(coordinates, tables)


@dataclass(frozen=True)
class Places:
    """Each sample stands before step `row` of its `step_counts`-step trajectory. All [B]."""

    step_counts: Tensor
    row: Tensor
    timestep: Tensor
    """t_{m+1}, float64: the step starts here."""
    next_timestep: Tensor
    """t_m, float64: and ends here."""

    def __getitem__(self, index: Tensor | slice) -> Places:
        return Places(*(getattr(self, f.name)[index] for f in fields(self)))

    def at_row(self, row: int, trajectories: Trajectories) -> Places:
        """The same samples before step `row`."""
        return places_at(trajectories, self.step_counts, torch.full_like(self.row, row))


def places_at(trajectories: Trajectories, step_counts: Tensor, row: Tensor) -> Places:
    """Look up both ends of each sample's step."""
    pairs = [trajectories.ends(k)[j : j + 2] for k, j in zip(step_counts.tolist(), row.tolist(), strict=True)]
    ends = torch.tensor(pairs, dtype=torch.float64)
    return Places(step_counts, row, ends[:, 0], ends[:, 1])


def draw_places(trajectories: Trajectories, batch_size: int, generator: torch.Generator) -> Places:
    """K uniform in the list (Eq. 8), the step uniform among its K."""
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
    told: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One solver step of each sample. Returns (x_{t_m}, x_0).

    Args:
        previous: x_0 of the step before, for solvers of second order; None before the first step.
        told: step counts the student is told, or None for a student that knows no K.
    """
    x_0 = student(x, places.timestep, conditioning, told)
    a, b, c = (trajectories.column(name, places, x) for name in "abc")
    x_next = a * x + b * x_0
    return (x_next if previous is None else x_next + c * previous), x_0


@dataclass(frozen=True)
class Start:
    """A sample before its step: what the rollout leaves behind. No gradient."""

    x: Tensor
    previous: Tensor
    """x_0 of the step before; zero before the first, where solvers do not read it."""


@torch.no_grad()
def roll_out(
    student: CleanEstimate,
    trajectories: Trajectories,
    noise: Tensor,
    places: Places,
    conditioning: Conditioning,
    *,
    tells_k: bool = True,
    renoise: Tensor | None = None,
) -> Start:
    """Run each sample from noise to the start of its step (Algorithm 1, lines 3-5).

    Args:
        renoise: [B, rows, ...]; given, each step goes to x_0 and back with fresh noise, as DMD2 and
            LCM sample. By default the rollout is deterministic.
    """
    x, previous = noise.clone(), torch.zeros_like(noise)
    for row in range(int(places.row.max())):
        going = (places.row > row).nonzero().flatten()
        here = places[going].at_row(row, trajectories)
        told = here.step_counts if tells_k else None
        x_next, x_0 = advance(student, trajectories, x[going], here, conditioning[going], previous[going], told=told)
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
    tells_k: bool = True,
    renoise: Tensor | None = None,
) -> Tensor:
    """All K steps from noise [B, ...] to clean samples."""
    done = torch.full((len(noise),), step_count)
    end = torch.zeros(len(noise), dtype=torch.float64)
    places = Places(done, done, end, end)
    return roll_out(student, trajectories, noise, places, conditioning, tells_k=tells_k, renoise=renoise).x
