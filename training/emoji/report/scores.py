"""Scores of a served checkpoint and its teacher, as Markdown tables.

Frechet distances use the features of `training.emoji.report.features` and mean nothing outside this
repository. Compare them at equal picture counts only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from training.emoji.data.glyphs import load_glyphs
from training.emoji.data.scenes import Scene, caption, sample_scene
from training.emoji.report.features import FeatureNetwork, features_of, load_features
from training.emoji.report.samplers import TEACHER_STEPS, Sampler, pictures_with_k, samplers, teacher_name, teacher_of
from training.emoji.report.score import Score, Scorer, scoring_scenes
from training.measure.metrics import Features, coverage, diversity, frechet_distance

DIVERSITY_PROMPTS = 16
DIVERSITY_SEEDS = 8


@dataclass(frozen=True)
class Measures:
    """Measurements of one sampler."""

    seen: Score
    """Score on scenes of the training distribution."""
    unseen: Score
    """Score on combinations that training never saw."""
    features: Features
    """Features of all pictures, [N, 128]."""
    diversity: float
    """Mean feature distance between two seeds of one caption."""


class Yardstick:
    """Scenes whose captions samplers receive, and the scorer and network that measure the pictures."""

    def __init__(self, count: int, features: FeatureNetwork) -> None:
        """Draw `count` scenes of the training distribution and `count` held-out ones."""
        self.scorer, self.network = Scorer(), features
        self.seen, self.unseen = scoring_scenes(count), scoring_scenes(count, held_out=True)
        drawn = [self.scorer.draw(scene) for held_out in (False, True) for scene in drawn_scenes(count, held_out)]
        self.drawn_features = features_of(features, drawn)
        """Features of the same scenes as drawn for training, with jitter, [2 * count, 128]."""

    def measure(self, sample: Sampler) -> Measures:
        """Measure one sampler on every scene, and its diversity on several seeds of some scenes."""
        seen, unseen = (sample([caption(s) for s in scenes], 0) for scenes in (self.seen, self.unseen))
        return Measures(
            self.scorer.score(seen, self.seen),
            self.scorer.score(unseen, self.unseen),
            features_of(self.network, [*seen, *unseen]),
            self._diversity(sample),
        )

    def to_drawn(self, features: Features) -> float:
        """Return the Frechet distance to the drawn scenes."""
        return frechet_distance(features, self.drawn_features)

    def _diversity(self, sample: Sampler) -> float:
        captions = [caption(scene) for scene in self.seen[:DIVERSITY_PROMPTS]]
        pictures = sample([text for text in captions for _ in range(DIVERSITY_SEEDS)], 10**6)
        features = features_of(self.network, pictures)
        return diversity(features.reshape(len(captions), DIVERSITY_SEEDS, -1))


def drawn_scenes(count: int, held_out: bool) -> list[Scene]:
    """Return the scenes of `scoring_scenes` with jitter, as in training."""
    glyphs = load_glyphs()
    return [sample_scene(glyphs, 1, index, held_out=held_out) for index in range(count)]


def measure_samplers(found: Mapping[str, Sampler], yardstick: Yardstick) -> dict[str, Measures]:
    """Measure every sampler. Return the measurements by name."""
    return {name: yardstick.measure(sample) for name, sample in found.items()}


def print_scores(checkpoint: Path, run: Path, count: int = 250) -> None:
    """Print the scores as a Markdown table, with rows of the teacher if `run` holds it.

    Args:
        count: Number of scenes of the training distribution, and of held-out ones.

    Raises:
        FileNotFoundError: The feature network is not trained.
    """
    yardstick = Yardstick(count, load_features())
    measured = measure_samplers(samplers(load_model(checkpoint), teacher_of(run)), yardstick)
    teacher = measured.get(teacher_name(TEACHER_STEPS[-1]))
    print(
        "| sampler | adherence | held out | PSNR to drawing, dB | Frechet distance to drawings "
        f"| to teacher, {TEACHER_STEPS[-1]} steps | coverage | diversity |\n|---|---|---|---|---|---|---|---|"
    )
    for name, found in measured.items():
        print(_score_row(name, found, yardstick, teacher))


def _score_row(name: str, found: Measures, yardstick: Yardstick, teacher: Measures | None) -> str:
    to_teacher = None if teacher is None or teacher is found else frechet_distance(found.features, teacher.features)
    cells = (
        name,
        f"{found.seen.adherence:.3f}",
        f"{found.unseen.adherence:.3f}",
        f"{(found.seen.psnr_db + found.unseen.psnr_db) / 2:.2f}",
        f"{yardstick.to_drawn(found.features):.2f}",
        "-" if to_teacher is None else f"{to_teacher:.2f}",
        f"{coverage(yardstick.drawn_features, found.features):.2f}",
        f"{found.diversity:.2f}",
    )
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class StepCountScore:
    """Score of pictures whose denoiser received some K, right or wrong."""

    frechet: float
    """Frechet distance to the drawn scenes."""
    psnr_db: float


def wrong_step_counts(
    model: LoadedModel, count: int, features: FeatureNetwork
) -> dict[tuple[int, int | None], StepCountScore]:
    """Score every pair (steps taken, K that the denoiser receives or None).

    If the student reads K as it should, pairs of equal numbers are best (TDM, sec. 3.2).

    Args:
        count: Number of scenes of the training distribution, and of held-out ones.
    """
    yardstick = Yardstick(count, features)
    scenes = [*yardstick.seen, *yardstick.unseen]
    prompts = [caption(scene) for scene in scenes]

    def score(pictures: Sequence[Pixels]) -> StepCountScore:
        fidelity = [yardstick.scorer.psnr_db(p, scene) for p, scene in zip(pictures, scenes, strict=True)]
        return StepCountScore(yardstick.to_drawn(features_of(features, pictures)), float(np.mean(fidelity)))

    counts = model.recipe.step_counts
    pairs = product(counts, (*counts, None))
    return {(steps, k): score(pictures_with_k(model, prompts, steps, k)) for steps, k in pairs}


def print_wrong_step_counts(checkpoint: Path, count: int = 125) -> None:
    """Print `wrong_step_counts` as a Markdown table: steps taken down, K received across.

    Raises:
        FileNotFoundError: The feature network is not trained.
    """
    model = load_model(checkpoint)
    scores = wrong_step_counts(model, count, load_features())
    counts = model.recipe.step_counts
    received = (*counts, None)
    print("Frechet distance to drawings / PSNR to drawing, dB\n")
    heads = ("no K" if k is None else f"K = {k}" for k in received)
    print("| steps taken | " + " | ".join(heads) + " |")
    print("|---" * (len(received) + 1) + "|")
    for steps in counts:
        cells = (f"{scores[steps, k].frechet:.2f} / {scores[steps, k].psnr_db:.2f}" for k in received)
        print(f"| {steps} | " + " | ".join(cells) + " |")
