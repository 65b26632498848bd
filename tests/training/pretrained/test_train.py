"""Every family is distilled: real classes at a tiny size, all weights and LoRA adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from torch import Tensor

from tdm_runtime.checkpoint.recipe import load_recipe
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import FAMILIES, Denoiser, denoiser_for
from tdm_runtime.sampling.schedule import FlowSchedule
from tests.tiny_models import TINY_MODELS, TINY_SHAPES, tiny_conditioning
from tests.tiny_pipelines import build_pipeline
from tests.training.tiny_runs import LORA, NOISE, UNIFY, iterate, tiny_base, tiny_distiller, weights_of
from training.config import ConfigError, DistillConfig
from training.methods.roles import LoraRoles, SeparateRoles
from training.pretrained.base_model import load_base_model
from training.pretrained.presets import PRESETS, as_dmd2, as_lcm, as_tcd
from training.pretrained.prompts import PromptError, embed_prompts
from training.pretrained.student_files import LORA_FILE, STEP_CONDITION_FILE, load_student, read_tensors, save_student
from training.pretrained.train import (
    GRID_PROMPTS,
    build_backbone_distiller,
    coordinates_of,
    train_backbone,
)
from training.run.distill import Distiller
from training.run.loop import TrainingDivergedError
from training.run.plot import PLOT_FILE

KINDS = {"full": UNIFY, "lora": LORA}
DIFFERENT = ("stable_diffusion", "sd3", "cogvideox")
"""A UNet, a flow and a model of clips, for laws that hold by code which all families share."""
SHARED_LAW = [
    pytest.param(family, marks=() if family in DIFFERENT else pytest.mark.slow, id=family) for family in NOISE
]
TIMESTEPS = torch.tensor([980.0, 500.0, 60.0])


@torch.no_grad()
def outputs(denoiser: torch.nn.Module, family: str, step_count: int | None) -> Tensor:
    x = torch.randn(3, *TINY_SHAPES[family], generator=torch.Generator().manual_seed(5))
    step_counts = None if step_count is None else torch.full((3,), step_count)
    output: Tensor = denoiser(x, TIMESTEPS, step_counts, *tiny_conditioning(family, 3, seed=2).tensors())
    return output


@torch.no_grad()
def estimates(distiller: Distiller, role: str, family: str, step_count: int | None) -> Tensor:
    x = torch.randn(3, *TINY_SHAPES[family], generator=torch.Generator().manual_seed(5))
    step_counts, prompts = None if step_count is None else torch.full((3,), step_count), tiny_conditioning(family, 3, 2)
    estimate: Tensor = getattr(distiller.roles, role)(x, TIMESTEPS.double(), prompts, step_counts)
    return estimate


def averaged_outputs(distiller: Distiller, family: str, step_count: int | None) -> Tensor:
    with distiller.averaged_student():
        distiller.roles.activate("student")
        if isinstance(distiller.roles, LoraRoles):
            return outputs(distiller.roles.base, family, step_count)
        return outputs(distiller.roles.module("student"), family, step_count)


# ---- an iteration --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", NOISE)
def test_unify_moves_student_and_fake_score_and_not_the_teacher(family: str, kind: str) -> None:
    distiller = tiny_distiller(family, KINDS[kind])
    teacher = estimates(distiller, "teacher", family, None)
    assert all(torch.equal(estimates(distiller, role, family, 4), teacher) for role in ("student", "fake"))
    before = weights_of(distiller)
    numbers = iterate(distiller, 2)
    after = weights_of(distiller)
    assert all(math.isfinite(value) for row in numbers for value in row.values())
    for role in ("student", "fake", "average"):
        names = [name for name in before if name.startswith(f"{role}.")]
        moved = [name for name in names if not torch.equal(before[name], after[name])]
        # A few weights of a model may be unused and stay; an adapter that stays would not be trained at all.
        assert len(moved) > 0.9 * len(names), sorted(set(names) - set(moved))
        assert any("cond_proj" in name for name in moved)
    assert torch.equal(estimates(distiller, "teacher", family, None), teacher)
    by_role = {role: [estimates(distiller, role, family, k) for k in (1, 4)] for role in ("student", "fake")}
    assert all(not torch.allclose(one, four) for one, four in by_role.values())
    assert not torch.allclose(by_role["student"][0], by_role["fake"][0])


VARIANTS: dict[str, DistillConfig] = {
    "reverse interval": replace(UNIFY, interval="reverse"),
    "DPM-Solver++": replace(UNIFY, solver="dpmsolver++"),
    "GAN": replace(UNIFY, adversarial_weight=0.1),
    "GAN in two parts": replace(UNIFY, adversarial_weight=0.1, accumulation=2),
    "Fisher": replace(UNIFY, generator_loss="fisher"),
    "trajectory score": replace(UNIFY, fake_target="trajectory_score"),
    "element-wise": replace(UNIFY, generator_loss="elementwise_pseudo_huber", min_tau_gap=20),
    "one fake score": replace(UNIFY, step_condition_for="student"),
    "fixed K": replace(UNIFY, step_condition_for="none", step_counts=(4,)),
    "no guidance": replace(UNIFY, guidance_scale=1.0),
    "DMD2": replace(as_dmd2(UNIFY), fake_updates=2),
    "DMD2, adapters": replace(as_dmd2(LORA), fake_updates=2),
    "LCM": as_lcm(UNIFY),
    "LCM, adapters": as_lcm(LORA),
    "TCD": as_tcd(UNIFY),
    "TCD, adapters": as_tcd(LORA),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_of_the_method_runs_and_moves_the_student(name: str) -> None:
    distiller = tiny_distiller("stable_diffusion", VARIANTS[name], has_latents=True)
    before = weights_of(distiller)
    (numbers,) = iterate(distiller, 1)
    after = weights_of(distiller)
    assert all(math.isfinite(value) for value in numbers.values())
    assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith("student."))
    assert ("discriminator_loss" in numbers) == ("GAN" in name)
    x = torch.randn(1, *TINY_SHAPES["stable_diffusion"])
    assert distiller.sample(x, 4, tiny_conditioning("stable_diffusion", 1)).isfinite().all()


@pytest.mark.parametrize("family", SHARED_LAW)
def test_a_flow_or_a_video_takes_dpm_solver_and_reverse_intervals_too(family: str) -> None:
    (numbers,) = iterate(tiny_distiller(family, replace(UNIFY, solver="dpmsolver++", interval="reverse")), 1)
    assert all(math.isfinite(value) for value in numbers.values())


def test_a_discriminator_needs_a_unet_and_real_latents() -> None:
    with pytest.raises(ValueError, match="adversarial_weight needs a UNet as teacher, got PixArtDenoiser"):
        tiny_distiller("pixart", VARIANTS["GAN"], has_latents=True)
    with pytest.raises(ConfigError, match="learns from real latents, and the prompts have none"):
        tiny_distiller("stable_diffusion", VARIANTS["GAN"])


@pytest.mark.parametrize(
    ("family", "kind", "parts"),
    [
        ("stable_diffusion", "full", 2),
        ("stable_diffusion", "lora", 2),
        *(pytest.param(*family.values, "lora", 1, marks=family.marks) for family in SHARED_LAW),
    ],
)
def test_gradient_checkpointing_changes_nothing(family: str, kind: str, parts: int) -> None:
    """Adapters take turns on one base: a backward pass must recompute with the adapter of its own role."""
    plain = tiny_distiller(family, replace(KINDS[kind], accumulation=parts))
    saving = tiny_distiller(family, replace(KINDS[kind], accumulation=parts, gradient_checkpointing=True))
    checkpointed = [m for m in saving.roles.student.denoiser.modules() if getattr(m, "gradient_checkpointing", False)]
    assert checkpointed
    assert iterate(plain, 2) == iterate(saving, 2)
    expected, found = weights_of(plain), weights_of(saving)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_teacher_is_not_checkpointed() -> None:
    roles = tiny_distiller("stable_diffusion", replace(UNIFY, gradient_checkpointing=True)).roles
    assert isinstance(roles, SeparateRoles)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in roles.teacher.denoiser.modules())


# ---- a student on disk ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", NOISE)
def test_whole_weights_load_as_they_were_saved(family: str, tmp_path: Path) -> None:
    distiller = tiny_distiller(family, UNIFY)
    iterate(distiller, 1)
    written = save_student(distiller, tmp_path)
    student = load_student(tiny_base(family).denoiser, tmp_path)
    for k in (1, 4):
        assert torch.equal(outputs(student, family, k), averaged_outputs(distiller, family, k))
    assert (tmp_path / STEP_CONDITION_FILE in written) != student.saves_step_condition
    # Stock diffusers finds every weight in the folder.
    part = FAMILIES[family].denoiser_folder
    _, report = type(TINY_MODELS[family]()).from_pretrained(tmp_path / part, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def with_lora_by_peft(family: str, denoiser: Denoiser, file: Path, config: DistillConfig) -> Denoiser:
    """The LoRA applied without alpha: by diffusers if the class has the mixin, otherwise by peft itself."""
    part = FAMILIES[family].denoiser_folder
    if hasattr(denoiser.model, "load_lora_adapter"):
        denoiser.model.load_lora_adapter(read_tensors(file), prefix=part)
        return denoiser
    rank = config.lora_rank
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(FAMILIES[family].lora_targets))
    inject_adapter_in_model(lora, denoiser.model)
    state = {name.removeprefix(f"{part}."): tensor for name, tensor in read_tensors(file).items()}
    report = set_peft_model_state_dict(denoiser.model, state)
    assert not report.unexpected_keys
    return denoiser


@pytest.mark.parametrize("family", NOISE)
def test_a_lora_loads_as_it_was_saved_and_its_weights_include_alpha(family: str, tmp_path: Path) -> None:
    distiller = tiny_distiller(family, LORA)
    iterate(distiller, 1)
    save_student(distiller, tmp_path)
    trained = averaged_outputs(distiller, family, 3)
    merged = load_student(tiny_base(family).denoiser, tmp_path)
    torch.testing.assert_close(outputs(merged, family, 3), trained, rtol=1e-4, atol=1e-4)
    denoiser = with_lora_by_peft(family, tiny_base(family).denoiser, tmp_path / LORA_FILE, LORA)
    denoiser.load_step_condition(read_tensors(tmp_path / STEP_CONDITION_FILE))
    torch.testing.assert_close(outputs(denoiser, family, 3), trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained, outputs(tiny_base(family).denoiser, family, None), atol=1e-3)


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "sd3", "flux", "flux2", "z_image", "cogvideox"])
def test_stock_pipelines_load_the_lora(family: str, tmp_path: Path) -> None:
    config = replace(LORA, step_condition_for="none", step_counts=(4,))
    distiller = tiny_distiller(family, config)
    iterate(distiller, 1)
    save_student(distiller, tmp_path)
    pipeline = build_pipeline(family)
    pipeline.load_lora_weights(tmp_path)
    denoiser = denoiser_for(getattr(pipeline, FAMILIES[family].denoiser_folder))
    expected = averaged_outputs(distiller, family, None)
    torch.testing.assert_close(outputs(denoiser, family, None), expected, rtol=1e-5, atol=1e-5)


def another_base(family: str) -> Denoiser:
    denoiser = tiny_base(family).denoiser
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return denoiser


@pytest.mark.parametrize("family", SHARED_LAW)
def test_a_lora_fits_another_model_of_its_base(family: str, tmp_path: Path) -> None:
    """The mechanics of Table 2: the adapter was trained on one base and is applied to another."""
    config = replace(LORA, step_condition_for="none", step_counts=(4,))
    distiller = tiny_distiller(family, config)
    iterate(distiller, 1)
    written = save_student(distiller, tmp_path)
    assert [file.name for file in written] == [LORA_FILE]
    plain = outputs(another_base(family), family, None)
    merged = outputs(load_student(another_base(family), tmp_path), family, None)
    by_peft = with_lora_by_peft(family, another_base(family), tmp_path / LORA_FILE, config)
    torch.testing.assert_close(merged, outputs(by_peft, family, None), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, plain, atol=1e-3)


def test_a_student_that_does_not_fit_the_base_is_refused(tmp_path: Path) -> None:
    base = tiny_base("stable_diffusion").denoiser
    with pytest.raises(CheckpointError, match=r"neither unet/ nor pytorch_lora_weights\.safetensors; give model/ of"):
        load_student(base, tmp_path)
    save_student(tiny_distiller("stable_diffusion", LORA), tmp_path / "lora")
    wide = denoiser_for(TINY_MODELS["stable_diffusion"](block_out_channels=(16, 64)))
    with pytest.raises(CheckpointError, match=r"of shape \(32, 32\), here it has \(64, 64\); use the base of the LoRA"):
        load_student(wide, tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"changes 'unet\..* this base does not have .*use the base of the LoRA"):
        load_student(tiny_base("sd3").denoiser, tmp_path / "lora")
    save_student(tiny_distiller("stable_diffusion", UNIFY), tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"is no model like the base: \d+ weights differ in shape"):
        load_student(wide, tmp_path / "full")
    with pytest.raises(
        ConfigError, match=r"flow_shift is 6 and the base is stable_diffusion, a diffusion model; set flow_shift to 0"
    ):
        tiny_distiller("stable_diffusion", replace(UNIFY, flow_shift=6.0))
    with pytest.raises(ConfigError, match="method 'lcm' knows diffusion schedules, sd3 is a flow"):
        tiny_distiller("sd3", as_lcm(UNIFY), has_latents=True)


# ---- folders in, a folder out --------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A base's pipeline folder and its embedded prompts."""
    root = tmp_path_factory.mktemp("workplace")
    (root / "prompts.jsonl").write_text('{"prompt": "a red fox"}\n{"prompt": "two cats"}\n{"prompt": "rain"}\n')

    @cache
    def places(family: str) -> tuple[Path, Path]:
        base, embeddings = root / family, root / f"{family}-embeddings"
        build_pipeline(family).save_pretrained(base)
        embed_prompts(base, root / "prompts.jsonl", embeddings, 64, 64)
        return base, embeddings

    return places


