"""The table of scores, with noise in place of a model's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tdm_runtime.model.decoder import Pixels
from training.emoji.data.glyphs import load_glyphs
from training.emoji.report import scores
from training.emoji.report.features import FeatureNetwork

FIRST_SEEDS: list[int] = []


def noise(captions: Sequence[str], first_seed: int) -> list[Pixels]:
    """Pictures of noise: a sampler whose pictures depend on the seed alone."""
    FIRST_SEEDS.append(first_seed)
    generators = (np.random.default_rng(first_seed + n) for n in range(len(captions)))
    return [generator.integers(0, 256, (64, 64, 3), dtype=np.uint8) for generator in generators]


def test_repetitions_have_other_scenes_and_noise_and_give_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = FeatureNetwork(len(load_glyphs())).eval()
    for name, value in (
        ("load_model", lambda checkpoint: checkpoint),
        ("teacher_of", lambda run: None),
        ("samplers", lambda model, teacher: {"noise": noise}),
        ("load_features", lambda: network),
    ):
        monkeypatch.setattr(scores, name, value)

    scores.print_scores(Path(), Path(), count=4)
    once = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert (once[1], once[2], once[5]) == ("0.000", "0.000", "-")
    assert "±" not in "".join(once)
    scores.print_scores(Path(), Path(), count=4, repetitions=2)
    twice = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert twice[1] == "0.000 ± 0.000"
    frechet, half_width = map(float, twice[4].split(" ± "))
    assert half_width > 0  # other scenes and noise
    assert frechet != float(once[4])
    assert len(set(FIRST_SEEDS)) == 4  # pictures and diversity of two repetitions


def test_the_first_repetition_has_the_scenes_of_the_published_table() -> None:
    network = FeatureNetwork(len(load_glyphs())).eval()
    first, second = (scores.Yardstick(3, network, repetition) for repetition in (0, 1))
    assert first.seen == scores.scoring_scenes(3) and first.unseen == scores.scoring_scenes(3, held_out=True)
    assert first.seen != second.seen and first.unseen != second.unseen


def test_no_repetition_is_refused() -> None:
    with pytest.raises(ValueError, match="--repetitions is 0; it must be at least 1"):
        scores.print_scores(Path(), Path(), repetitions=0)
