"""Compare an uninterrupted training run with a killed and resumed one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.emoji.data.glyphs import FONT_PATHS
from training.run.loop import STATE_FILE, step_generator

needs_font = pytest.mark.skipif(
    not any(path.is_file() for path in FONT_PATHS), reason="needs the Debian package fonts-noto-color-emoji"
)


class Killed(Exception):
    """Raised instead of SIGKILL."""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / STATE_FILE, weights_only=True)
    return {f"{m}.{name}": t for m, module in state["modules"].items() for name, t in module.items()}


def assert_resumes(train: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train once without a stop and once with a kill before the third step. Compare the states."""
    train(tmp_path / "peace")

    def deadly(seed: int, stage: str, step: int) -> torch.Generator:
        if step == 2:
            raise Killed
        return step_generator(seed, stage, step)

    with monkeypatch.context() as patch:
        patch.setattr("training.run.loop.step_generator", deadly)
        with pytest.raises(Killed):
            train(tmp_path / "killed")
    train(tmp_path / "killed")
    expected, resumed = tensors_of(tmp_path / "peace"), tensors_of(tmp_path / "killed")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
