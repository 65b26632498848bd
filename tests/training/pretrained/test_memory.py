"""Memory of the presets: what each states is what its shapes need, and none needs a GPU of more than 80 GB."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights

from export.architectures import REAL_SIZES, empty_model
from tdm_runtime.families import FAMILIES
from tests.tiny_models import TINY_MODELS
from tests.training.tiny_runs import LORA, UNIFY, iterate, tiny_distiller
from training.pretrained.memory import HALF_BYTES, state_bytes
from training.pretrained.presets import MAX_STATE_GB, PRESETS, STATE_GB

MODELS = {
    "sd15": "sd15",
    "sdxl": "sdxl",
    "pixart": "pixart",
    "sd3": "sd3",
    "cogvideox": "cogvideox-2b",
    "wan": "wan-1.3b",
}
FAMILY = {"sd15": "stable_diffusion"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_states_the_memory_of_its_state_and_leaves_room_on_80_gb(preset: str) -> None:
    name = preset.split("-")[0]
    with init_empty_weights(include_buffers=False):
        model = empty_model(REAL_SIZES[MODELS[name]]["denoiser"])
    found = state_bytes(PRESETS[preset], model, FAMILIES[FAMILY.get(name, name)].lora_targets) / 1e9
    assert found == pytest.approx(STATE_GB[preset], abs=0.05)
    assert found <= MAX_STATE_GB < 80


def test_all_weights_of_sdxl_would_not_fit() -> None:
    """The reason why its presets train LoRA adapters: the paper trains all weights, on larger or more GPUs."""
    with init_empty_weights(include_buffers=False):
        model = empty_model(REAL_SIZES["sdxl"]["denoiser"])
    assert state_bytes(replace(PRESETS["sdxl-512"], lora_rank=0), model, ()) > 80e9


@pytest.mark.parametrize("config", [UNIFY, LORA], ids=["all weights", "LoRA"])
def test_the_estimate_is_what_a_run_holds(config: object) -> None:
    """Counted on a tiny model after an iteration: weights, gradients, moments and the average."""
    assert isinstance(config, type(UNIFY))
    config = replace(config, step_counts=(4,), step_condition_for="none")
    distiller = tiny_distiller("sd3", config)
    iterate(distiller, 1)
    roles = distiller.roles
    modules = [getattr(roles, role).denoiser for role in ("teacher", "student", "fake")]
    held = {p: p.numel() for module in (*modules, distiller.average) for p in module.parameters()}
    held_bytes = 4 * sum(held.values())
    trained = [p for role in ("student", "fake") for p in roles.module(role).parameters()]
    held_bytes += 4 * sum(p.numel() for p in trained)  # gradients
    for optimizer in distiller.optimizers.values():
        for state in optimizer.state.values():
            held_bytes += sum(4 * t.numel() for t in state.values() if isinstance(t, torch.Tensor) and t.numel() > 1)
    model = TINY_MODELS["sd3"]()
    expected = state_bytes(config, model, FAMILIES["sd3"].lora_targets)
    assert config.precision == "fp32" and HALF_BYTES == 2
    assert held_bytes == pytest.approx(expected, rel=0.01)
