"""`tdm-train measure`: scores of pictures by every published scorer whose weights are on disk.

OUTPUT/pictures/00000.png, ...   pictures that a checkpoint made
OUTPUT/pictures.json             its settings; a later run into the same folder must have the same
OUTPUT/scores.json               scores, those of single pictures too, and what is missing for the others
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.whole_file import write_whole
from training.measure.inception import BATCH_SIZE, InceptionFeatures
from training.measure.metrics import Features, frechet_distance
from training.measure.samples import given_files, made_files, read_picture
from training.measure.scorers import AestheticScore, CLIPScore, HPSScore, Scores
from training.measure.weights import (
    AESTHETIC,
    CLIP_FILES,
    CLIP_L,
    HPS,
    INCEPTION,
    INCEPTION_FILES,
    TOKENIZER_FILES,
    Published,
)
from training.pretrained.latents import IMAGE_SUFFIXES, list_images
from training.pretrained.prompts import read_prompt_file

FID = "FID"


class PictureScorer(Protocol):
    """Scores pictures, each with its prompt."""

    def scores(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> Scores:
        """Return a number for each picture."""
        ...


class Scorer(NamedTuple):
    """A scorer of single pictures, opened from a folder of published weights."""

    check: Callable[[Path], None]
    """Raises FileNotFoundError where the folder lacks something; the message says what to get."""
    open: Callable[[Path, str], PictureScorer]
    """Loads it on a device."""


def _needs(*files: Published, clip: Sequence[str]) -> Callable[[Path], None]:
    def check(weights: Path) -> None:
        for file in files:
            file.require(weights / file.name)
        CLIP_L.require_folder(weights / CLIP_L.name, clip)

    return check


SCORERS: Mapping[str, Scorer] = {
    "CLIP score": Scorer(
        _needs(clip=CLIP_FILES), lambda weights, device: CLIPScore.open(weights / CLIP_L.name, device)
    ),
    "aesthetic score": Scorer(
        _needs(AESTHETIC, clip=CLIP_FILES),
        lambda weights, device: AestheticScore.open(weights / CLIP_L.name, weights / AESTHETIC.name, device),
    ),
    "HPS v2.1": Scorer(
        _needs(HPS, clip=TOKENIZER_FILES),
        lambda weights, device: HPSScore.open(weights / HPS.name, weights / CLIP_L.name, device=device),
    ),
}


@dataclass(frozen=True)
class Score:
    """A score of a set of pictures."""

    value: float
    standard_error: float | None
    """Of the mean over the pictures; None for a distance."""
    pictures: int


def measure_pictures(
    output: Path,
    prompts_file: Path,
    weights: Path,
    *,
    checkpoint: Path | None = None,
    pictures: Path | None = None,
    reference: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Mapping[str, Score]:
    """Score the pictures of a checkpoint or of a folder, print a table and write OUTPUT/scores.json.

    Args:
        weights: Folder of the published weights, by their names in `training.measure.weights`.
        checkpoint: Checkpoint that makes a picture of each prompt, unless `pictures` has them.
        reference: Folder of pictures to which the FID is the distance; None leaves the FID out.
        steps: Steps of each picture; None takes the checkpoint's default.
        device: Device of the scorers.

    Raises:
        ValueError, FileNotFoundError: Prompts, pictures or weights are wrong, or no scorer has its weights.
        TDMError: The prompt file or the checkpoint cannot be used.
    """
    prompts = [row.prompt for row in read_prompt_file(prompts_file)]
    references = None if reference is None else _reference_files(reference)
    missing = find_missing(weights, has_reference=references is not None)
    if len(missing) > len(SCORERS):
        raise FileNotFoundError("no scorer has its weights:\n" + "\n".join(missing.values()))
    if pictures is not None:
        if steps is not None:
            raise ValueError("--steps is for the pictures of a checkpoint; leave it out with --pictures")
        files = given_files(pictures, prompts, IMAGE_SUFFIXES)
    else:
        assert checkpoint is not None, "the command names one of both"
        model = load_model(checkpoint)
        if model.recipe.frames is not None:
            raise ValueError(f"{model.recipe.name} makes clips; score them with `tdm-train vbench`")
        files = made_files(output, "pictures", model, prompts, steps, seed)
        del model  # frees its memory for the scorers
    by_picture = {
        name: _score_files(scorer.open(weights, device), files, prompts, name)
        for name, scorer in SCORERS.items()
        if name not in missing
    }
    found = {name: _mean(scores) for name, scores in by_picture.items()}
    if FID not in missing and references is not None:
        network = InceptionFeatures.open(_inception_file(weights), device)
        both = [_features(network, each, name) for each, name in ((files, FID), (references, "reference"))]
        found[FID] = Score(frechet_distance(*both), None, len(files))
    rows = [
        {"prompt": prompt, "file": str(file), **{name: float(scores[n]) for name, scores in by_picture.items()}}
        for n, (prompt, file) in enumerate(zip(prompts, files, strict=True))
    ]
    output.mkdir(parents=True, exist_ok=True)
    content = {"scores": {name: asdict(score) for name, score in found.items()}, "missing": missing, "pictures": rows}
    write_whole(output / "scores.json", json.dumps(content, indent=2, ensure_ascii=False).encode())
    _print(found, missing, None if references is None else len(references))
    return found


def find_missing(weights: Path, *, has_reference: bool) -> dict[str, str]:
    """Return a sentence for each scorer that cannot run: what to get, from where, and where to put it."""
    checks: dict[str, Callable[[Path], object]] = {name: scorer.check for name, scorer in SCORERS.items()}
    missing = {}
    for name, check in (checks | {FID: _inception_file}).items():
        try:
            check(weights)
        except FileNotFoundError as error:
            missing[name] = f"{name}: {error}"
    if not has_reference:
        missing.setdefault(FID, f"{FID}: it is a distance to other pictures; name their folder with --reference")
    return missing


def _inception_file(weights: Path) -> Path:
    there = (weights / name for name in INCEPTION_FILES if (weights / name).is_file())
    return INCEPTION.require(next(there, weights / INCEPTION.name))


def _reference_files(folder: Path) -> list[Path]:
    files = list_images(folder) if folder.exists() else []
    if len(files) < 2:
        raise ValueError(
            f"{folder} has {len(files)} pictures; the FID needs a folder of at least 2, better of thousands"
        )
    return files


def _batches(files: Sequence[Path], name: str) -> Iterator[tuple[slice, list[Pixels]]]:
    for start in tqdm(range(0, len(files), BATCH_SIZE), name, disable=None):
        rows = slice(start, start + BATCH_SIZE)
        yield rows, [read_picture(file) for file in files[rows]]


def _score_files(scorer: PictureScorer, files: Sequence[Path], prompts: Sequence[str], name: str) -> Scores:
    return np.concatenate([scorer.scores(pictures, prompts[rows]) for rows, pictures in _batches(files, name)])


def _features(network: InceptionFeatures, files: Sequence[Path], name: str) -> Features:
    return np.concatenate([network.features(pictures) for _, pictures in _batches(files, name)])


def _mean(scores: Scores) -> Score:
    error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
    return Score(float(scores.mean()), error, len(scores))


def _print(found: Mapping[str, Score], missing: Mapping[str, str], references: int | None) -> None:
    print("| scorer | score | standard error | pictures |\n|---|---|---|---|")
    for name, score in found.items():
        error = "" if score.standard_error is None else f"{score.standard_error:.3f}"
        count = f"{score.pictures} and {references}" if name == FID else score.pictures
        print(f"| {name} | {score.value:.3f} | {error} | {count} |")
    if FID in found:
        print("The FID of few pictures is too high; compare it at equal numbers of pictures only.")
    for sentence in missing.values():
        print(f"Not measured: {sentence}")
