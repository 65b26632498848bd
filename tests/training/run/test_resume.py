"""A killed run resumes to the same weights, bit for bit, as an uninterrupted run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.run.killed import assert_resumes, needs_font
from training.emoji.stages.autoencoder import AutoencoderConfig, train_autoencoder
from training.emoji.stages.student import EMOJI, train_student
from training.emoji.stages.teacher import TeacherConfig, train_teacher
from training.run.loop import LoopConfig, step_generator


@pytest.mark.slow  # test_processes.py kills smaller runs of the same loop
@needs_font
def test_every_stage_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LoopConfig(steps=3, save_every_s=0.0)
    autoencoder, teacher = AutoencoderConfig(loop, batch_size=2), TeacherConfig(loop, batch_size=4, scenes=16)
    student = replace(EMOJI, steps=3, save_every_s=0.0, batch_size=4)
    assert_resumes(lambda folder: train_autoencoder(folder, autoencoder), tmp_path / "a", monkeypatch)
    vae = tmp_path / "a" / "peace"
    assert_resumes(lambda folder: train_teacher(folder, vae, teacher), tmp_path / "t", monkeypatch)
    assert_resumes(lambda folder: train_student(folder, tmp_path / "t" / "peace", student), tmp_path / "s", monkeypatch)


def test_generators_of_different_steps_stages_and_seeds_differ() -> None:
    keys = [(seed, stage, step) for seed in (0, 1) for stage in ("teacher", "tdm") for step in range(200)]
    draws = {torch.randint(2**62, (1,), generator=step_generator(*key)).item() for key in keys}
    assert len(draws) == len(keys)
