"""Without a named model, `tdm-serve` serves both embedded checkpoints, and its first model makes pictures."""

from __future__ import annotations

from pathlib import Path

from serving.command.arguments import parse_arguments
from serving.command.checks import check_models


def test_both_embedded_checkpoints_are_served() -> None:
    pictures, clips = check_models(parse_arguments([]))
    assert (pictures.recipe.name, clips.recipe.name) == ("tdm-emoji", "tdm-emoji-video")
    assert pictures.recipe.frames is None and clips.recipe.frames is not None and clips.recipe.frames.default == 9


def test_an_artifacts_folder_is_that_of_the_pictures(tmp_path: Path) -> None:
    (only,) = parse_arguments(["--artifacts", str(tmp_path)]).models
    assert only.folder.name == "tdm-emoji"


def test_a_named_checkpoint_is_served_alone(tiny_checkpoint: Path) -> None:
    (only,) = check_models(parse_arguments(["--checkpoint", str(tiny_checkpoint)]))
    assert only.folder == tiny_checkpoint.resolve()
