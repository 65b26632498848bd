"""`sampling_of` samples as diffusers' scheduler of the same config does in the stock pipeline.

Each test saves a real scheduler, reads its file as a folder's, and runs the scheduler's own `step` beside our table
with one pseudo model and one generator. diffusers keeps alphas_cumprod in float32; the tests give it ours, so that the
rest can be compared to 1e-5.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tdm_runtime.checkpoint.recipe import Recipe, parse_recipe
from tdm_runtime.checkpoint.stock.pipeline_call import ScheduleRequest
from tdm_runtime.checkpoint.stock.schedule import sampling_of
from tdm_runtime.checkpoint.stock.scheduler_config import DEFAULTS, SchedulerConfig
from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.noise import SeedNoise
from tdm_runtime.sampling.schedule import Array, DiffusionSchedule
from tdm_runtime.sampling.solvers import DRAWS_A_STEP
from tdm_runtime.sampling.step_table import StepTable
from tests.tdm_runtime.sampling.test_fresh_noise import SEED, SHAPE, float32_draws, ours, pseudo_model

# diffusers calls np.array() on torch tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZES = [(1024, 1024), (512, 512), (768, 1344)]
TOLERANCE = 1e-5
STEP_COUNTS = (*range(1, 9), 16)
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def recipe_for(scheduler: Any, family: str, folder: Path, **arguments: Any) -> Recipe:
    """Save a scheduler and return the recipe that its file implies for calls of the family's pipeline."""
    scheduler.save_pretrained(folder)
    config = SchedulerConfig.of(json.loads((folder / "scheduler_config.json").read_text()))
    arguments = {"steps": None, "timesteps": None, "sigmas": None, **arguments}
    recipe = sampling_of(config, ScheduleRequest.of(family, **arguments)).recipe("test", 1, ((1024, 1024),))
    recipe = recipe.__class__(**{**vars(recipe), "default_steps": max(recipe.timesteps)})
    return parse_recipe(json.loads(recipe.to_json()))


def in_float64(scheduler: Any, recipe: Recipe) -> Any:
    """Give a scheduler our alphas_cumprod."""
    if isinstance(recipe.noise_schedule, DiffusionSchedule):
        alphas_cumprod = torch.from_numpy(recipe.noise_schedule.alphas_cumprod)
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), alphas_cumprod, rtol=1e-4, atol=1e-8)
        scheduler.alphas_cumprod = alphas_cumprod
        if hasattr(scheduler, "final_alpha_cumprod") and scheduler.final_alpha_cumprod != 1.0:
            scheduler.final_alpha_cumprod = alphas_cumprod[0]
    return scheduler


def stock_trajectory(scheduler: Any, recipe: Recipe, table: StepTable, **options: Any) -> list[Array]:
    """Run the loop of a stock pipeline after `set_timesteps`. Return the latents in our coordinates."""
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()  # the rounded numbers, in double arithmetic
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(SEED)
        torch.randn(SHAPE, generator=options["generator"])
    x = SeedNoise(SEED, SHAPE).initial().double() * getattr(scheduler, "init_noise_sigma", 1.0)
    timesteps = list(scheduler.timesteps)[: table.num_inference_steps]
    np.testing.assert_allclose(torch.stack(timesteps).double(), table.timesteps, rtol=3e-7, atol=1e-4)
    is_scaled = type(scheduler).__name__.startswith("EulerD") or type(scheduler).__name__.startswith("EulerA")
    ratios = scheduler.sigmas.numpy() if is_scaled else np.zeros(len(timesteps) + 1)
    alphas = 1.0 / np.sqrt(ratios**2 + 1.0)
    trajectory = [alphas[0] * x.numpy()]
    former = None
    for n, t in enumerate(timesteps):
        latents = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = pseudo_model(latents, float(table.timesteps[n]))
        at = int(t) if "DDIM" in type(scheduler).__name__ else t
        with float32_draws():
            if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
                back = timesteps[n - 1] if n else None
                x, former = scheduler.step(output, former, t, back, x, **options, return_dict=False)
            else:
                x = scheduler.step(output, at, x, **options, return_dict=False)[0].double()
        trajectory.append(alphas[n + 1] * x.numpy())
    return trajectory


def assert_same(mine: list[Array], other: list[Array]) -> None:
    assert len(mine) == len(other)
    for step, (x, y) in enumerate(zip(mine, other, strict=True)):
        error = np.abs(x - y).max() / max(1.0, np.abs(y).max())
        assert error < TOLERANCE, f"after {step} steps: {error}"


