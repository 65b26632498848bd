"""A folder that cannot be served ends every command with status 2 and one sentence: file, reason, remedy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serving.command.cli import main as tdm_serve
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.cli import main as tdm_generate
from tdm_runtime.errors import CheckpointError
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.components import load_component
from tdm_runtime.recipe_cli import main as tdm_recipe
from tests.published_folders import edit_json
from tests.stock_checkpoints import CASES, save_checkpoint
from tests.tiny_models import tiny_cogvideox
from tests.tiny_pipelines import build_pipeline

TEXT_WEIGHTS = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 3 in shards, without a recipe. Never write there."""
    folder = tmp_path_factory.mktemp("sd3") / "folder"
    build_pipeline("sd3").save_pretrained(folder, max_shard_size="20KB")
    return folder


def first_shard(folder: Path) -> Path:
    return sorted((folder / "transformer").glob("*-of-*.safetensors"))[0]


def pickle_alone(folder: Path) -> None:
    (folder / TEXT_WEIGHTS).rename(folder / "text_encoder" / "pytorch_model.bin")


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a part is missing": (
        lambda folder: shutil.rmtree(folder / "vae"),
        "lacks",
        "restore",
    ),
    "a text encoder is missing": (
        lambda folder: shutil.rmtree(folder / "text_encoder_3"),
        "lacks text_encoder_3/model.safetensors",
        "restore",
    ),
    "truncated weights": (
        lambda folder: os.truncate(folder / TEXT_WEIGHTS, 3000),
        f"{TEXT_WEIGHTS} is damaged",
        "restore the file",
    ),
    "a truncated shard": (lambda folder: os.truncate(first_shard(folder), 99), "is damaged", "restore the file"),
    "a shard is missing": (lambda folder: first_shard(folder).unlink(), "lacks transformer/diffusion", "restore"),
    "damaged JSON": (
        lambda folder: (folder / "vae" / "config.json").write_text("{"),
        "vae/config.json cannot be read",
        "restore",
    ),
    "pickles alone": (pickle_alone, "text_encoder holds only pickled weights (pytorch_model.bin)", "convert them"),
    "an unknown pipeline": (
        lambda folder: edit_json(folder / "model_index.json", _class_name="KandinskyPipeline"),
        "holds a KandinskyPipeline; this version knows",
        "use a folder of those",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_command_refuses_it(fault: str, intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, reason, remedy = FAULTS[fault]
    folder = Path(shutil.copytree(intact, tmp_path / "folder"))
    recipe = str(folder / "tdm_recipe.json")
    assert tdm_recipe([str(folder), "--steps", "2", "-o", recipe]) == 0
    edit_json(Path(recipe), files={})
    damage(folder)
    capsys.readouterr()
    commands = {
        "tdm-recipe": lambda: tdm_recipe([str(folder), "--steps", "2", "-o", recipe]),
        "tdm-generate": lambda: tdm_generate(["--checkpoint", str(folder), "a fox", "-o", str(tmp_path / "a.png")]),
        "tdm-serve": lambda: tdm_serve(["--checkpoint", str(folder)]),
    }
    for command, run in commands.items():
        assert run() == 2, command
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith(f"{command}: "), said
        assert str(folder) in said and reason in said and remedy in said, said


def test_a_recipe_of_another_prediction_is_refused(
    intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(intact, tmp_path / "folder"))
    assert tdm_recipe([str(folder), "--steps", "2", "-o", str(folder / "tdm_recipe.json")]) == 0
    raw = json.loads((folder / "tdm_recipe.json").read_text())
    edit_json(folder / "tdm_recipe.json", prediction_type="epsilon", noise_schedule=raw["noise_schedule"])
    capsys.readouterr()
    for run in (
        lambda: tdm_generate(["--checkpoint", str(folder), "a fox", "-o", str(tmp_path / "a.png")]),
        lambda: tdm_serve(["--checkpoint", str(folder)]),
    ):
        assert run() == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "tdm_recipe.json" in said, said


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_3"])
def test_a_text_encoder_that_lacks_weights_is_refused(part: str, intact: Path, tmp_path: Path) -> None:
    """transformers would only warn and fill them with random numbers."""
    folder = Path(shutil.copytree(intact, tmp_path / "folder"))
    edit_json(folder / part / "config.json", num_hidden_layers=5, num_layers=5)
    assert tdm_recipe([str(folder), "--steps", "2", "-o", str(folder / "tdm_recipe.json")]) == 0
    with pytest.raises(CheckpointError, match=f"{part}/config.json does not describe the weights beside it"):
        open_checkpoint(folder).load_text_encoders()


def test_weights_load_in_the_precision_that_is_served(intact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(intact, tmp_path / "folder"))
    assert tdm_recipe([str(folder), "--steps", "2", "-o", str(folder / "tdm_recipe.json")]) == 0
    for component in ("denoiser", "decoder"):
        module, _ = load_component(open_checkpoint(folder), component, torch.bfloat16)
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("part", "config", "change"),
    [
        ("transformer", "transformer", {"caption_projection_dim": 32, "num_attention_heads": 4}),
        ("vae", "vae", {"latent_channels": 8}),
        ("text_encoder", "text_encoder", {"intermediate_size": 52}),
        ("text_encoder_3", "text_encoder_3", {"d_ff": 52}),
    ],
)
def test_weights_of_another_shape_than_the_config_says_are_refused_before_the_start(
    part: str, config: str, change: dict[str, int], intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(intact, folder)
    assert tdm_recipe([str(folder), "--steps", "2", "-o", str(folder / "tdm_recipe.json")]) == 0
    edit_json(folder / "tdm_recipe.json", files={})
    edit_json(folder / config / "config.json", **change)
    capsys.readouterr()
    commands = [tdm_serve, ["--checkpoint", str(folder)]], [tdm_generate, ["--checkpoint", str(folder), "a fox"]]
    for command, arguments in commands:
        assert command([*arguments, "--backend", "torch"]) == 2  # type: ignore[operator]
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{folder / part}/" in said and ".safetensors holds " in said and said.count(" of shape (") == 1
        assert f"{folder / part / 'config.json'} describes (" in said and said.endswith("from its source")


@pytest.mark.parametrize("name", {case.family: name for name, case in CASES.items()}.values())
def test_a_whole_folder_has_the_shapes_that_its_configs_describe(name: str, tmp_path: Path) -> None:
    folder = save_checkpoint(CASES[name], tmp_path / "folder")
    edit_json(folder / "tdm_recipe.json", files={})
    open_checkpoint(folder).check_shapes()


def test_cogvideox_1_5_is_refused_by_name(tmp_path: Path) -> None:
    """Its stock pipeline adds latent frames and cuts them off again, which no recipe of ours does."""
    transformer = tiny_cogvideox(patch_size_t=2, patch_bias=False, use_rotary_positional_embeddings=True)
    folder = save_checkpoint(
        replace(CASES["CogVideoX-2B"], parts=lambda: {"transformer": transformer}), tmp_path / "folder"
    )
    with pytest.raises(
        CheckpointError, match=r"patch_size_t is 2, as in CogVideoX 1\.5.*use CogVideoX-2b or CogVideoX-5b"
    ):
        load_model(folder, device="cpu")
