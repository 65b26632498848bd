"""Serving reads the recipe that training writes, and refuses by name what it cannot honour."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.checkpoint.recipe import RECIPE_FILE, Recipe, load_recipe, parse_recipe
from tdm_runtime.errors import CheckpointError, RecipeError
from tdm_runtime.sampling.schedule import DiffusionSchedule, FlowSchedule, flow_timesteps, spaced_timesteps
from tdm_runtime.sampling.size_shift import SizeShift
from tdm_runtime.sampling.step_table import COLUMNS, build_step_table

DIFFUSION = Recipe(
    name="tdm-emoji",
    prediction_type="v_prediction",
    noise_schedule=DiffusionSchedule(beta_schedule="squaredcos_cap_v2", rescale_zero_terminal_snr=True),
    solver="ddim",
    timesteps={k: tuple(spaced_timesteps("trailing", k)) for k in (1, 2, 4)},
    default_steps=4,
    native_sizes=((64, 64), (96, 64)),
    step_condition="timestep_cond",
    files={"unet/diffusion_pytorch_model.safetensors": "0123456789abcdef" * 4},
)
FLOW = Recipe(
    name="flow",
    prediction_type="flow_prediction",
    noise_schedule=FlowSchedule(shift=3.0),
    solver="dpmsolver++",
    timesteps={k: tuple(flow_timesteps(FlowSchedule(shift=3.0), k)) for k in (*range(1, 9), 16)},
    default_steps=1,
    native_sizes=((1024, 1024),),
)
both_recipes = pytest.mark.parametrize("recipe", [DIFFUSION, FLOW], ids=lambda recipe: recipe.name)


@both_recipes
def test_a_recipe_is_read_as_it_was_written(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_text(recipe.to_json(), encoding="utf-8")
    assert load_recipe(tmp_path) == recipe
    assert load_recipe(tmp_path).to_json() == recipe.to_json()


@both_recipes
def test_a_recipe_holds_one_table_for_every_step_count(recipe: Recipe) -> None:
    for steps in recipe.step_counts:
        table = recipe.step_table(steps, *recipe.native_sizes[0])
        assert table is recipe.step_table(steps, *recipe.native_sizes[-1])
        timesteps = np.array(recipe.timesteps[steps])
        expected = build_step_table(recipe.noise_schedule, recipe.prediction_type, recipe.solver, timesteps)
        assert table.num_inference_steps == steps
        for column in COLUMNS:
            np.testing.assert_array_equal(getattr(table, column), getattr(expected, column))


def test_a_recipe_may_omit_step_condition_and_files() -> None:
    raw = raw_recipe()
    del raw["step_condition"], raw["files"]
    assert (parse_recipe(raw).step_condition, parse_recipe(raw).files) == ("none", {})


def test_a_schedule_may_omit_values_with_a_default() -> None:
    assert parse_recipe({**raw_recipe(), "noise_schedule": {"kind": "diffusion"}}).noise_schedule == DiffusionSchedule()


FULL = Recipe(
    name="full",
    prediction_type="flow_prediction",
    noise_schedule=FlowSchedule(),
    solver="renoise",
    timesteps={2: (1000.0, 500.0)},
    default_steps=2,
    native_sizes=((1024, 1024), (512, 768)),
    size_shift=SizeShift("flux2", terminal=0.1),
    initial_scale="sigma",
    output_sign=-1,
    guidance_scale=3.5,
)


def test_new_fields_are_read_as_they_were_written() -> None:
    lists = replace(FULL, size_shift=None, sigmas={2: (0.99, 0.4, 0.0)})
    landings = replace(DIFFUSION, solver="tcd", eta=0.3, next_timesteps={1: (0.0,)}, initial_scale=0.5)
    for recipe in (FULL, lists, landings, replace(DIFFUSION, solver="lcm", timestep_scaling=5.0)):
        assert parse_recipe(json.loads(recipe.to_json())) == recipe


def test_the_embedded_recipe_keeps_its_bytes() -> None:
    """Receipts hold a digest of the file."""
    file = DEFAULT_CHECKPOINT / RECIPE_FILE
    assert load_recipe(DEFAULT_CHECKPOINT).to_json() == file.read_text(encoding="utf-8")


def test_tables_of_a_size_shift_depend_on_the_size() -> None:
    """The numbers are those of FLUX.2-klein, computed by diffusers' compute_empirical_mu."""
    recipe = replace(FULL, solver="euler", size_shift=SizeShift("flux2"))
    np.testing.assert_allclose(recipe.step_table(2, 1024, 1024).timesteps, [1000.0, 909.111], atol=1e-3)
    assert recipe.step_table(2, 512, 512).timesteps[1] < 909.0
    assert recipe.step_table(2, 1024, 512) is recipe.step_table(2, 512, 1024)


