"""A killed run resumes exactly: the same weights, bit for bit, as one that was never killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.autoencoder import AutoencoderConfig, train_autoencoder
from training.glyphs import FONT_PATHS
from training.loop import STATE_FILE, LoopConfig, step_generator
from training.tdm import TDMConfig, train_tdm
from training.teacher import TeacherConfig, train_teacher

needs_font = pytest.mark.skipif(
    not any(path.is_file() for path in FONT_PATHS), reason="needs the Debian package fonts-noto-color-emoji"
)


class Killed(Exception):
    """Stands for SIGKILL."""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / STATE_FILE, weights_only=True)
    return {f"{m}.{name}": t for m, module in state["modules"].items() for name, t in module.items()}


def assert_resumes(train: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train once in peace, once with a kill before the third step; compare the states."""
    train(tmp_path / "peace")

    def deadly(seed: int, stage: str, step: int) -> torch.Generator:
        if step == 2:
            raise Killed
        return step_generator(seed, stage, step)

    with monkeypatch.context() as patch:
        patch.setattr("training.loop.step_generator", deadly)
        with pytest.raises(Killed):
            train(tmp_path / "killed")
    train(tmp_path / "killed")
    expected, resumed = tensors_of(tmp_path / "peace"), tensors_of(tmp_path / "killed")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@needs_font
def test_every_stage_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LoopConfig(steps=4, save_every_s=0.0)
    autoencoder, teacher = AutoencoderConfig(loop, batch_size=2), TeacherConfig(loop, batch_size=4, scenes=16)
    tdm = TDMConfig(loop, batch_size=4)
    assert_resumes(lambda folder: train_autoencoder(folder, autoencoder), tmp_path / "a", monkeypatch)
    vae = tmp_path / "a" / "peace"
    assert_resumes(lambda folder: train_teacher(folder, vae, teacher), tmp_path / "t", monkeypatch)
    assert_resumes(lambda folder: train_tdm(folder, tmp_path / "t" / "peace", tdm), tmp_path / "s", monkeypatch)


def test_generators_of_different_steps_stages_and_seeds_differ() -> None:
    keys = [(seed, stage, step) for seed in (0, 1) for stage in ("teacher", "tdm") for step in range(200)]
    draws = {torch.randint(2**62, (1,), generator=step_generator(*key)).item() for key in keys}
    assert len(draws) == len(keys)