def parameters(distiller: Distiller, role: str) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in getattr(distiller.roles, role).denoiser.named_parameters()}


def test_sdxl_stage_two_starts_from_stage_one_with_a_fresh_fake_score(
    workplace: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, embeddings = workplace("sdxl")
    all_weights = {"lora_rank": 0, "student_learning_rate": 1e-3, "fake_learning_rate": 1e-3}
    config = replace(
        PRESETS["sdxl-512"], **TINY, **all_weights, teacher_prediction="any"
    )  # the tiny base has v_prediction
    train_backbone(tmp_path / "one", base, embeddings, config)
    second = build_backbone_distiller(base, embeddings, config, tmp_path / "one" / "model")
    pretrained = dict(load_base_model(base).denoiser.named_parameters())
    trained = dict(load_student(load_base_model(base).denoiser, tmp_path / "one" / "model").named_parameters())
    assert any(not torch.equal(trained[name], pretrained[name]) for name in trained)
    for role, expected in (("student", trained), ("fake", pretrained), ("teacher", pretrained)):
        found = parameters(second, role)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), role
    iterate(second, 1)


def test_sdxl_trains_in_the_two_stages_of_its_presets(
    workplace: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """The adapter of 512 pixels goes on at 1024, each an eighth here, with a new adapter of the fake score."""
    base, embeddings = workplace("sdxl")
    changes: dict[str, Any] = {**TINY, "lora_rank": 4, "lora_alpha": 4.0, "teacher_prediction": "any"}
    one, two = (
        replace(PRESETS[name], **changes | {"width": PRESETS[name].width // 8, "height": PRESETS[name].height // 8})
        for name in ("sdxl-512", "sdxl")
    )
    model = train_backbone(tmp_path / "one", base, embeddings, one)
    embed_prompts(base, embeddings.parent / "prompts.jsonl", tmp_path / "embeddings", two.width, two.height)
    with pytest.raises(PromptError, match="holds embeddings for 64x64 pixels, the config trains 128x128"):
        train_backbone(tmp_path / "two", base, embeddings, two, student_folder=model)
    second = build_backbone_distiller(base, tmp_path / "embeddings", two, model)
    saved, adapters = read_tensors(model / LORA_FILE), (second.roles.module(role) for role in ("student", "fake"))
    ups = [{n: p for n, p in adapter.named_parameters() if "lora_B" in n} for adapter in adapters]
    assert sum(tensor.square().sum() for name, tensor in saved.items() if "lora_B" in name) > 0
    torch.testing.assert_close(
        sorted(float(p.norm()) for p in ups[0].values()),
        sorted(float(tensor.norm()) for name, tensor in saved.items() if "lora_B" in name),
    )
    assert not any(p.any() for p in ups[1].values())
    final = train_backbone(tmp_path / "two", base, tmp_path / "embeddings", two, student_folder=model)
    recipe, trained = load_recipe(final), read_tensors(final / LORA_FILE)
    assert recipe.native_sizes == ((128, 128),) and set(recipe.timesteps) == {4}
    assert any(not torch.equal(trained[name], saved[name]) for name in saved)


TINY: dict[str, Any] = {
    "steps": 2,
    "batch_size": 2,
    "accumulation": 1,
    "precision": "fp32",
    "base_precision": "fp32",
    "width": 64,
    "height": 64,
    "save_every_s": 0.0,
}


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(
            name,
            marks=pytest.mark.slow
            if name in ("sd15-4step", "pixart-alpha", "flux-dev", "flux2-klein-base-4b", "z-image")
            else (),
        )
        for name in PRESETS
        if name not in ("sdxl-512", "sdxl", "pixart-alpha-1024", "wan-1.3b")
    ],
)
def test_a_preset_runs_from_folder_to_folder_and_a_second_run_trains_nothing_more(
    workplace: Callable[[str], tuple[Path, Path]], preset: str, tmp_path: Path
) -> None:
    families: dict[str, str] = {
        "pixart-alpha": "pixart",
        "sd3-medium": "sd3",
        "cogvideox-2b": "cogvideox",
        "flux-dev": "flux",
        "flux2-klein-base-4b": "flux2",
        "z-image": "z_image",
    }
    base, embeddings = workplace(families.get(preset, "stable_diffusion"))
    config = replace(PRESETS[preset], **TINY, frames=9 if preset == "cogvideox-2b" else 1)
    model = train_backbone(tmp_path, base, embeddings, config, name=preset)
    recipe = load_recipe(model)
    assert recipe.name == preset and recipe.native_sizes == ((64, 64),)
    if preset == "sd3-medium":
        assert isinstance(recipe.noise_schedule, FlowSchedule) and recipe.noise_schedule.shift == 6.0
    if preset == "cogvideox-2b":
        assert recipe.timesteps == {4: (999.0, 856.0, 665.0, 399.0)}
    hashes = recipe.files
    assert train_backbone(tmp_path, base, embeddings, config, name=preset) == model
    assert load_recipe(model).files == hashes, "the second run must train nothing"


def test_a_run_draws_samples_and_curves(workplace: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    base, embeddings = workplace("stable_diffusion")
    config = replace(UNIFY, **{**TINY, "grid_every": 1, "log_every": 1})
    train_backbone(tmp_path, base, embeddings, config)
    grids = [Image.open(tmp_path / "samples" / f"{done:06d}.png") for done in (1, 2)]
    assert grids[0].size == (len(config.step_counts) * 64, GRID_PROMPTS * 64)
    assert grids[0].tobytes() != grids[1].tobytes(), "the student must have changed"
    assert Image.open(tmp_path / PLOT_FILE).width > 100


def test_a_lora_continues_from_a_lora_of_its_rank_only(
    workplace: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, embeddings = workplace("stable_diffusion")
    config = replace(LORA, **TINY)
    model = train_backbone(tmp_path, base, embeddings, config)
    second = build_backbone_distiller(base, embeddings, config, model)
    merged = load_student(load_base_model(base).denoiser, model)
    second.roles.activate("student")
    torch.testing.assert_close(
        outputs(second.roles.student.denoiser, "stable_diffusion", 2),
        outputs(merged, "stable_diffusion", 2),
        rtol=1e-4,
        atol=1e-4,
    )
    with pytest.raises(CheckpointError, match=r"does not fit the student's adapter of rank 3: \d+ tensors differ"):
        build_backbone_distiller(base, embeddings, replace(config, lora_rank=3), model)
    whole = build_backbone_distiller(
        base, embeddings, replace(config, lora_rank=0, step_condition_for="student"), model
    )
    assert torch.equal(
        outputs(whole.roles.student.denoiser, "stable_diffusion", 2), outputs(merged, "stable_diffusion", 2)
    )
    with pytest.raises(ConfigError, match="has an input for K and step_condition_for is 'none'"):
        build_backbone_distiller(base, embeddings, replace(config, lora_rank=0, step_condition_for="none"), model)


def test_a_diverging_learning_rate_is_named_and_leaves_a_finite_state(
    workplace: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, embeddings = workplace("stable_diffusion")
    for rate in (1e12, 1e36):
        config = replace(UNIFY, **TINY | {"steps": 20}, student_learning_rate=rate)
        with pytest.raises(TrainingDivergedError, match=r"tdm diverged at iteration \d+: .*lower the learning rates"):
            train_backbone(tmp_path / f"{rate}", base, embeddings, config)
        state = tmp_path / f"{rate}" / "state.pt"
        if state.is_file():
            modules = torch.load(state, weights_only=True)["modules"]
            assert all(tensor.isfinite().all() for module in modules.values() for tensor in module.values())


# ---- memory --------------------------------------------------------------------------------------


def test_two_adapters_cost_a_sixth_of_the_base_at_sd15s_real_size() -> None:
    """Weights, gradients, Adam's two moments and the student's average, at the rank of the preset, 64."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
    total = sum(p.numel() for p in unet.parameters())
    assert total == 859_520_964, "Stable Diffusion 1.5"
    config = PRESETS["sd15-lora"]
    assert config.lora_rank == 64
    with torch.device("meta"):
        base = replace(tiny_base("stable_diffusion"), denoiser=denoiser_for(unet))
        roles = LoraRoles(
            base.denoiser, coordinates_of(base, config), 64, 64.0, FAMILIES["stable_diffusion"].lora_targets
        )
    adapters = {role: sum(p.numel() for p in roles.module(role).parameters()) for role in ("student", "fake")}
    assert adapters["student"] == adapters["fake"] > 0
    trained = 4 * sum(adapters.values()) + adapters["student"]
    assert trained / total < 0.15, f"{trained / total:.1%}"
