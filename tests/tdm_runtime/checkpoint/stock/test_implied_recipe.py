"""Stock folders imply their recipe where their configs say enough, and are refused with a remedy where they do not."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest

from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.checkpoint.recipe import RECIPE_FILE, load_recipe
from tdm_runtime.checkpoint.stock.implied_recipe import implied_recipe, native_size, recipe_of
from tdm_runtime.checkpoint.stock.pipeline_folder import family_of
from tdm_runtime.errors import CheckpointError, RecipeError
from tdm_runtime.families import FAMILIES, Family

SD, SDXL, FLUX, FLUX2, SANA = (FAMILIES[name] for name in ("stable_diffusion", "sdxl", "flux", "flux2", "sana"))


def stock_folder(folder: Path, scheduler: Any, denoiser: dict[str, Any], family: Family = SDXL, **index: Any) -> Path:
    """Write the configs of a stock folder, without weights."""
    scheduler.save_pretrained(folder / "scheduler")
    named = {"_class_name": family.pipelines[0], family.denoiser_folder: ["diffusers", family.denoiser_class]}
    (folder / "model_index.json").write_text(json.dumps({**named, **index}))
    levels = [1, 2, 3, 4] if family.name != "sana" else [1, 2, 3, 4, 5, 6]
    vae = {"block_out_channels": levels, "encoder_block_out_channels": levels, "latent_channels": 4}
    for part, config in ((family.denoiser_folder, {"in_channels": 16, **denoiser}), ("vae", vae)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    return folder


UNET = {"sample_size": 128, "time_cond_proj_dim": None}


def test_a_consistency_model_opens_by_itself_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = stock_folder(tmp_path / "lcm", diffusers.LCMScheduler(), {**UNET, "time_cond_proj_dim": 256})
    with caplog.at_level(logging.INFO):
        recipe = recipe_of(folder, SDXL)
    assert len(caplog.records) == 1 and "implies one: LCMScheduler" in caplog.text
    assert (recipe.name, recipe.solver, recipe.step_counts) == ("lcm", "lcm", tuple(range(1, 9)))
    assert (recipe.default_steps, recipe.native_sizes, recipe.guidance_scale) == (4, ((1024, 1024),), 5.0)
    assert recipe.files == {}


@pytest.mark.parametrize(
    ("family", "scheduler", "denoiser", "index", "counts", "default"),
    [
        (SDXL, diffusers.TCDScheduler(), UNET, {}, tuple(range(1, 9)), 4),
        (SANA, diffusers.SCMScheduler(), {"sample_size": 32, "guidance_embeds": True}, {}, (1, 2, 3, 4), 2),
        (FLUX, diffusers.FlowMatchEulerDiscreteScheduler(), {"guidance_embeds": False}, {}, (1, 2, 3, 4), 4),
        (
            FLUX2,
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            {},
            {"is_distilled": True},
            (1, 2, 3, 4),
            4,
        ),
    ],
    ids=["tcd", "sana", "schnell", "klein"],
)
def test_distilled_folders_open_by_themselves(
    family: Family,
    scheduler: Any,
    denoiser: dict[str, Any],
    index: dict[str, Any],
    counts: tuple[int, ...],
    default: int,
    tmp_path: Path,
) -> None:
    recipe = recipe_of(stock_folder(tmp_path / "folder", scheduler, denoiser, family, **index), family)
    assert (recipe.step_counts, recipe.default_steps) == (counts, default)
    assert recipe.guidance_scale == (4.5 if family.name == "sana" else None)


def test_a_base_model_is_refused_with_the_recipes_that_would_fit(tmp_path: Path) -> None:
    folder = stock_folder(tmp_path / "base", diffusers.EulerDiscreteScheduler(), UNET)
    with pytest.raises(RecipeError) as caught:
        recipe_of(folder, SDXL)
    message = str(caught.value)
    assert "does not say for how many steps" in message and f"tdm-recipe {folder} --steps" in message
    assert "sdxl-lightning" in message and "dmd2-sdxl-4step" in message and "sd-turbo" not in message


def test_flux_dev_is_refused_as_flux_schnell_is_not(tmp_path: Path) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    folder = stock_folder(tmp_path / "dev", scheduler, {"guidance_embeds": True}, FLUX)
    with pytest.raises(RecipeError, match=r"flux\.1-schnell"):
        implied_recipe(FLUX, folder)
    recipe = implied_recipe(FLUX, folder, steps=[8])
    assert recipe.guidance_scale == 3.5 and recipe.size_shift is not None


def test_a_scheduler_that_the_pipeline_of_flux_cannot_call_is_refused(tmp_path: Path) -> None:
    folder = stock_folder(tmp_path / "f", diffusers.EulerDiscreteScheduler(), {"guidance_embeds": False}, FLUX)
    with pytest.raises(RecipeError, match="only FlowMatchEulerDiscreteScheduler takes"):
        implied_recipe(FLUX, folder)


def test_arguments_are_those_of_the_stock_pipeline(tmp_path: Path) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", beta_schedule="scaled_linear")
    folder = stock_folder(tmp_path / "lightning", scheduler, UNET)
    recipe = implied_recipe(SDXL, folder, steps=[8, 2, 4], name="lightning-4")
    assert (recipe.name, recipe.step_counts, recipe.default_steps) == ("lightning-4", (2, 4, 8), 8)
    assert recipe.timesteps[4] == (999.0, 749.0, 499.0, 249.0)
    assert implied_recipe(SDXL, folder, timesteps=[999, 100]).timesteps == {2: (999.0, 100.0)}
    (folder / RECIPE_FILE).write_text(recipe.to_json())
    assert recipe_of(folder, SDXL) == recipe


def test_a_folder_with_a_recipe_keeps_it() -> None:
    assert recipe_of(DEFAULT_CHECKPOINT, FAMILIES["stable_diffusion"]) == load_recipe(DEFAULT_CHECKPOINT)


def test_a_folder_without_recipe_and_scheduler_is_refused_as_before(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is missing: it says how the checkpoint must be sampled"):
        recipe_of(tmp_path, SDXL)


@pytest.mark.parametrize(("sample_size", "size"), [(64, (512, 512)), ([96, 64], (512, 768))])
def test_the_native_size_is_the_denoisers_times_the_compression_of_the_vae(
    sample_size: Any, size: tuple[int, int], tmp_path: Path
) -> None:
    folder = stock_folder(tmp_path / "f", diffusers.LCMScheduler(), {"sample_size": sample_size})
    assert native_size(SDXL, folder) == size


def test_a_size_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = stock_folder(tmp_path / "f", diffusers.LCMScheduler(), {"sample_size": "large"})
    with pytest.raises(RecipeError, match="sample_size is 'large'"):
        recipe_of(folder, SDXL)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "LatentConsistencyModelPipeline"])
def test_the_default_guidance_is_that_of_the_pipeline_class(name: str, tmp_path: Path) -> None:
    denoiser = {**UNET, "time_cond_proj_dim": 256}
    folder = stock_folder(tmp_path / "f", diffusers.LCMScheduler(), denoiser, SD, _class_name=name)
    stock = inspect.signature(getattr(diffusers, name).__call__).parameters["guidance_scale"].default
    assert recipe_of(folder, SD).guidance_scale == stock


def test_guidance_of_a_model_that_reads_none_is_refused(tmp_path: Path) -> None:
    folder = stock_folder(tmp_path / "f", diffusers.LCMScheduler(), UNET)
    assert implied_recipe(SDXL, folder, guidance=1.0).guidance_scale is None
    with pytest.raises(RecipeError, match=r"guidance is 7\.5, but .* reads none"):
        implied_recipe(SDXL, folder, guidance=7.5)


@pytest.mark.parametrize("content", ["{", "[]", "\x00", '{"_class_name": 7}'])
def test_a_damaged_scheduler_config_is_refused_with_its_path(content: str, tmp_path: Path) -> None:
    folder = stock_folder(tmp_path / "f", diffusers.LCMScheduler(), UNET)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        recipe_of(folder, SDXL)
    assert str(file) in str(caught.value)


def test_the_family_of_a_folder_is_that_of_its_pipeline(tmp_path: Path) -> None:
    assert family_of(stock_folder(tmp_path / "f", diffusers.LCMScheduler(), UNET)) == SDXL
    with pytest.raises(CheckpointError, match="is not a folder"):
        family_of(tmp_path / "none")
    folder = stock_folder(tmp_path / "other", diffusers.LCMScheduler(), UNET, _class_name="KolorsPipeline")
    with pytest.raises(CheckpointError, match="KolorsPipeline; this version knows StableDiffusionPipeline"):
        family_of(folder)
