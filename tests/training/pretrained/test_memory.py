"""Memory of the presets: the plan counts what a run holds, and no preset needs a GPU of more than 80 GB."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tdm_runtime.families import FAMILIES, Denoiser, denoiser_for
from tdm_runtime.families.architectures import empty_model
from tests.tiny_models import TEXT_TOKENS, TINY_MODELS
from tests.training.tiny_runs import LORA, UNIFY, iterate, tiny_distiller
from training.config import ConfigError, DistillConfig
from training.pretrained.memory import state_memory
from training.pretrained.plan import GPU_BYTES, PUBLISHED, LiveBytes, activations_of, plan
from training.pretrained.presets import PRESETS, PUBLISHED_BASES
from training.run.loop import step_generator

FIXED_K = {"step_counts": (4,), "step_condition_for": "none"}
KINDS = {
    "all weights": replace(UNIFY, **FIXED_K),  # type: ignore[arg-type]
    "LoRA": replace(LORA, **FIXED_K),  # type: ignore[arg-type]
    "LoRA on a base in bf16": replace(LORA, **FIXED_K, precision="bf16", base_precision="bf16"),  # type: ignore[arg-type]
}


def published(model: str) -> Denoiser:
    with torch.device("meta"):
        return denoiser_for(empty_model(PUBLISHED[model]))


@pytest.mark.parametrize("model", sorted(set(PUBLISHED_BASES.values())))
def test_the_state_of_every_preset_leaves_room_on_80_gb(model: str) -> None:
    denoiser = published(model)
    targets = FAMILIES[
        next(name for name, family in FAMILIES.items() if family.is_denoiser(denoiser.model))
    ].lora_targets
    states = {
        name: state_memory(PRESETS[name], denoiser, targets).total
        for name, base in PUBLISHED_BASES.items()
        if base == model
    }
    assert states and max(states.values()) < 0.6 * GPU_BYTES, states


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fits_80_gb_with_its_activations(preset: str) -> None:
    planned = plan(PRESETS[preset], PUBLISHED[PUBLISHED_BASES[preset]])
    assert planned.total <= GPU_BYTES, str(planned)


@pytest.mark.parametrize("model", ["flux-dev", "z-image"])
def test_a_frozen_base_in_bf16_is_half_as_large(model: str) -> None:
    config, denoiser = PRESETS[model], published(model)
    half, whole = (state_memory(replace(config, base_precision=held), denoiser, ()).frozen for held in ("bf16", "fp32"))
    assert half == pytest.approx(whole / 2, rel=0.01)


def test_all_weights_of_sdxl_would_not_fit() -> None:
    """The reason why its presets train LoRA adapters: the paper trains all weights, on larger or more GPUs."""
    config = replace(PRESETS["sdxl"], lora_rank=0, base_precision="fp32")
    assert state_memory(config, published("sdxl"), ()).total > GPU_BYTES


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_what_a_run_holds(kind: str) -> None:
    """Counted on a tiny model after an iteration: weights, gradients, moments and the average."""
    config = KINDS[kind]
    distiller = tiny_distiller("sd3", config)
    iterate(distiller, 1)
    roles = distiller.roles
    modules = [getattr(roles, role).denoiser for role in ("teacher", "student", "fake")]
    held = {p: p.nbytes for module in (*modules, distiller.average) for p in module.parameters()}
    held_bytes = sum(held.values())
    trained = [p for role in ("student", "fake") for p in roles.module(role).parameters()]
    held_bytes += sum(p.nbytes for p in trained)  # gradients
    for optimizer in distiller.optimizers.values():
        for state in optimizer.state.values():
            held_bytes += sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor) and t.numel() > 1)
    expected = state_memory(config, denoiser_for(TINY_MODELS["sd3"]()), FAMILIES["sd3"].lora_targets)
    assert held_bytes == pytest.approx(expected.total, rel=0.01)


MEASURED = {  # batches so large that activations outweigh what the optimizer makes for a moment
    "one part": replace(KINDS["LoRA"], precision="fp32"),
    "parts": replace(KINDS["LoRA"], accumulation=2),
    "computed again": replace(KINDS["LoRA"], accumulation=2, gradient_checkpointing=True),
    "all weights, in bf16": replace(KINDS["all weights"], batch_size=64, accumulation=2, precision="bf16"),
    "unify": replace(UNIFY, batch_size=64, accumulation=4),
}


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("stable_diffusion", "one part"),
        ("z_image", "computed again"),
        *(pytest.param("stable_diffusion", case, marks=pytest.mark.slow) for case in MEASURED if case != "one part"),
    ],
)
def test_planned_activations_are_those_of_a_real_iteration(
    family: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # otherwise nothing is in bf16
    config: DistillConfig = replace(MEASURED[case], width=128, height=128)
    distiller = tiny_distiller(family, config, latent_shape=(4, 16, 16))
    roles = distiller.roles
    iterate(distiller, 1)  # makes the optimizers' moments
    held = torch.nn.ModuleList(role.denoiser for role in (roles.teacher, roles.student, roles.fake))
    with LiveBytes(held) as live:
        distiller.train_step(1, step_generator(0, "tdm", 1))
    with torch.device("meta"):
        empty = denoiser_for(type(TINY_MODELS[family]()).from_config(TINY_MODELS[family]().config))
    samples = config.batch_size // config.accumulation
    planned = activations_of(config, empty, TEXT_TOKENS, samples).peak(config.accumulation)
    gradients = state_memory(config, denoiser_for(TINY_MODELS[family]()), FAMILIES[family].lora_targets).gradients
    assert live.peak == pytest.approx(planned + gradients, rel=0.25)


def test_a_batch_that_the_processes_cannot_share_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="batch_size 32 cannot be cut into 3 processes x 16 accumulated parts; choose"
    ):
        plan(PRESETS["z-image"], PUBLISHED["z-image"], processes=3)
