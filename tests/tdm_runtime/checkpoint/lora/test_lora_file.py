"""LoRA files that people publish: odd names and shapes are read, and each fault is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tdm_runtime.checkpoint.lora.lora_file import FOLDER_FILES, STEP_CONDITION_FILE, read_lora
from tdm_runtime.checkpoint.lora.merged_lora import merge_loras
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import FAMILIES
from tests.lora_files import tiny_pipeline

FAMILY = FAMILIES["stable_diffusion"]
MATRIX, CONV = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k", "conv_in"
DRAW = torch.Generator().manual_seed(0)
DOWN = {MATRIX: torch.randn(3, 32, generator=DRAW), CONV: torch.randn(3, 4, 3, 3, generator=DRAW)}
UP = {MATRIX: torch.randn(32, 3, generator=DRAW), CONV: torch.randn(16, 3, 1, 1, generator=DRAW)}
State = dict[str, Tensor]


def named(prefix: str, a: str = "lora_A", b: str = "lora_B") -> State:
    """Return both layers by diffusers' names behind a prefix."""
    halves = [(a, DOWN), (b, UP)]
    return {f"{prefix}{layer}.{name}.weight": half[layer].clone() for layer in DOWN for name, half in halves}


def kohya() -> State:
    halves = [("lora_down", DOWN), ("lora_up", UP)]
    return {
        f"lora_unet_{layer.replace('.', '_')}.{name}.weight": half[layer].clone()
        for layer in DOWN
        for name, half in halves
    }


MATRIX_STEM, CONV_STEM = (f"lora_unet_{layer.replace('.', '_')}" for layer in (MATRIX, CONV))


def written(state: State, file: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata)
    return file


def merged_weights(file: Path) -> dict[str, Tensor]:
    pipeline = tiny_pipeline("stable_diffusion")
    merge_loras({"unet": pipeline.unet}, [(read_lora(file, FAMILY), 1.0)])
    weights: dict[str, Tensor] = pipeline.unet.state_dict()
    return weights


ALIKE: dict[str, State] = {
    "diffusers' names without a component": named(""),
    "those of older diffusers": named("", "lora.down", "lora.up"),
    "those with kohya's halves": named("", "lora_down", "lora_up"),
    "ComfyUI's prefix": named("diffusion_model."),
    "PEFT's prefix": named("base_model.model."),
    "a matrix as 1x1 convolutions": {
        name: tensor[..., None, None] if tensor.ndim == 2 else tensor for name, tensor in kohya().items()
    },
    "B of a convolution as a matrix": {name: t[:, :, 0, 0] if t.shape[-1] == 1 else t for name, t in kohya().items()},
}


@pytest.mark.parametrize("how", ALIKE)
def test_other_names_and_shapes_of_the_same_lora_change_the_same_weights(how: str, tmp_path: Path) -> None:
    expected = merged_weights(written(named("unet."), tmp_path / "plain.safetensors"))
    made = merged_weights(written(ALIKE[how], tmp_path / "other.safetensors"))
    plain = tiny_pipeline("stable_diffusion").unet.state_dict()
    for name, weight in made.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)
        is_changed = name in (f"{MATRIX}.weight", f"{CONV}.weight")
        assert torch.equal(weight, plain[name]) != is_changed


def with_nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[0] = torch.nan
    return tensor


FAULTS: dict[str, tuple[State, str]] = {
    "no tensors": ({}, r"holds no LoRA \(it has no tensors\)"),
    "a NaN": (
        kohya() | {f"{MATRIX_STEM}.lora_up.weight": with_nan(UP[MATRIX].clone())},
        rf"NaN or infinity in B of '{MATRIX}'",
    ),
    "an infinite alpha": (
        kohya() | {f"{CONV_STEM}.alpha": torch.tensor(torch.inf)},
        "NaN or infinity in alpha of 'conv_in'",
    ),
    "two alphas": (kohya() | {f"{CONV_STEM}.alpha": torch.ones(2)}, "has no number as alpha of 'conv_in'"),
    "ranks that disagree": (
        kohya() | {f"{MATRIX_STEM}.lora_up.weight": torch.zeros(32, 5)},
        r"A of shape \(3, 32\) and B of shape \(32, 5\) for .* are the rank and must be equal",
    ),
    "rank 0": (
        kohya()
        | {f"{MATRIX_STEM}.lora_down.weight": torch.zeros(0, 32), f"{MATRIX_STEM}.lora_up.weight": torch.zeros(32, 0)},
        "are the rank and must be equal",
    ),
    "B without a rank": (
        kohya() | {f"{MATRIX_STEM}.lora_up.weight": torch.zeros(32)},
        "are the rank and must be equal",
    ),
    "whole numbers": (
        kohya() | {f"{MATRIX_STEM}.lora_down.weight": torch.ones(3, 32, dtype=torch.int32)},
        r"A of .* in torch\.int32; convert it to float16",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    state, message = FAULTS[fault]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_lora(written(state, tmp_path / "lora.safetensors"), FAMILY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 2, "alpha_pattern": {"(": 3}}, "has no number as alpha of"),
        ({"lora_alpha": "two"}, "has no number as alpha of"),
        ({"lora_alpha": 2, "alpha_pattern": [3]}, "has no number as alpha of"),
        ([1], r"adapter_config\.json cannot be read"),
    ],
)
def test_a_configuration_of_peft_that_cannot_be_followed_is_refused(
    settings: object, message: str, tmp_path: Path
) -> None:
    written(named("base_model.model."), tmp_path / FOLDER_FILES[1])
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        read_lora(tmp_path, FAMILY)


def test_alpha_patterns_are_regular_expressions_as_in_peft(tmp_path: Path) -> None:
    written(named("base_model.model."), tmp_path / FOLDER_FILES[1])
    settings = {"lora_alpha": 6.0, "alpha_pattern": {r".*attn1\.to_[kq]": 12.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    layers = read_lora(tmp_path, FAMILY).layers["unet"]
    assert (layers[MATRIX].scaling, layers[CONV].scaling) == (4.0, 2.0)


def peft_settings(folder: Path) -> Path:
    file = written(named("base_model.model."), folder / FOLDER_FILES[1])
    (folder / "adapter_config.json").write_text('{"lora_alpha": 6}')
    return file


def weights_that_read_k(folder: Path) -> Path:
    file = written(named("unet."), folder / FOLDER_FILES[0])
    save_file({"cond_proj.weight": torch.zeros(2, 2)}, folder / STEP_CONDITION_FILE)
    return file


def more_alpha(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"lora_alpha": 7}')


def other_weights(folder: Path) -> None:
    save_file({"cond_proj.weight": torch.ones(2, 2)}, folder / STEP_CONDITION_FILE)


@pytest.mark.parametrize(("write", "change"), [(peft_settings, more_alpha), (weights_that_read_k, other_weights)])
def test_the_digest_counts_every_file_that_is_read(
    write: Callable[[Path], Path], change: Callable[[Path], None], tmp_path: Path
) -> None:
    file = write(tmp_path)
    digest = read_lora(file, FAMILY).sha256
    assert read_lora(tmp_path, FAMILY).sha256 == digest
    change(tmp_path)
    assert read_lora(file, FAMILY).sha256 != digest
