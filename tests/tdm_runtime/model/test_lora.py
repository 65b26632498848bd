"""A LoRA in any file format changes the weights by scale * alpha / rank * B A, and no pictures of other models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from tdm_runtime.checkpoint.lora.lora_file import LoraLayer, read_lora
from tdm_runtime.checkpoint.lora.merged_lora import merge, merge_loras, update_of
from tdm_runtime.checkpoint.recipe import Adapter
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import FAMILIES, denoiser_for
from tdm_runtime.families.call import denoiser_arguments
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_checkpoint, load_model
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel, denoise
from tdm_runtime.model.lora import AdapterBank, LoraBase, added
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests import lora_files
from tests.lora_files import Weights, draw_weights, tiny_pipeline
from tests.stock_checkpoints import CASES, save_checkpoint, stock_pipeline
from tests.tiny_models import TINY_SHAPES, tiny_conditioning

FAMILY = FAMILIES["stable_diffusion"]
RANK, ALPHA, SCALE = 3, 6.0, 0.5
PARAMS = SamplingParams("a red heart", 7, 3, 16, 16)
UNET_LAYERS = (
    "conv_in",
    "time_embedding.linear_1",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.resnets.0.conv1",
)
TEXT_LAYERS = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.fc1")
Halves = dict[str, tuple[Tensor, Tensor]]
"""Layer -> A and B."""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint, device="cpu")


def drawn(module: nn.Module, names: tuple[str, ...], seed: int = 0) -> Halves:
    """Draw random halves for some layers of a module."""
    generator = torch.Generator().manual_seed(seed)
    halves = {}
    for name in names:
        weight = module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        down = torch.randn(RANK, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
        up = torch.randn(weight.shape[0], RANK, *(1,) * (weight.ndim - 2), generator=generator)
        halves[name] = (down, up)
    return halves


def one_lora(checkpoint: Checkpoint, base: LoadedModel, name: str, path: Path, scale: float = 1.0) -> LoadedModel:
    """Attach one LoRA to the base."""
    on = LoraBase(checkpoint, base)
    return on.attach(on.prepare(name, [(read_lora(path, checkpoint.family), scale)]))


@pytest.fixture(scope="module")
def unet_halves(checkpoint: Checkpoint) -> Halves:
    return drawn(checkpoint.load_denoiser().model, UNET_LAYERS)


@pytest.fixture(scope="module")
def text_halves(checkpoint: Checkpoint) -> Halves:
    return drawn(checkpoint.load_text_model(), TEXT_LAYERS, seed=1)


def kohya(unet: Halves, text: Halves) -> dict[str, Tensor]:
    state = {}
    for prefix, halves in (("lora_unet_", unet), ("lora_te_text_model_", text)):
        for name, (down, up) in halves.items():
            flat = prefix + name.replace(".", "_")
            state |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            state[f"{flat}.alpha"] = torch.tensor(ALPHA)
    return state


def diffusers_state(unet: Halves, text: Halves) -> dict[str, Tensor]:
    state = {}
    for prefix, halves in (("unet.", unet), ("text_encoder.text_model.", text)):
        for name, (down, up) in halves.items():
            state |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    return state


def older_diffusers_state(unet: Halves, text: Halves) -> dict[str, Tensor]:
    """Return the state of a file from 2023. It has no alpha, so B holds the factor."""
    state = {}
    for name, (down, up) in unet.items():
        layer, is_attention = name.removesuffix(".0") if ".attn" in name else name, ".attn" in name
        parent, _, last = layer.rpartition(".")
        stem = f"unet.{parent}.processor.{last}_lora" if is_attention else f"unet.{name}.lora"
        state |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up * (ALPHA / RANK)}
    for name, (down, up) in text.items():
        stem = f"text_encoder.text_model.{name}.lora_linear_layer"
        state |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up * (ALPHA / RANK)}
    return state


def write_kohya(file: Path, unet: Halves, text: Halves) -> Path:
    save_file(kohya(unet, text), file)
    return file


def write_diffusers(file: Path, unet: Halves, text: Halves) -> Path:
    metadata = {f"{part}.lora_alpha": ALPHA for part in ("unet", "text_encoder")}
    save_file(diffusers_state(unet, text), file, {"lora_adapter_metadata": json.dumps(metadata)})
    return file


def write_older_diffusers(file: Path, unet: Halves, text: Halves) -> Path:
    save_file(older_diffusers_state(unet, text), file)
    return file


def merged(checkpoint: Checkpoint, scale: float, unet: Halves, text: Halves) -> LoadedModel:
    """Return the reference: torch modules with the LoRA added to their weights."""
    from tdm_runtime.model.components import load_component
    from tdm_runtime.model.text_encoder import ClipEncoder, TextEncoder

    model = load_model(checkpoint.folder, device="cpu")
    parts = {}
    for component, halves in (("denoiser", unet), ("text_encoder", text)):
        module, interface = load_component(checkpoint, component)  # type: ignore[arg-type]
        inner = module.get_submodule("model")
        for name, (down, up) in halves.items():
            weight = inner.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            weight.data += scale * ALPHA / RANK * delta
        parts[component] = TorchBackend(module, torch.device("cpu"), torch.float32, None, interface)
    return replace(
        model,
        denoiser=parts["denoiser"],
        text_encoder=TextEncoder(ClipEncoder(checkpoint.load_tokenizer(), parts["text_encoder"])),
    )


def levels_apart(a: Pixels, b: Pixels) -> int:
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.parametrize("write", [write_kohya, write_diffusers, write_older_diffusers])
def test_a_lora_equals_the_base_with_changed_weights(
    checkpoint: Checkpoint,
    base: LoadedModel,
    unet_halves: Halves,
    text_halves: Halves,
    write: Callable[[Path, Halves, Halves], Path],
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "lora.safetensors", unet_halves, text_halves)
    lora = one_lora(checkpoint, base, "changed", file, SCALE)
    expected = generate(merged(checkpoint, SCALE, unet_halves, text_halves), PARAMS)
    assert levels_apart(generate(lora, PARAMS), expected) <= 1
    assert levels_apart(generate(base, PARAMS), expected) > 20  # the LoRA has a visible effect
    assert lora.name == "changed"
    assert lora.digest != base.digest


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_lora_saved_by_peft_equals_peft(
    checkpoint: Checkpoint, base: LoadedModel, use_rslora: bool, tmp_path: Path
) -> None:
    unet = checkpoint.load_denoiser().model
    targets = [name for name in UNET_LAYERS if "attn" in name]
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets, use_rslora=use_rslora)
    changed = get_peft_model(unet, config)
    with torch.no_grad():
        for name, weight in changed.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(3))
    assert isinstance(changed, PeftModel)
    changed.save_pretrained(str(tmp_path))
    lora = one_lora(checkpoint, base, "peft", tmp_path)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps, step_counts = torch.tensor([900.0, 100.0]), torch.tensor([1, 4])
    embeds = torch.randn(2, 77, 16, generator=torch.Generator().manual_seed(1))
    from tdm_runtime.families.unet import UNetDenoiser

    with torch.no_grad():
        expected = UNetDenoiser(changed.merge_and_unload())(latents, timesteps, step_counts, embeds)
    assert lora.adapter is not None
    made = denoise([lora] * 2, latents, timesteps, step_counts, Conditioning(embeds))
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_a_lora_changes_the_text_encoders_of_a_stock_pipeline_for_its_own_pictures(family: str, tmp_path: Path) -> None:
    """The LoRA that is added at run time makes the pictures of the one that is merged, and the base keeps its own."""
    case = next(case for case in CASES.values() if case.family == family)
    pipeline, folder = stock_pipeline(case), save_checkpoint(case, tmp_path / "folder")
    file = lora_files.write_diffusers(pipeline, tmp_path / "lora", draw_weights(pipeline, family, 1))
    checkpoint = open_checkpoint(folder)
    base = load_checkpoint(checkpoint, BackendConfig(device="cpu"))
    params = replace(PARAMS, num_inference_steps=2, width=64, height=32)
    before = generate(base, params)
    lora = one_lora(checkpoint, base, "changed", file, SCALE)
    merged_model = load_model(folder, device="cpu", adapters=[Adapter(str(file), SCALE)])

    made, expected = (model.embedding(params).conditioning for model in (lora, merged_model))
    torch.testing.assert_close(made.pooled_prompt_embeds, expected.pooled_prompt_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.prompt_embeds, expected.prompt_embeds, rtol=1e-4, atol=1e-5)
    assert levels_apart(generate(lora, params), generate(merged_model, params)) <= 2
    assert levels_apart(generate(lora, params), before) > 5
    encoder = base.text_encoder.encoder
    uncached = encoder.encode([encoder.tokenize(base.prompt_key(params))])[0].conditioning
    assert torch.equal(uncached.prompt_embeds, base.text_encoder.encode(params.prompt).conditioning.prompt_embeds)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bank_mixes_loras_of_any_family_in_a_call(family: str, tmp_path: Path) -> None:
    pipeline, part = tiny_pipeline(family), FAMILIES[family].denoiser_folder
    writers: tuple[Callable[[Any, Path, Weights], Path], ...] = (lora_files.write_diffusers, lora_files.write_kohya)
    weights = [{part: draw_weights(pipeline, family, seed)[part]} for seed in range(2)]
    files = [
        read_lora(write(pipeline, tmp_path / str(n), weights[n]), FAMILIES[family]) for n, write in enumerate(writers)
    ]
    together = [[(files[0], 0.5)], [(files[1], -1.0), (files[0], 0.25)], []]
    prompt = tiny_conditioning(family, 3)
    interface = denoiser_for(pipeline.components[part]).interface(prompt.prompt_embeds.shape[1])
    names = [spec.name for spec in interface.inputs]
    latents = torch.randn(3, *TINY_SHAPES[family], generator=torch.Generator().manual_seed(0))
    timesteps, counts = torch.tensor([900.0, 300.0, 20.0]), torch.tensor([1, 2, 4])
    arguments = denoiser_arguments(names, latents, timesteps, counts, prompt)

    bank = AdapterBank(denoiser_for(pipeline.components[part]), interface, torch.device("cpu"), None)
    for number, loras in enumerate(together):
        bank.layers.add(number, bank.layers.updates(part, loras))
    mixed = bank(torch.arange(3), torch.ones(3), *arguments)

    for number, loras in enumerate(together):
        denoiser = denoiser_for(tiny_pipeline(family).components[part])
        merge_loras({part: denoiser}, loras)
        expected = TorchBackend(denoiser, torch.device("cpu"), interface=interface)(*arguments)[number]
        assert (mixed[number] - expected).norm() / expected.norm() < 1e-4


def test_a_bank_adds_doras_and_biases_as_merging_does() -> None:
    layers = nn.ModuleDict({"matrix": nn.Linear(6, 5), "conv": nn.Conv2d(4, 6, 3, stride=2, padding=1)})
    draw = torch.Generator().manual_seed(0)

    def drawn_layer(target: nn.Linear | nn.Conv2d, *, is_dora: bool) -> LoraLayer:
        out, ones = target.weight.shape[0], (1,) * (target.weight.ndim - 2)
        down = torch.randn(RANK, *target.weight.shape[1:], generator=draw)
        up, bias = torch.randn(out, RANK, *ones, generator=draw), torch.randn(out, generator=draw)
        return LoraLayer(down, up, 0.7, torch.rand(out, generator=draw) if is_dora else None, bias)

    for target, inputs in zip(layers.values(), (torch.randn(2, 6), torch.randn(2, 4, 5, 5)), strict=True):
        assert isinstance(target, nn.Linear | nn.Conv2d)
        layers_ = [drawn_layer(target, is_dora=is_dora) for is_dora in (True, False, True)]
        updates = [(update_of(layer, target), scale) for layer, scale in zip(layers_, (0.5, -1.0, 2.0), strict=True)]
        output = target(inputs)
        for update, scale in updates:
            output = output + added(target, inputs, output, update, torch.full((2,), scale))
        merge(target, updates)
        torch.testing.assert_close(output, target(inputs), rtol=1e-4, atol=1e-4)


def test_a_lora_that_reads_k_is_not_added_at_run_time(
    checkpoint: Checkpoint, base: LoadedModel, unet_halves: Halves, tmp_path: Path
) -> None:
    write_diffusers(tmp_path / "pytorch_lora_weights.safetensors", unet_halves, {})
    save_file(checkpoint.load_denoiser().step_condition_state(), tmp_path / "step_condition.safetensors")
    with pytest.raises(CheckpointError, match=r"trained with weights that read K .* serve its folder as a model"):
        one_lora(checkpoint, base, "with K", tmp_path)


@pytest.fixture
def two_loras(
    checkpoint: Checkpoint, base: LoadedModel, unet_halves: Halves, text_halves: Halves, tmp_path: Path
) -> Iterator[tuple[LoraBase, list[LoadedModel]]]:
    lora_base = LoraBase(checkpoint, base)
    other = drawn(checkpoint.load_denoiser().model, UNET_LAYERS[:3], seed=5)
    files = [
        write_kohya(tmp_path / "a.safetensors", unet_halves, text_halves),
        write_diffusers(tmp_path / "b.safetensors", other, {}),
    ]
    prepared = [lora_base.prepare(file.stem, [(read_lora(file, checkpoint.family), SCALE)]) for file in files]
    yield lora_base, [lora_base.attach(lora) for lora in prepared]


def test_loras_of_one_base_share_calls_and_keep_their_pictures(
    base: LoadedModel, two_loras: tuple[LoraBase, list[LoadedModel]]
) -> None:
    models = [base, *two_loras[1]]
    alone = [generate(model, PARAMS) for model in models]
    sizes: list[int] = []
    engine = DiffusionEngine(base, observe_batch=lambda size, seconds: sizes.append(size))
    futures: list[Future[object]] = []
    for model in models * 2:
        futures.append(engine.submit(PARAMS, model=model))  # type: ignore[arg-type]
    with engine:
        made = [future.result(60).pixels for future in futures]  # type: ignore[attr-defined]
    for picture, expected in zip(made, alone * 2, strict=True):
        assert levels_apart(picture, expected) <= 2
    assert sorted(sizes) == [2] * 3 + [4] * 3  # the base runs alone, and both LoRAs share calls


def test_swapping_one_lora_leaves_the_other_unchanged(
    base: LoadedModel, two_loras: tuple[LoraBase, list[LoadedModel]], tmp_path: Path
) -> None:
    lora_base, (first, second) = two_loras
    before = generate(second, PARAMS)
    lora_base.detach(first)
    swapped = lora_base.attach(lora_base.prepare("a", [(read_lora(tmp_path / "b.safetensors", FAMILY), 2 * SCALE)]))
    assert levels_apart(generate(swapped, PARAMS), before) > 5  # the same file at twice the scale
    assert levels_apart(generate(second, PARAMS), before) == 0
    assert generate(base, PARAMS).shape == before.shape
    assert len({first.digest, second.digest, swapped.digest}) == 3


def spoiled(unet_halves: Halves, how: str) -> dict[str, Tensor]:
    state = kohya(unet_halves, {})
    flat = "lora_unet_conv_in"
    if how == "half":
        del state[f"{flat}.lora_up.weight"]
    elif how == "shape":
        state[f"{flat}.lora_down.weight"] = torch.zeros(RANK, 9, 3, 3)
    elif how == "layer":
        state = {name.replace("conv_in", "conv_elsewhere"): tensor for name, tensor in state.items()}
    elif how == "tucker":
        state[f"{flat}.hada_t1"] = torch.ones(8)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("half", "only one half of 'conv_in'"),
        ("shape", r"conv_in of shape \(8, 9, 3, 3\), here it has \(8, 4, 3, 3\); use the base of the LoRA"),
        ("layer", r"changes 'conv\.elsewhere', which this base does not have \(1 of 6 layers of its unet\)"),
        ("tucker", r"changes 'lora_unet_conv_in' by hada_t1, .*, a form of LyCORIS that is not read; merge it"),
    ],
)
def test_a_lora_that_does_not_fit_the_base_is_refused_by_name(
    checkpoint: Checkpoint, base: LoadedModel, unet_halves: Halves, how: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(spoiled(unet_halves, how), file)
    with pytest.raises(CheckpointError, match=message):
        one_lora(checkpoint, base, "spoiled", file)


@pytest.mark.parametrize("name", ["missing.safetensors", "lora.bin", "damaged.safetensors"])
def test_a_file_that_is_no_lora_is_refused(name: str, tmp_path: Path) -> None:
    if not name.startswith("missing"):
        (tmp_path / name).write_bytes(b"\x80\x04no weights")
    with pytest.raises(CheckpointError, match=r"is no LoRA|cannot be read"):
        read_lora(tmp_path / name, FAMILY)