def raw_recipe(recipe: Recipe = DIFFUSION) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(recipe.to_json())
    return raw


def refusal(raw: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw)
    return str(caught.value)


T4 = [999, 749, 499, 249]
BAD_FIELDS: list[tuple[str, Any, str]] = [
    # field, bad value, part of the message that shows it
    ("format", 2, "2"),
    ("format", "1", "'1'"),
    ("format", True, "True"),
    ("format", 1.0, "1.0"),
    ("format", None, "None"),
    ("name", "", "''"),
    ("name", "  ", "'  '"),
    ("name", 7, "7"),
    ("prediction_type", "score", "'score'"),
    ("prediction_type", None, "None"),
    ("prediction_type", ["epsilon"], "['epsilon']"),
    ("prediction_type", "flow_prediction", "'flow_prediction'"),
    ("prediction_type", "epsilon", "'epsilon'"),  # the schedule has zero terminal SNR
    ("solver", "heun", "'heun'"),
    ("solver", "DDIM", "'DDIM'"),
    ("solver", {}, "{}"),
    ("step_condition", "guidance", "'guidance'"),
    ("step_condition", None, "None"),
    ("noise_schedule", "diffusion", "'diffusion'"),
    ("noise_schedule", {}, "{}"),
    ("noise_schedule", {"kind": "edm"}, "'edm'"),
    ("noise_schedule", {"kind": ["flow"]}, "['flow']"),
    ("noise_schedule", {"kind": "diffusion", "shift": 3.0}, "'shift'"),
    ("noise_schedule", {"kind": "flow", "beta_start": 0.1}, "'beta_start'"),
    ("noise_schedule", {"kind": "flow", "shift": "3"}, "shift is '3'"),
    ("noise_schedule", {"kind": "flow", "shift": 0}, "shift is 0"),
    ("noise_schedule", {"kind": "diffusion", "beta_schedule": "cosine"}, "beta_schedule is 'cosine'"),
    ("noise_schedule", {"kind": "diffusion", "beta_start": True}, "beta_start is True"),
    ("noise_schedule", {"kind": "diffusion", "beta_end": math.nan}, "beta_end is nan"),
    ("noise_schedule", {"kind": "diffusion", "num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ("noise_schedule", {"kind": "diffusion", "num_train_timesteps": True}, "num_train_timesteps is True"),
    ("noise_schedule", {"kind": "diffusion", "rescale_zero_terminal_snr": 1}, "rescale_zero_terminal_snr is 1"),
    ("timesteps", {}, "{}"),
    ("timesteps", [T4], "[[999, 749, 499, 249]]"),
    ("timesteps", {"4": T4, "0": []}, "'0'"),
    ("timesteps", {"4": T4, "17": list(range(17, 0, -1))}, "'17'"),
    ("timesteps", {"4": T4, "x": [999]}, "'x'"),
    ("timesteps", {"4": T4, "-1": [999]}, "'-1'"),
    ("timesteps", {"4": T4, "1.0": [999]}, "'1.0'"),
    ("timesteps", {"4": T4, "01": [999]}, "'01'"),
    ("timesteps", {"4": T4, "\u0661": [999]}, "'\u0661'"),  # ARABIC-INDIC DIGIT ONE
    ("timesteps", {"4": T4[:3]}, "[999, 749, 499]"),
    ("timesteps", {"4": [*T4, 0]}, "[999, 749, 499, 249, 0]"),
    ("timesteps", {"4": 999}, "999"),
    ("timesteps", {"4": T4, "1": [True]}, "[True]"),
    ("timesteps", {"4": T4, "1": ["999"]}, "['999']"),
    ("timesteps", {"4": T4, "1": [None]}, "[None]"),
    ("timesteps", {"4": T4, "1": [math.nan]}, "[nan]"),
    ("timesteps", {"4": T4, "1": [math.inf]}, "[inf]"),
    ("timesteps", {"4": T4, "1": [10**400]}, "[1000000"),
    ("timesteps", {"4": T4, "1": [1000]}, "[1000.0]"),  # a diffusion schedule ends at T - 1
    ("timesteps", {"4": T4, "1": [-1]}, "[-1.0]"),
    ("timesteps", {"4": T4[::-1]}, "[249.0, 499.0, 749.0, 999.0]"),
    ("timesteps", {"4": [999, 499, 499, 249]}, "[999.0, 499.0, 499.0, 249.0]"),
    ("default_steps", 3, "3"),
    ("default_steps", 0, "0"),
    ("default_steps", "4", "'4'"),
    ("default_steps", True, "True"),
    ("default_steps", 4.0, "4.0"),
    ("default_steps", None, "None"),
    ("default_steps", [4], "[4]"),
    ("sigmas", {"3": [4, 3, 2, 1]}, "'3'"),
    ("sigmas", {"1": [1.0]}, "[1.0]"),
    ("sigmas", {"1": [1.0, 2.0]}, "[1.0, 2.0]"),
    ("sigmas", {"1": [1.0, -1.0]}, "[1.0, -1.0]"),
    ("sigmas", {"1": [math.nan, 0.0]}, "[nan, 0.0]"),
    ("sigmas", [1.0], "[1.0]"),
    ("next_timesteps", {"3": [1, 2, 3]}, "'3'"),
    ("next_timesteps", {"1": [499, 249]}, "[499, 249]"),
    ("next_timesteps", {"1": [1000]}, "[1000.0]"),
    ("size_shift", 3.0, "3.0"),
    ("size_shift", {"mu": "flux3"}, "'flux3'"),
    ("size_shift", {"mu": "flux2"}, "no flow"),
    ("size_shift", {"shift": 3.0}, "'shift'"),
    ("size_shift", {"base_tokens": 0}, "base_tokens is 0"),
    ("size_shift", {"max_tokens": 128}, "max_tokens is 128"),
    ("size_shift", {"base_shift": "1"}, "base_shift is '1'"),
    ("size_shift", {"terminal": 1.0}, "terminal is 1.0"),
    ("size_shift", {"curve": "cubic"}, "'cubic'"),
    ("initial_scale", "unit", "'unit'"),
    ("initial_scale", -1, "-1"),
    ("initial_scale", math.inf, "inf"),
    ("initial_scale", None, "None"),
    ("eta", 1.5, "1.5"),
    ("eta", "0.3", "'0.3'"),
    ("eta", 0.3, "0.3"),  # the solver is ddim
    ("timestep_scaling", 0, "0"),
    ("timestep_scaling", 5.0, "5.0"),  # the solver is ddim
    ("output_sign", 0, "0"),
    ("output_sign", -1.0, "-1.0"),
    ("output_sign", True, "True"),
    ("guidance_scale", -1, "-1"),
    ("guidance_scale", "4.5", "'4.5'"),
    ("native_sizes", [], "[]"),
    ("native_sizes", [64, 64], "[64, 64]"),
    ("native_sizes", [[64]], "[[64]]"),
    ("native_sizes", [[64, 0]], "[[64, 0]]"),
    ("native_sizes", [[64, -64]], "[[64, -64]]"),
    ("native_sizes", [[64, 64.0]], "[[64, 64.0]]"),
    ("native_sizes", [[64, True]], "[[64, True]]"),
    ("native_sizes", "64x64", "'64x64'"),
    ("files", None, "None"),
    ("files", ["unet.safetensors"], "['unet.safetensors']"),
    ("files", {"unet.safetensors": "ab" * 31}, "'" + "ab" * 31 + "'"),
    ("files", {"unet.safetensors": "xy" * 32}, "'" + "xy" * 32 + "'"),
    ("files", {"unet.safetensors": "AB" * 32}, "'" + "AB" * 32 + "'"),
    ("files", {"unet.safetensors": "ab" * 32 + "\n"}, "ab\\n'"),
    ("files", {"unet.safetensors": 5}, "5"),
    ("files", {"../unet.safetensors": "ab" * 32}, "'../unet.safetensors'"),
    ("files", {"/etc/passwd": "ab" * 32}, "'/etc/passwd'"),
    ("files", {"unet\\w.safetensors": "ab" * 32}, "unet"),
    ("files", {"": "ab" * 32}, "''"),
]


@pytest.mark.parametrize(("field", "value", "shown"), BAD_FIELDS)
def test_a_bad_value_is_refused_with_its_field(field: str, value: Any, shown: str) -> None:
    message = refusal({**raw_recipe(), field: value})
    assert field in message and shown in message


@pytest.mark.parametrize("timestep", [0, 1000.5])
def test_a_flow_timestep_outside_its_schedule_is_refused(timestep: float) -> None:
    message = refusal({**raw_recipe(FLOW), "timesteps": {"1": [timestep]}})
    assert "timestep" in message and str(timestep) in message


@pytest.mark.parametrize(
    "field", ["name", "prediction_type", "noise_schedule", "solver", "timesteps", "default_steps", "native_sizes"]
)
def test_a_missing_field_is_named(field: str) -> None:
    raw = raw_recipe()
    del raw[field]
    assert refusal(raw) == f"missing fields ['{field}']"


def test_a_missing_format_is_named() -> None:
    raw = raw_recipe()
    del raw["format"]
    assert "format is None" in refusal(raw)


def test_an_unknown_field_is_named() -> None:
    assert "unknown fields ['guidance']" in refusal({**raw_recipe(), "guidance": 7.5})


@pytest.mark.parametrize("raw", [[], "recipe", 1, None])
def test_a_recipe_that_is_no_json_object_is_refused(raw: object) -> None:
    assert type(raw).__name__ in refusal(raw)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"{'format': 1}", b"[" * 100_000, b'{"format": ' + b"1" * 5000 + b"}"],
    ids=["empty", "cut short", "not UTF-8", "single quotes", "too deep", "endless number"],
)
def test_a_file_that_is_not_json_is_refused_with_its_path(content: bytes, tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_bytes(content)
    with pytest.raises(RecipeError, match="is not JSON") as caught:
        load_recipe(tmp_path)
    assert str(tmp_path / RECIPE_FILE) in str(caught.value)


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is missing") as caught:
        load_recipe(tmp_path)
    assert str(tmp_path / RECIPE_FILE) in str(caught.value)


def test_an_unreadable_file_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).mkdir()
    with pytest.raises(RecipeError, match="cannot be read") as caught:
        load_recipe(tmp_path)
    assert str(tmp_path / RECIPE_FILE) in str(caught.value)


def test_a_bad_value_in_a_file_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / RECIPE_FILE).write_text(json.dumps({**raw_recipe(), "solver": "heun"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="solver is 'heun'") as caught:
        load_recipe(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / RECIPE_FILE))
