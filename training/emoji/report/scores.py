"""Measure a checkpoint as it is served, beside its teacher: tables of scores in Markdown.

Frechet distances are taken in the feature space of `training.emoji.report.features` and mean nothing
outside this repository; compare them at equal picture counts only.
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
from training.emoji.report.samplers import TEACHER_STEPS, Sampler, pictures_told, samplers, teacher_name, teacher_of
from training.emoji.report.score import Score, Scorer, scoring_scenes
from training.measure.metrics import Features, coverage, diversity, frechet_distance

DIVERSITY_PROMPTS = 16
DIVERSITY_SEEDS = 8


@dataclass(frozen=True)
class Measures:
    """What is known of one sampler."""

    seen: Score
    """On scenes of the training distribution."""
    unseen: Score
    """On combinations that training never saw."""
    features: Features
    """Of the pictures of both, [N, 128]."""
    diversity: float
    """Mean feature distance between two seeds of one caption."""


class Yardstick:
    """Scenes to ask for, and what measures the answers."""

    def __init__(self, count: int, features: FeatureNetwork) -> None:
        """`count` scenes of the training distribution and as many held-out ones."""
        self.scorer, self.network = Scorer(), features
        self.seen, self.unseen = scoring_scenes(count), scoring_scenes(count, held_out=True)
        drawn = [self.scorer.draw(scene) for held_out in (False, True) for scene in drawn_scenes(count, held_out)]
        self.drawn_features = features_of(features, drawn)
        """Of the same scenes as drawn for training, jitter and all: [2 * count, 128]."""

    def measure(self, sample: Sampler) -> Measures:
        """Ask one sampler for every scene, and for several seeds of some."""
        seen, unseen = (sample([caption(s) for s in scenes], 0) for scenes in (self.seen, self.unseen))
        return Measures(
            self.scorer.score(seen, self.seen),
            self.scorer.score(unseen, self.unseen),
            features_of(self.network, [*seen, *unseen]),
            self._diversity(sample),
        )

    def to_drawn(self, features: Features) -> float:
        """Frechet distance to the drawn scenes."""
        return frechet_distance(features, self.drawn_features)

    def _diversity(self, sample: Sampler) -> float:
        captions = [caption(scene) for scene in self.seen[:DIVERSITY_PROMPTS]]
        pictures = sample([text for text in captions for _ in range(DIVERSITY_SEEDS)], 10**6)
        features = features_of(self.network, pictures)
        return diversity(features.reshape(len(captions), DIVERSITY_SEEDS, -1))


def drawn_scenes(count: int, held_out: bool) -> list[Scene]:
    """The scenes of `scoring_scenes`, with the jitter that training would have drawn."""
    glyphs = load_glyphs()
    return [sample_scene(glyphs, 1, index, held_out=held_out) for index in range(count)]


def measure_samplers(found: Mapping[str, Sampler], yardstick: Yardstick) -> dict[str, Measures]:
    """Every sampler's measures, by name."""
    return {name: yardstick.measure(sample) for name, sample in found.items()}


def print_scores(checkpoint: Path, run: Path, count: int = 250) -> None:
    """Print a Markdown table; teacher rows where `run` still holds the teacher.

    Args:
        count: scenes of the training distribution, and as many held-out ones.

    Raises:
        FileNotFoundError: the feature network is not trained.
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
class ToldScore:
    """Pictures of a sampler that tells its denoiser some K, right or wrong."""

    frechet: float
    """To the drawn scenes."""
    psnr_db: float


def wrong_step_counts(
    model: LoadedModel, count: int, features: FeatureNetwork
) -> dict[tuple[int, int | None], ToldScore]:
    """Measure the true-K sampler told K' or nothing: (K, K' or None) -> score on `count` scenes of either kind.

    Where the student reads K as it should, the diagonal is best (TDM, sec. 3.2).
    """
    yardstick = Yardstick(count, features)
    scenes = [*yardstick.seen, *yardstick.unseen]
    prompts = [caption(scene) for scene in scenes]

    def score(pictures: Sequence[Pixels]) -> ToldScore:
        fidelity = [yardstick.scorer.psnr_db(p, scene) for p, scene in zip(pictures, scenes, strict=True)]
        return ToldScore(yardstick.to_drawn(features_of(features, pictures)), float(np.mean(fidelity)))

    counts = model.recipe.step_counts
    pairs = product(counts, (*counts, None))
    return {(steps, told): score(pictures_told(model, prompts, steps, told)) for steps, told in pairs}


def print_wrong_step_counts(checkpoint: Path, count: int = 125) -> None:
    """Print `wrong_step_counts` as a Markdown table: true K down, told K across.

    Raises:
        FileNotFoundError: the feature network is not trained.
    """
    model = load_model(checkpoint)
    scores = wrong_step_counts(model, count, load_features())
    counts = model.recipe.step_counts
    tellings = (*counts, None)
    print("Frechet distance to drawings / PSNR to drawing, dB\n")
    heads = ("told nothing" if told is None else f"told K = {told}" for told in tellings)
    print("| steps taken | " + " | ".join(heads) + " |")
    print("|---" * (len(tellings) + 1) + "|")
    for steps in counts:
        cells = (f"{scores[steps, told].frechet:.2f} / {scores[steps, told].psnr_db:.2f}" for told in tellings)
        print(f"| {steps} | " + " | ".join(cells) + " |")
