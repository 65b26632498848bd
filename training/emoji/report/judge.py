"""Measurements of emoji samplers on fixed captions and noise, for the ablations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.model.decoder import Pixels, torch_decoder
from tdm_runtime.sampling.noise import initial_noise
from tdm_runtime.sampling.schedule import spaced_timesteps
from training.emoji.data.scenes import caption
from training.emoji.report.features import FeatureNetwork, features_of, load_features
from training.emoji.report.score import Scorer, scoring_scenes
from training.emoji.stages.student import EMOJI, LATENT_SHAPE, ScenePrompts, load_denoiser
from training.emoji.stages.teacher import COORDINATES
from training.measure.metrics import diversity, frechet_distance
from training.methods.roles import CleanEstimator, Guided
from training.methods.trajectory import CleanEstimate, Trajectories, build_trajectories, sample

PICTURES = 96
DIVERSE_PROMPTS, DIVERSE_SEEDS = 6, 4
TEACHER_STEPS = 25
CALL = 48
"""Samples of one call of a denoiser or decoder."""


@dataclass(frozen=True)
class Measured:
    """Measurements of one sampler at one step count."""

    adherence: float
    """Share of pictures with every glyph and the background right, 0..1."""
    psnr_db: float
    """Peak signal-to-noise ratio to the drawn scene of the caption, decibels, averaged over pictures."""
    frechet: float
    """Frechet distance to the teacher's pictures at 25 steps."""
    frechet_drawn: float
    """Frechet distance to the drawn scenes of the captions."""
    diversity: float
    """Mean feature distance between seeds of one caption."""


@dataclass(frozen=True)
class Sampler:
    """Sampler that takes K steps of an estimate, `CALL` samples at a time."""

    estimate: CleanEstimate
    trajectories: Trajectories
    steps: int
    with_k: bool = True
    is_stochastic: bool = False

    @torch.no_grad()
    def __call__(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Return latents, shaped as noise."""
        generator = torch.Generator().manual_seed(1)
        renoise = torch.randn(len(noise), self.steps, *noise.shape[1:], generator=generator)
        parts = [slice(start, start + CALL) for start in range(0, len(noise), CALL)]
        return torch.cat(
            [
                sample(
                    self.estimate,
                    self.trajectories,
                    noise[part],
                    self.steps,
                    conditioning[part],
                    with_k=self.with_k,
                    renoise=renoise[part] if self.is_stochastic else None,
                )
                for part in parts
            ]
        )


class Judge:
    """Measures samplers, and compares them with a teacher's pictures at 25 steps."""

    def __init__(self, run: Path, teacher: str = "teacher") -> None:
        """Load the teacher of a run, and make its pictures if the run does not hold them.

        Args:
            teacher: Folder of the teacher in the run.
        """
        folder = run / teacher
        self.prompts = ScenePrompts(folder, seed=0)
        vae = AutoencoderKL.from_pretrained(run / "autoencoder" / "vae").eval()
        self.decoder = torch_decoder(vae, torch.device("cpu"))
        self.network: FeatureNetwork = load_features()
        self.scorer = Scorer()
        self.scenes = scoring_scenes(PICTURES)
        self.conditioning = self.prompts.encode([caption(scene) for scene in self.scenes])
        self.noise = torch.stack([initial_noise(seed, LATENT_SHAPE) for seed in range(PICTURES)])
        repeated = [caption(scene) for scene in self.scenes[:DIVERSE_PROMPTS] for _ in range(DIVERSE_SEEDS)]
        self.repeated = self.prompts.encode(repeated)
        self.real = Guided(
            CleanEstimator(load_denoiser(folder / "unet").eval(), COORDINATES),
            self.prompts.empty(),
            EMOJI.guidance_scale,
        )
        self.teachers_pictures = self._teachers_pictures(folder / f"pictures-{PICTURES}.npy")
        self.reference = features_of(self.network, self.teachers_pictures)
        self.drawn = features_of(self.network, [self.scorer.draw(scene) for scene in self.scenes])

    def _teachers_pictures(self, file: Path) -> list[Pixels]:
        """Return the teacher's pictures at 25 steps from a file, which is written first if it is missing."""
        if not file.is_file():
            np.save(file, np.stack(self.pictures(self.teacher(TEACHER_STEPS)(self.noise, self.conditioning))))
        return list(np.load(file))

    def teacher(self, steps: int) -> Sampler:
        """Return a DDIM sampler of the guided teacher."""
        timesteps = spaced_timesteps("trailing", steps, COORDINATES.schedule.num_train_timesteps).tolist()
        return Sampler(self.real, build_trajectories(COORDINATES, "ddim", {steps: timesteps}), steps, with_k=False)

    def pictures(self, latents: Tensor) -> list[Pixels]:
        """Decode latents to pictures, uint8 [H, W, 3] each."""
        return [picture for part in torch.split(latents, CALL) for picture in self.decoder.decode(part)]

    def frechet(self, sampler: Sampler) -> float:
        """Return the Frechet distance to the teacher's pictures at 25 steps."""
        pictures = self.pictures(sampler(self.noise, self.conditioning))
        return frechet_distance(features_of(self.network, pictures), self.reference)

    def measure(self, sampler: Sampler) -> Measured:
        """Measure one sampler."""
        return self._measured(sampler, self.pictures(sampler(self.noise, self.conditioning)))

    def measure_teacher(self) -> Measured:
        """Measure the teacher at 25 steps."""
        return self._measured(self.teacher(TEACHER_STEPS), self.teachers_pictures)

    def _measured(self, sampler: Sampler, pictures: list[Pixels]) -> Measured:
        repeated = self.pictures(sampler(self.noise[: len(self.repeated)], self.repeated))
        score, features = self.scorer.score(pictures, self.scenes), features_of(self.network, pictures)
        spread = features_of(self.network, repeated).reshape(DIVERSE_PROMPTS, DIVERSE_SEEDS, -1)
        return Measured(
            score.adherence,
            score.psnr_db,
            frechet_distance(features, self.reference),
            frechet_distance(features, self.drawn),
            diversity(spread),
        )
