"""LoRAs that are merged into a family's modules give what the stock pipeline gives with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from tdm_runtime.checkpoint.lora.lora_file import STEP_CONDITION_FILE, read_lora
from tdm_runtime.checkpoint.lora.merged_lora import merge_loras
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import FAMILIES, denoiser_for
from tests.lora_files import (
    Drawn,
    Weights,
    components,
    draw_weights,
    halves,
    outputs,
    peft_config,
    save_by_diffusers,
    saved,
    stock_outputs,
    tiny_pipeline,
    write_diffusers,
    write_kohya,
    write_older_diffusers,
    write_peft,
    write_stability,
    write_without_alpha,
)

Writer = Callable[[Any, Path, Weights], Path]
STYLES: dict[str, Writer] = {
    "diffusers": write_diffusers,
    "without alpha": write_without_alpha,
    "older diffusers": write_older_diffusers,
    "kohya": write_kohya,
    "PEFT": write_peft,
}
UNETS = ("stable_diffusion", "sdxl")
DIFFERENT = (*UNETS, "sd3", "wan")
"""UNets, which have convolutions, and transformers of pictures and of clips, for laws that no family changes."""
ALL_STYLES = [(family, style) for family in FAMILIES for style in STYLES]
PEFT_KINDS = [
    (family, kind)
    for family in FAMILIES
    for kind in ("use_dora", "use_rslora", "lora_bias")
    # PixArt's class has no adapters, and FLUX.2's layers have no biases.
    if family != "pixart" and (family, kind) != ("flux2", "lora_bias")
]


def quick_for(families: tuple[str, ...], case: tuple[str, str], names: tuple[str, ...] = ()) -> Any:
    """Mark a case of another family as slow, unless its second part is one of `names`."""
    is_quick = case[0] in families or case[1] in names
    return pytest.param(*case, marks=() if is_quick else pytest.mark.slow)


def merged_outputs(family: str, loras: list[tuple[Path, float]]) -> dict[str, Tensor]:
    pipeline = tiny_pipeline(family)
    merge_loras(components(pipeline, family), [(read_lora(file, FAMILIES[family]), scale) for file, scale in loras])
    return outputs(pipeline, family)


@cache
def plain_outputs(family: str) -> dict[str, Tensor]:
    return outputs(tiny_pipeline(family), family)


def assert_same(made: dict[str, Tensor], expected: dict[str, Tensor], family: str) -> None:
    plain = plain_outputs(family)
    for component, output in expected.items():
        size = output.norm()
        assert (output - plain[component]).norm() / size > 0.1, f"the LoRA hardly changes the {component}"
        assert (output - made[component]).norm() / size < 1e-4, component


@pytest.mark.parametrize(
    ("family", "style"),
    [
        *(quick_for(DIFFERENT, case, ("diffusers", "kohya")) for case in ALL_STYLES),
        *((family, "Stability") for family in UNETS),
    ],
)
def test_a_lora_in_any_style_equals_the_stock_pipeline(family: str, style: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(family)
    weights = draw_weights(pipeline, family, seed=0)
    if style == "PEFT":  # holds the denoiser only
        weights = {FAMILIES[family].denoiser_folder: weights[FAMILIES[family].denoiser_folder]}
    file = (STYLES | {"Stability": write_stability})[style](pipeline, tmp_path / "given", weights)
    reference = write_diffusers(pipeline, tmp_path / "reference", weights)
    expected = stock_outputs(family, [(reference, 0.5)])
    made = merged_outputs(family, [(file, 0.5)])
    assert_same(made, {component: expected[component] for component in weights}, family)


@pytest.mark.parametrize(
    ("family", "write"), [("stable_diffusion", write_kohya), ("sdxl", write_kohya), ("sdxl", write_stability)]
)
def test_the_stock_pipeline_reads_kohyas_files_alike(family: str, write: Writer, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(family)
    weights = draw_weights(pipeline, family, seed=0, alpha=2.0)
    unet = {name: drawn for name, drawn in weights["unet"].items() if "add_embedding" not in name}  # fails in stock
    file = write(pipeline, tmp_path, {**weights, "unet": unet})
    assert_same(merged_outputs(family, [(file, 0.5)]), stock_outputs(family, [(file, 0.5)]), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_loras_at_once_equal_the_stock_pipeline(family: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(family)
    files = [write_diffusers(pipeline, tmp_path / str(seed), draw_weights(pipeline, family, seed)) for seed in range(2)]
    loras = list(zip(files, (0.5, -1.5), strict=True))
    assert_same(merged_outputs(family, loras), stock_outputs(family, loras), family)


def write_adapter(family: str, folder: Path, seed: int, **settings: Any) -> Path:
    """Write a LoRA that peft injected into every second layer of the denoiser."""
    pipeline = tiny_pipeline(family)
    part = FAMILIES[family].denoiser_folder
    layers = draw_weights(pipeline, family, seed)[part]
    model = getattr(pipeline, part)
    if settings.get("lora_bias"):
        layers = {name: drawn for name, drawn in layers.items() if model.get_submodule(name).bias is not None}
    config = peft_config(layers, **settings)
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in get_peft_model_state_dict(model).items():
        noise = torch.randn(tensor.shape, generator=generator)
        state[name] = tensor * (1 + 0.3 * noise) if "magnitude" in name else noise / 2 / tensor[0].numel() ** 0.5
    return save_by_diffusers(pipeline, folder, {part: state}, {part: config})


@pytest.mark.parametrize(("family", "kind"), [quick_for(DIFFERENT, case) for case in PEFT_KINDS])
def test_kinds_of_peft_equal_the_stock_pipeline(family: str, kind: str, tmp_path: Path) -> None:
    files = [write_adapter(family, tmp_path / str(seed), seed, **{kind: True}) for seed in range(2)]
    loras = list(zip(files, (0.5, 1.5), strict=True))
    part = FAMILIES[family].denoiser_folder
    made, expected = merged_outputs(family, loras), stock_outputs(family, loras)
    assert_same({part: made[part]}, {part: expected[part]}, family)


def kohya_stems(weights: Weights) -> dict[str, Drawn]:
    """Return the UNet's layers of a LoRA by kohya's names."""
    return {f"lora_unet_{name.replace('.', '_')}": drawn for name, drawn in weights["unet"].items()}


@pytest.mark.parametrize("family", UNETS)
def test_kohyas_dora_equals_pefts(family: str, tmp_path: Path) -> None:
    """diffusers drops kohya's scales, so the same tensors in PEFT's names are the reference."""
    pipeline = tiny_pipeline(family)
    layers = draw_weights(pipeline, family, seed=0, alpha=6.0)["unet"]
    state = halves(layers)
    kohya: dict[str, Tensor] = {}
    for (name, drawn), (stem, _) in zip(layers.items(), kohya_stems({"unet": layers}).items(), strict=True):
        magnitude = torch.rand(len(drawn.up), generator=torch.Generator().manual_seed(len(name))) + 0.5
        is_matrix = drawn.down.ndim == 2
        state[f"{name}.lora_magnitude_vector"] = magnitude if is_matrix else magnitude.reshape(1, -1, 1, 1)
        kohya |= {f"{stem}.lora_down.weight": drawn.down, f"{stem}.lora_up.weight": drawn.up}
        kohya |= {f"{stem}.alpha": torch.tensor(6.0)}
        kohya[f"{stem}.dora_scale"] = magnitude.reshape(-1, *(1,) * (drawn.down.ndim - 1))
    reference = save_by_diffusers(
        pipeline, tmp_path / "reference", {"unet": state}, {"unet": peft_config(layers, use_dora=True)}
    )
    made = merged_outputs(family, [(saved(kohya, tmp_path), 0.5)])
    assert_same({"unet": made["unet"]}, {"unet": stock_outputs(family, [(reference, 0.5)])["unet"]}, family)


def hadamard(drawn: Drawn, draw: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    rank, outputs_, inputs = 2, len(drawn.up), drawn.down[0].numel()
    shapes = {"w1_a": (outputs_, rank), "w1_b": (rank, inputs), "w2_a": (outputs_, rank), "w2_b": (rank, inputs)}
    w = {name: torch.randn(shape, generator=draw) / inputs**0.25 for name, shape in shapes.items()}
    delta = 0.5 * (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])  # alpha 1, rank 2
    return {f"hada_{name}": tensor for name, tensor in w.items()} | {"alpha": torch.tensor(1.0)}, delta


def kronecker(drawn: Drawn, draw: torch.Generator, *, is_decomposed: bool) -> tuple[dict[str, Tensor], Tensor]:
    w1 = torch.randn(2, 2, generator=draw)
    shape = (len(drawn.up) // 2, drawn.down.shape[1] // 2, *drawn.down.shape[2:])
    if not is_decomposed:  # alpha has no meaning then
        w2 = torch.randn(shape, generator=draw) / 9
        kron = torch.kron(w1.reshape(2, 2, *(1,) * (len(shape) - 2)), w2)
        return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}, kron
    a = torch.randn(shape[0], 3, generator=draw)
    b = torch.randn(3, shape[1], generator=draw) / shape[1]
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}, torch.kron(w1, a @ b) / 3


LYCORIS: dict[str, Callable[[Drawn, torch.Generator], tuple[dict[str, Tensor], Tensor]]] = {
    "LoHa": hadamard,
    "LoKr": lambda drawn, draw: kronecker(drawn, draw, is_decomposed=False),
    "LoKr of low rank": lambda drawn, draw: kronecker(drawn, draw, is_decomposed=True),
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_updates_of_lycoris_change_the_weights_by_their_definition(kind: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sdxl")
    weights = draw_weights(pipeline, "sdxl", seed=0)["unet"]
    layers = {
        name: drawn
        for name, drawn in weights.items()
        if len(drawn.up) % 2 == 0 == drawn.down.shape[1] % 2 and (drawn.down.ndim == 2 or kind != "LoKr of low rank")
    }
    draw = torch.Generator().manual_seed(0)
    expected = {name: parameter.clone() for name, parameter in pipeline.unet.state_dict().items()}
    state = {}
    for name, drawn in layers.items():
        tensors, delta = LYCORIS[kind](drawn, draw)
        state |= {f"lora_unet_{name.replace('.', '_')}.{key}": tensor for key, tensor in tensors.items()}
        expected[f"{name}.weight"] += 0.5 * delta.reshape(expected[f"{name}.weight"].shape)
    merge_loras({"unet": pipeline.unet}, [(read_lora(saved(state, tmp_path), FAMILIES["sdxl"]), 0.5)])
    assert any(drawn.down.ndim == 4 for drawn in layers.values()) == (kind != "LoKr of low rank")
    for name, parameter in pipeline.unet.state_dict().items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_denoiser_receives_the_weights_that_read_k(family: str, tmp_path: Path) -> None:
    pipeline, part = tiny_pipeline(family), FAMILIES[family].denoiser_folder
    file = write_diffusers(pipeline, tmp_path, {part: draw_weights(pipeline, family, 0)[part]})
    trained = denoiser_for(tiny_pipeline(family).components[part])
    trained.add_step_condition(16)
    torch.nn.init.normal_(trained.timestep_embedding.cond_proj.weight)
    save_file(trained.step_condition_state(), tmp_path / STEP_CONDITION_FILE)
    denoiser = denoiser_for(pipeline.components[part])
    lora = read_lora(file.parent, FAMILIES[family])
    merge_loras({part: denoiser}, [(lora, 0.5)])
    assert torch.equal(denoiser.timestep_embedding.cond_proj.weight, trained.timestep_embedding.cond_proj.weight)
    with pytest.raises(CheckpointError, match="both bring weights that read K; a model has room for one"):
        merge_loras({part: denoiser}, [(lora, 0.5), (lora, 0.5)])


def test_a_lora_of_another_base_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("stable_diffusion")
    weights = draw_weights(pipeline, "stable_diffusion", seed=0)["unet"]
    renamed = {name.replace("attn1", "attn7"): drawn for name, drawn in weights.items()}
    unknown, known = len(set(renamed) - set(weights)), len(weights)
    file = write_diffusers(pipeline, tmp_path / "name", {"unet": renamed})
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    message = (
        rf"changes '.*attn7.*', which this base does not have \({unknown} of {known} layers of its unet\); use the"
    )
    with pytest.raises(CheckpointError, match=message):
        merge_loras({"unet": pipeline.unet}, [(read_lora(file, FAMILIES["stable_diffusion"]), 1.0)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())


@pytest.mark.parametrize(("source", "base"), [("sdxl", "sd3"), ("sd3", "sdxl"), ("sdxl", "stable_diffusion")])
def test_a_lora_of_another_family_is_refused(source: str, base: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(source)
    for write in (write_diffusers, write_kohya):
        file = write(pipeline, tmp_path / write.__name__, draw_weights(pipeline, source, seed=0))
        with pytest.raises(CheckpointError, match="use the base of the LoRA"):
            merged_outputs(base, [(file, 1.0)])


def test_files_without_a_lora_and_damaged_files_are_refused(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sdxl")
    family = FAMILIES["sdxl"]
    whole = saved({name: tensor for name, tensor in pipeline.unet.state_dict().items()}, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"holds no LoRA \(its first tensor is 'add_embedding"):
        read_lora(whole, family)
    file = write_kohya(pipeline, tmp_path / "cut", draw_weights(pipeline, "sdxl", seed=0))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot be read \(.*\); fetch it again from its source"):
        read_lora(file, family)
    (tmp_path / "lora.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"is no LoRA; give a \.safetensors file"):
        read_lora(tmp_path / "lora.ckpt", family)


def test_a_scale_for_each_input_is_refused(tmp_path: Path) -> None:
    layers = kohya_stems(draw_weights(tiny_pipeline("sdxl"), "sdxl", seed=0))
    stem, drawn = next((stem, drawn) for stem, drawn in layers.items() if drawn.down.ndim == 2)
    state = {f"{stem}.lora_down.weight": drawn.down, f"{stem}.lora_up.weight": drawn.up}
    state[f"{stem}.dora_scale"] = torch.ones(1, drawn.down.shape[1])
    with pytest.raises(CheckpointError, match="a DoRA with a scale for each input of"):
        read_lora(saved(state, tmp_path), FAMILIES["sdxl"])
