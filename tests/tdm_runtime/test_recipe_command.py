"""`tdm-recipe` prints and writes recipes of stock folders, and refuses bad input in one sentence with status 2."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import diffusers
import pytest

from tdm_runtime.checkpoint.recipe import RECIPE_FILE, load_recipe, parse_recipe
from tdm_runtime.checkpoint.stock.published_recipes import PUBLISHED
from tdm_runtime.recipe_cli import main
from tests.tdm_runtime.checkpoint.stock.test_implied_recipe import UNET, stock_folder
from tests.tiny_pipelines import build_pipeline


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """SDXL with Euler and trailing timesteps, as Lightning and Turbo have it."""
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", beta_schedule="scaled_linear")
    return stock_folder(tmp_path / "xl", scheduler, UNET)


def test_it_prints_the_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--steps", "1,4", "--name", "mine"]) == 0
    recipe = parse_recipe(json.loads(capsys.readouterr().out))
    assert (recipe.name, recipe.step_counts, recipe.default_steps) == ("mine", (1, 4), 4)
    assert recipe.files == {} and not (folder / RECIPE_FILE).exists()


def test_it_writes_the_recipe_with_the_hashes_of_the_weight_files_that_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "xl"
    build_pipeline("sdxl").save_pretrained(folder, max_shard_size="60KB")
    for name in ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (folder / name).write_bytes(b"not read")
    assert main([str(folder), "--timesteps", "999,749,499,249", "-o", str(folder / RECIPE_FILE)]) == 0
    recipe = load_recipe(folder)
    assert recipe.timesteps == {4: (999.0, 749.0, 499.0, 249.0)}
    shards = sorted(file.relative_to(folder) for file in (folder / "unet").glob("*-of-*.safetensors"))
    others = ["text_encoder/model", "text_encoder_2/model", "vae/diffusion_pytorch_model"]
    assert len(shards) > 1 and set(recipe.files) == {
        *map(str, shards),
        "unet/diffusion_pytorch_model.safetensors.index.json",
        *(f"{name}.safetensors" for name in others),
    }
    name = str(shards[0])
    assert recipe.files[name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_it_takes_a_published_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--recipe", "dmd2-sdxl-4step"]) == 0
    recipe = parse_recipe(json.loads(capsys.readouterr().out))
    assert (recipe.name, recipe.solver, recipe.native_sizes) == ("xl", "lcm", ((1024, 1024),))


def test_it_lists_the_published_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in PUBLISHED)
    assert "LoRA at scale 0.125" in printed and "inferred: " in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "does not say for how many steps"),
        (["--steps", "0"], "steps has 0; whole numbers from 1 to 16"),
        (["--steps", "4,99"], "steps has 99"),
        (["--timesteps", "249,499"], "they must fall"),
        (["--timesteps", "1000,499"], "0..999"),
        (["--timesteps", "999,nan"], "nan"),
        (["--timesteps", "999,499", "--sigmas", "1,0"], "give one of them"),
        (["--sigmas", "14.6"], "K + 1"),
        (["--guidance", "7.5", "--steps", "4"], "reads none"),
        (["--recipe", "sd-turbo"], "is for stable_diffusion"),
        (["--recipe", "nothing"], "is not built in"),
        (["--recipe", "lcm-sdxl"], "guidance is 8, but"),  # this UNet reads none
        (["--recipe", "sdxl-turbo", "--steps", "4"], "leave one of them out"),
        (["--steps", "4", "-o", "/nowhere/recipe.json"], "/nowhere"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    arguments: list[str], named: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and named in printed.err and printed.err.count("\n") == 1


def test_a_folder_that_is_none_or_damaged_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["/nowhere"]) == 2
    assert "/nowhere is not a folder" in capsys.readouterr().err
    (folder / "model_index.json").write_text("{")
    assert main([str(folder), "--steps", "4"]) == 2
    assert "model_index.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["folder", "--list"], ["folder", "--steps", "four"]])
def test_arguments_that_cannot_be_parsed_end_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