def assert_recipe(scheduler: Any, family: str, folder: Path, steps: tuple[int, ...] = STEP_COUNTS) -> Recipe:
    """Assert that all step counts sample alike."""
    recipe = recipe_for(scheduler, family, folder, steps=steps)
    in_float64(scheduler, recipe)
    assert recipe.step_counts == tuple(steps)
    for k in steps:
        scheduler.set_timesteps(k)
        table = recipe.step_table(k, 1024, 1024)
        draws_a_step = DRAWS_A_STEP.get(recipe.solver, 1)
        assert_same(ours(table, draws_a_step), stock_trajectory(scheduler, recipe, table))
    return recipe


every_spacing = pytest.mark.parametrize("timestep_spacing", ["linspace", "leading", "trailing"])
every_prediction = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("steps_offset", [0, 1])
@every_spacing
@every_prediction
def test_ddim(
    prediction_type: str, timestep_spacing: str, steps_offset: int, set_alpha_to_one: bool, tmp_path: Path
) -> None:
    scheduler = diffusers.DDIMScheduler(
        **SD15,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        set_alpha_to_one=set_alpha_to_one,
        clip_sample=False,
    )
    assert_recipe(scheduler, "stable_diffusion", tmp_path)


@every_spacing
def test_ddim_of_cogvideox(timestep_spacing: str, tmp_path: Path) -> None:
    scheduler = diffusers.CogVideoXDDIMScheduler(
        timestep_spacing=timestep_spacing, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    steps = STEP_COUNTS if timestep_spacing == "trailing" else STEP_COUNTS[1:]
    assert_recipe(scheduler, "cogvideox", tmp_path, steps)


@pytest.mark.parametrize("rescale", [False, True])
@every_spacing
def test_stochastic_dpm_solver_of_cogvideox(timestep_spacing: str, rescale: bool, tmp_path: Path) -> None:
    scheduler = diffusers.CogVideoXDPMScheduler(
        timestep_spacing=timestep_spacing,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=rescale,
        snr_shift_scale=1.0,
    )
    steps = STEP_COUNTS if timestep_spacing == "trailing" else STEP_COUNTS[1:]
    recipe = assert_recipe(scheduler, "cogvideox", tmp_path, steps)
    assert all(np.any(recipe.step_table(k, 64, 64).d) for k in steps if k > 1)


def test_stochastic_dpm_solver_that_ends_before_the_clean_end_is_refused(tmp_path: Path) -> None:
    scheduler = diffusers.CogVideoXDPMScheduler(set_alpha_to_one=False)
    with pytest.raises(RecipeError, match="set_alpha_to_one of the CogVideoXDPMScheduler is False"):
        recipe_for(scheduler, "cogvideox", tmp_path, steps=(4,))


@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("solver_type", ["bh2", "midpoint"])
def test_unipc_with_its_corrector(flow_shift: float, solver_type: str, tmp_path: Path) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=flow_shift, solver_type=solver_type)
    recipe = assert_recipe(scheduler, "wan", tmp_path)
    assert np.flatnonzero(recipe.step_table(5, 64, 64).e).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_flow_sigmas": False, "prediction_type": "epsilon"}, "use_flow_sigmas"),
        ({"solver_type": "bh1"}, "solver_type"),
        ({"disable_corrector": [0]}, "disable_corrector"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        ({"lower_order_final": False}, "lower_order_final"),
        ({"solver_order": 3}, "solver_order is 3, which 5 steps reach"),
    ],
)
def test_settings_of_unipc_that_cannot_be_followed_are_refused(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=named):
        recipe_for(diffusers.UniPCMultistepScheduler(**{**FLOW, **changes}), "wan", tmp_path, steps=(5,))


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("curve", [None, "use_karras_sigmas", "use_exponential_sigmas"])
@every_spacing
@every_prediction
def test_euler(
    prediction_type: str, timestep_spacing: str, curve: str | None, final_sigmas_type: str, tmp_path: Path
) -> None:
    if curve and (timestep_spacing, final_sigmas_type) == ("leading", "sigma_min"):
        pytest.skip("the curve ends where the last step lands, at timestep 0 or 1")
    scheduler = diffusers.EulerDiscreteScheduler(
        **SD15,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        steps_offset=1,
        final_sigmas_type=final_sigmas_type,
        **({curve: True} if curve else {}),
    )
    steps = STEP_COUNTS
    if curve:  # a curve of one sigma has no two ends, and linspace ends where sigma_min lands
        steps = () if (timestep_spacing, final_sigmas_type) == ("linspace", "sigma_min") else STEP_COUNTS[1:]
    elif final_sigmas_type == "sigma_min" and timestep_spacing == "linspace":
        steps = STEP_COUNTS[1:]
    if steps:
        assert_recipe(scheduler, "sdxl", tmp_path, steps)


