"""Scores of a served checkpoint and its teacher, as Markdown tables.

Frechet distances use the features of `training.emoji.report.features` and mean nothing outside this
repository. Compare them at equal picture counts only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from training.measure.intervals import interval
from training.measure.metrics import Features, coverage, diversity, frechet_distance

DIVERSITY_PROMPTS = 16
DIVERSITY_SEEDS = 8
NOISE_SEEDS = 10**4
"""Seeds of a repetition, more than it has pictures."""


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

    def __init__(self, count: int, features: FeatureNetwork, repetition: int = 0) -> None:
        """Draw `count` scenes of the training distribution and `count` held-out ones.

        Args:
            repetition: Each has other scenes, and other noise for the samplers.
        """
        self.scorer, self.network = Scorer(), features
        self._first_seed = repetition * NOISE_SEEDS
        scenes_seed = 1 + repetition
        self.seen, self.unseen = (scoring_scenes(count, held_out=h, seed=scenes_seed) for h in (False, True))
        drawn = [self.scorer.draw(scene) for h in (False, True) for scene in drawn_scenes(count, h, scenes_seed)]
        self.drawn_features = features_of(features, drawn)
        """Features of the same scenes as drawn for training, with jitter, [2 * count, 128]."""

    def measure(self, sample: Sampler) -> Measures:
        """Measure one sampler on every scene, and its diversity on several seeds of some scenes."""
        seen, unseen = (sample([caption(s) for s in scenes], self._first_seed) for scenes in (self.seen, self.unseen))
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
        pictures = sample([text for text in captions for _ in range(DIVERSITY_SEEDS)], 10**6 + self._first_seed)
        features = features_of(self.network, pictures)
        return diversity(features.reshape(len(captions), DIVERSITY_SEEDS, -1))


def drawn_scenes(count: int, held_out: bool, seed: int = 1) -> list[Scene]:
    """Return the scenes of `scoring_scenes` with jitter, as in training."""
    glyphs = load_glyphs()
    return [sample_scene(glyphs, seed, index, held_out=held_out) for index in range(count)]


def print_scores(checkpoint: Path, run: Path, count: int = 250, repetitions: int = 1) -> None:
    """Print the scores as a Markdown table, with rows of the teacher if `run` holds it.

    Args:
        count: Number of scenes of the training distribution, and of held-out ones.
        repetitions: Measurements with other scenes and noise. Several give means with 95% intervals.

    Raises:
        ValueError: `repetitions` is below 1.
        FileNotFoundError: The feature network is not trained.
    """
    if repetitions < 1:
        raise ValueError(f"--repetitions is {repetitions}; it must be at least 1")
    found, network = samplers(load_model(checkpoint), teacher_of(run)), load_features()
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in found}
    for repetition in range(repetitions):
        yardstick = Yardstick(count, network, repetition)
        measured = {name: yardstick.measure(sample) for name, sample in found.items()}
        teacher = measured.get(teacher_name(TEACHER_STEPS[-1]))
        for name, one in measured.items():
            rows[name].append(_values(one, yardstick, teacher))
    print(
        "| sampler | adherence | held out | PSNR to drawing, dB | Frechet distance to drawings "
        f"| to teacher, {TEACHER_STEPS[-1]} steps | coverage | diversity |\n|---|---|---|---|---|---|---|---|"
    )
    for name, values in rows.items():
        columns = zip(zip(*values, strict=True), DIGITS, strict=True)
        cells = ("-" if math.isnan(column[0]) else interval(column, digits) for column, digits in columns)
        print(f"| {name} | {' | '.join(cells)} |")


DIGITS = (3, 3, 2, 2, 2, 2, 2)
"""Decimal places of the columns of `_values`."""


def _values(found: Measures, yardstick: Yardstick, teacher: Measures | None) -> tuple[float, ...]:
    """Return one row of the table; NaN where there is no distance to the teacher."""
    return (
        found.seen.adherence,
        found.unseen.adherence,
        (found.seen.psnr_db + found.unseen.psnr_db) / 2,
        yardstick.to_drawn(found.features),
        math.nan if teacher is None or teacher is found else frechet_distance(found.features, teacher.features),
        coverage(yardstick.drawn_features, found.features),
        found.diversity,
    )


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
