"""Built-in recipes of published checkpoints: each builds, and has the numbers that its source names."""

from __future__ import annotations

import json

import pytest

from tdm_runtime.checkpoint.recipe import parse_recipe
from tdm_runtime.checkpoint.stock.published_recipes import PUBLISHED, published_for, published_recipe
from tdm_runtime.errors import RecipeError


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_read_as_it_was_written(name: str) -> None:
    entry = published_recipe(name)
    recipe = entry.recipe("mine", (512, 768))
    assert parse_recipe(json.loads(recipe.to_json())) == recipe
    assert (recipe.name, recipe.native_sizes, recipe.step_counts) == ("mine", ((512, 768),), entry.steps)
    assert entry.recipe().native_sizes == (entry.size,)
    assert entry.stated or entry.inferred


@pytest.mark.parametrize(
    ("name", "steps", "timesteps"),
    [
        ("tdm-dreamshaper-7", 4, [999, 749, 500, 250]),
        ("tdm-sd3", 4, [999, 947, 856, 666]),
        ("lcm-lora-sdxl", 4, [999, 759, 499, 259]),
        ("lcm-sd15", 8, [999, 879, 759, 639, 499, 379, 259, 139]),
        ("hyper-sdxl-fixed", 2, [999, 499]),
        ("sdxl-lightning", 8, [999, 874, 749, 624, 499, 374, 249, 124]),
        ("sdxl-turbo", 1, [999]),
        ("instaflow", 1, [1000]),
        ("dmd2-sdxl-4step", 4, [999, 749, 499, 249]),
        ("dmd2-sdxl-1step", 1, [399]),
        ("z-image-turbo", 8, [1000, 954.545, 900, 833.333, 750, 642.857, 500, 300]),
        ("tdm-r1-z-image", 4, [1000, 900, 750, 500]),
        ("flux.1-schnell", 4, [1000, 750, 500, 250]),
        ("flux.2-klein", 4, [1000, 967.384, 908.144, 767.2]),
        ("sd3.5-large-turbo", 4, [1000, 857.692, 602.151, 8.929]),
        ("sana-sprint", 2, [1.5708, 1.3]),
        ("sana-sprint", 4, [1.5708, 1.1781, 0.7854, 0.3927]),
        ("tdm-cogvideox-2b", 4, [999, 856, 665, 399]),
        ("wan2.2-lightning", 4, [1000, 937.5, 833.333, 625]),
        ("wan2.1-self-forcing", 4, [1000, 937.5, 833.333, 625]),
        ("fastwan2.1-1.3b", 3, [1000, 757, 522]),
        ("animatediff-lightning", 4, [999, 749, 499, 249]),
        ("animatelcm", 4, [999, 759, 499, 259]),
    ],
)
def test_the_model_receives_the_timesteps_of_the_source(name: str, steps: int, timesteps: list[float]) -> None:
    table = published_recipe(name).recipe().step_table(steps, 1024, 1024)
    assert table.timesteps.tolist() == pytest.approx(timesteps, abs=1e-3)


def test_a_family_has_its_recipes_only() -> None:
    assert {entry.name for entry in published_for("sana")} == {"sana-sprint"}
    assert {entry.name for entry in published_for("cogvideox")} == {"tdm-cogvideox-2b"}


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(RecipeError, match="'sdxl-lightening' is not built in; built in are tdm-dreamshaper-7, "):
        published_recipe("sdxl-lightening")


@pytest.mark.parametrize("name", ["perflow-sd15", "YOSO", "2-rectified-flow"])
def test_a_checkpoint_that_needs_guidance_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(RecipeError, match=r"not built in: its authors sample .* with guidance_scale .* \(.*README"):
        published_recipe(name)