def test_euler_at_zero_terminal_snr(tmp_path: Path) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(
        **SD15, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    assert_recipe(scheduler, "sdxl", tmp_path)


def test_euler_starts_sdxl_lightning_below_unit_noise(tmp_path: Path) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SD15, timestep_spacing="trailing")
    recipe = assert_recipe(scheduler, "sdxl", tmp_path, (2, 4, 8))
    assert recipe.step_table(4, 1024, 1024).initial_scale == pytest.approx(0.99767, abs=1e-5)


@pytest.mark.parametrize("arguments", [{"timesteps": (999.0, 500.5, 20.0)}, {"sigmas": (14.6, 3.0, 0.5, 0.0)}])
def test_euler_with_lists(arguments: dict[str, Any], tmp_path: Path) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SD15, timestep_spacing="leading", steps_offset=1)
    recipe = recipe_for(scheduler, "sdxl", tmp_path, **arguments)
    in_float64(scheduler, recipe).set_timesteps(**{name: list(values) for name, values in arguments.items()})
    table = recipe.step_table(3, 1024, 1024)
    assert_same(ours(table), stock_trajectory(scheduler, recipe, table))


@every_spacing
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_ancestral(prediction_type: str, timestep_spacing: str, tmp_path: Path) -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        **SD15, prediction_type=prediction_type, timestep_spacing=timestep_spacing, steps_offset=1
    )
    assert_recipe(scheduler, "sdxl", tmp_path)


@pytest.mark.parametrize("solver_order", [1, 2])
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@every_spacing
@every_prediction
def test_dpm_solver(
    prediction_type: str, timestep_spacing: str, final_sigmas_type: str, solver_order: int, tmp_path: Path
) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD15,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        final_sigmas_type=final_sigmas_type,
        solver_order=solver_order,
        steps_offset=1,
    )
    steps = STEP_COUNTS if (final_sigmas_type, solver_order) != ("sigma_min", 2) else STEP_COUNTS[:-1]
    assert_recipe(scheduler, "stable_diffusion", tmp_path, steps)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"euler_at_final": True, "lower_order_final": False, "final_sigmas_type": "sigma_min"}, STEP_COUNTS),
        ({"solver_order": 3}, (1, 2, 3, 4)),
        ({"use_karras_sigmas": True}, STEP_COUNTS[1:]),
        ({"use_exponential_sigmas": True}, STEP_COUNTS[1:]),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, STEP_COUNTS),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_dpm_solver_with_other_settings(changes: dict[str, Any], steps: tuple[int, ...], tmp_path: Path) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD15, **changes)
    assert_recipe(scheduler, "stable_diffusion", tmp_path, steps)


def test_dpm_solver_with_timesteps(tmp_path: Path) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD15)
    recipe = recipe_for(scheduler, "pixart", tmp_path, timesteps=(999, 640, 300))
    in_float64(scheduler, recipe).set_timesteps(timesteps=[999, 640, 300])
    table = recipe.step_table(3, 1024, 1024)
    assert_same(ours(table), stock_trajectory(scheduler, recipe, table))


@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("solver_order", [1, 2])
def test_dpm_solver_on_flows(solver_order: int, flow_shift: float, tmp_path: Path) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=flow_shift, solver_order=solver_order)
    recipe = assert_recipe(scheduler, "sd3", tmp_path)
    if flow_shift == 6.0:  # as TDM's LoRA for SD3
        assert recipe.timesteps[4] == (999.0, 947.0, 856.0, 666.0)


@pytest.mark.parametrize("timestep_scaling", [1.0, 10.0])
@every_prediction
def test_lcm(prediction_type: str, timestep_scaling: float, tmp_path: Path) -> None:
    scheduler = diffusers.LCMScheduler(prediction_type=prediction_type, timestep_scaling=timestep_scaling)
    recipe = assert_recipe(scheduler, "sdxl", tmp_path)
    assert recipe.timesteps[4] == (999.0, 759.0, 499.0, 259.0)


def test_lcm_with_the_timesteps_of_dmd2(tmp_path: Path) -> None:
    scheduler = diffusers.LCMScheduler()
    recipe = recipe_for(scheduler, "sdxl", tmp_path, timesteps=(999, 749, 499, 249))
    in_float64(scheduler, recipe).set_timesteps(timesteps=[999, 749, 499, 249])
    table = recipe.step_table(4, 1024, 1024)
    assert_same(ours(table), stock_trajectory(scheduler, recipe, table))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd(eta: float, tmp_path: Path) -> None:
    scheduler = diffusers.TCDScheduler()
    recipe = recipe_for(scheduler, "sdxl", tmp_path, steps=STEP_COUNTS, eta=eta)
    in_float64(scheduler, recipe)
    for k in STEP_COUNTS:
        scheduler.set_timesteps(k)
        table = recipe.step_table(k, 1024, 1024)
        assert_same(ours(table), stock_trajectory(scheduler, recipe, table, eta=eta))


@pytest.mark.parametrize(
    "changes",
    [{}, {"shift_terminal": 0.1}, {"use_karras_sigmas": True}, {"stochastic_sampling": True}],
    ids=["plain", "terminal", "karras", "stochastic"],
)
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("family", ["sd3", "wan", "z_image"])
def test_flow_match_euler(family: str, shift: float, changes: dict[str, Any], tmp_path: Path) -> None:
    """Z-Image gives sigmas, which are shifted once; SD3 and Wan give none, and their lowest is shifted twice."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **changes)
    steps = STEP_COUNTS[1:] if changes else STEP_COUNTS
    recipe = recipe_for(scheduler, family, tmp_path, steps=steps)
    for k in steps:
        gives = {"sigmas": np.linspace(1.0, 1.0 / k, k)} if family == "z_image" else {"num_inference_steps": k}
        scheduler.set_timesteps(**gives)
        table = recipe.step_table(k, 1024, 1024)
        assert_same(ours(table), stock_trajectory(scheduler, recipe, table))
    if (family, shift, changes) == ("sd3", 3.0, {}):
        np.testing.assert_allclose(recipe.timesteps[4], [1000, 857.692, 602.151, 8.929], atol=1e-3)


@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize("curve", ["exponential", "linear"])
@pytest.mark.parametrize("family", ["flux", "flux2", "sd3", "z_image"])
def test_flow_match_euler_shifted_by_size(family: str, curve: str, terminal: float | None, tmp_path: Path) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=curve, shift_terminal=terminal, base_shift=0.6, max_shift=1.2
    )
    steps = STEP_COUNTS[1:] if terminal else STEP_COUNTS
    recipe = recipe_for(scheduler, family, tmp_path, steps=steps)
    for k in steps:
        for width, height in SIZES:
            tokens = (width // 16) * (height // 16)
            mu = compute_empirical_mu(tokens, k) if family == "flux2" else calculate_shift(tokens, 256, 4096, 0.6, 1.2)
            even = None if family == "sd3" else np.linspace(1.0, 1.0 / k, k)
            scheduler.set_timesteps(num_inference_steps=k, sigmas=even, mu=mu)
            table = recipe.step_table(k, width, height)
            assert_same(ours(table), stock_trajectory(scheduler, recipe, table))


def test_flow_match_euler_with_sigmas(tmp_path: Path) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    recipe = recipe_for(scheduler, "sd3", tmp_path, sigmas=(1.0, 0.7, 0.2))
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.2])
    table = recipe.step_table(3, 1024, 1024)
    assert_same(ours(table), stock_trajectory(scheduler, recipe, table))


@pytest.mark.parametrize("angles", [None, (1.57, 1.1, 0.4, 0.0)])
def test_scm(angles: tuple[float, ...] | None, tmp_path: Path) -> None:
    """Its units are those of the data; with sigma_data 1 they are ours."""
    scheduler = diffusers.SCMScheduler(sigma_data=1.0)
    steps = STEP_COUNTS if angles is None else None
    recipe = recipe_for(scheduler, "sana", tmp_path, steps=steps, timesteps=angles)
    for k in recipe.step_counts:
        if angles is None:
            scheduler.set_timesteps(k, intermediate_timesteps=1.3 if k == 2 else None)
        else:
            scheduler.set_timesteps(k, timesteps=list(angles), max_timesteps=None, intermediate_timesteps=None)
        table = recipe.step_table(k, 1024, 1024)
        assert_same(ours(table), stock_trajectory(scheduler, recipe, table))


# Defaults and refusals


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_those_of_the_class(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert DEFAULTS[name] == {setting: parameters[setting].default for setting in DEFAULTS[name]}


REFUSALS: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    # family, class, settings, arguments, part of the message
    ("sdxl", "HeunDiscreteScheduler", {}, {}, "_class_name is 'HeunDiscreteScheduler'"),
    ("stable_diffusion", "PNDMScheduler", {}, {}, "PNDMScheduler, which cannot be followed exactly: it calls"),
    ("sdxl", "DDIMScheduler", {}, {}, "clip_sample of the DDIMScheduler is True"),
    ("sdxl", "DDIMScheduler", {"clip_sample": False}, {"timesteps": (9, 5)}, "takes none, give steps"),
    ("sdxl", "EulerDiscreteScheduler", {"use_beta_sigmas": True}, {}, "use_beta_sigmas"),
    ("sdxl", "EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, {}, "'log_linear'"),
    ("sdxl", "EulerDiscreteScheduler", {"timestep_type": "continuous"}, {}, "'continuous'"),
    ("sdxl", "EulerDiscreteScheduler", {"trained_betas": [0.1]}, {}, "trained_betas"),
    ("sdxl", "EulerDiscreteScheduler", {"timestep_spacing": "even"}, {}, "'even'"),
    ("sdxl", "EulerDiscreteScheduler", {"beta_start": "small"}, {}, "beta_start is 'small'"),
    ("sdxl", "EulerDiscreteScheduler", {"num_train_timesteps": 1000.0}, {}, "num_train_timesteps is 1000.0"),
    ("sdxl", "EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"timesteps": (9, 5)}, "switch use_*_sigmas off"),
    ("sdxl", "EulerDiscreteScheduler", {}, {"sigmas": (1.0,)}, "K + 1"),
    ("sdxl", "EulerDiscreteScheduler", {}, {"timesteps": (5, 9)}, "timesteps are [5, 9]; they must fall"),
    ("sdxl", "EulerDiscreteScheduler", {}, {"timesteps": (9, 5), "sigmas": (9, 5)}, "give one of them"),
    ("sdxl", "EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, {}, "prediction_type"),
    ("sdxl", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}, "sde-dpmsolver++"),
    ("sdxl", "DPMSolverMultistepScheduler", {"solver_type": "heun"}, {}, "heun"),
    ("sdxl", "DPMSolverMultistepScheduler", {"solver_order": 3}, {"steps": (8,)}, "solver_order is 3"),
    ("sdxl", "DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, {}, "lambda_min_clipped"),
    ("sdxl", "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {"steps": (16,)}, "euler_at_final"),
    ("sd3", "DPMSolverMultistepScheduler", {**FLOW, "use_karras_sigmas": True}, {}, "use_karras_sigmas"),
    ("sdxl", "LCMScheduler", {"original_inference_steps": 4}, {"steps": (8,)}, "steps has 8"),
    ("sdxl", "LCMScheduler", {"original_inference_steps": 0}, {}, "original_inference_steps is 0"),
    ("sdxl", "TCDScheduler", {"thresholding": True}, {}, "thresholding"),
    ("wan", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {}, "gives no mu"),
    (
        "wan",
        "FlowMatchEulerDiscreteScheduler",
        {},
        {"sigmas": (1.0, 0.5)},
        "the pipeline of wan takes none, give steps",
    ),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {}, {"timesteps": (999, 500)}, "takes none, give sigmas"),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, {}, "invert_sigmas"),
    ("flux", "EulerDiscreteScheduler", {}, {}, "only FlowMatchEulerDiscreteScheduler takes"),
    ("sdxl", "DDIMScheduler", {"clip_sample": False}, {"steps": (4,), "eta": 0.5}, "eta is 0.5"),
    ("sana", "SCMScheduler", {}, {"timesteps": (1.5, 1.0)}, "K + 1 angles"),
    ("sana", "SCMScheduler", {}, {"steps": (0,)}, "steps has 0; whole numbers from 1 to 16"),
    ("sana", "SCMScheduler", {}, {"steps": (17,)}, "steps has 17"),
    ("unknown", "SCMScheduler", {}, {}, "family 'unknown'"),
]


@pytest.mark.parametrize(("family", "name", "settings", "arguments", "named"), REFUSALS)
def test_what_cannot_be_followed_is_refused_by_name(
    family: str, name: str, settings: dict[str, Any], arguments: dict[str, Any], named: str
) -> None:
    arguments = {"steps": None, "timesteps": None, "sigmas": None, **(arguments or {"steps": (4,)})}
    with pytest.raises(RecipeError) as caught:
        request = ScheduleRequest.of(family, **arguments)
        sampling_of(SchedulerConfig.of({"_class_name": name, **settings}), request)
    assert named in str(caught.value)
