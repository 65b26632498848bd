"""Random LoRAs of any family, written in every key style, and the stock pipeline that loads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tdm_runtime.families import FAMILIES
from tests.tiny_models import STOCK_CALLS, TINY_MODELS, TINY_SHAPES, tiny_conditioning
from tests.tiny_pipelines import build_pipeline

RANK = 3


@dataclass(frozen=True)
class Drawn:
    """Random halves of one layer, and its alpha."""

    down: Tensor
    up: Tensor
    alpha: float


Weights = Mapping[str, Mapping[str, Drawn]]
"""Component -> layer -> its LoRA."""


def tiny_pipeline(family: str) -> Any:
    """Return the stock pipeline with as many layers in a block as Stability counts."""
    pipeline = build_pipeline(family)
    if family in ("stable_diffusion", "sdxl"):
        pipeline.register_modules(unet=TINY_MODELS[family](layers_per_block=2))
    return pipeline


def components(pipeline: Any, family: str) -> dict[str, nn.Module]:
    """Return the modules that the stock pipeline loads LoRAs into."""
    names = getattr(pipeline, "_lora_loadable_modules", [FAMILIES[family].denoiser_folder])
    return {name: module for name in names if (module := getattr(pipeline, name)) is not None}


def outputs(pipeline: Any, family: str) -> dict[str, Tensor]:
    """Return the output of the denoiser and of each text encoder for random inputs."""
    draw = torch.Generator().manual_seed(3)
    made = {}
    with torch.no_grad():
        for name, module in components(pipeline, family).items():
            if name == FAMILIES[family].denoiser_folder:
                latents = torch.randn(2, *TINY_SHAPES[family], generator=draw)
                conditioning = tiny_conditioning(family, 2)
                made[name] = STOCK_CALLS[family](module, latents, torch.tensor([700.0, 30.0]), conditioning)
            else:
                made[name] = module(torch.randint(0, 40, (2, 12), generator=draw)).last_hidden_state
    return made


def draw_weights(pipeline: Any, family: str, seed: int, *, alpha: float | None = None) -> Weights:
    """Draw a LoRA for every second layer of the denoiser, and for the text encoders.

    Args:
        alpha: alpha of all layers; None gives convolutions another one than matrices.
    """
    draw = torch.Generator().manual_seed(seed)
    weights: dict[str, dict[str, Drawn]] = {}
    for component, module in components(pipeline, family).items():
        is_denoiser = component == FAMILIES[family].denoiser_folder
        layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        layers = [(n, layer) for n, layer in layers if is_denoiser or re.search(r"\.(\w_proj|out_proj|fc\d)$", n)]
        layers = [
            (n, layer) for n, layer in layers if not re.search(r"motion_modules.*proj_(in|out)$", n)
        ]  # PEFT fails
        # Stock pipelines need all projections of a text encoder to tell the style of its names.
        for name, layer in [pair for n, pair in enumerate(layers) if n % 2 == seed % 2 or n == 0 or not is_denoiser]:
            shape = layer.weight.shape
            if getattr(layer, "groups", 1) == 1:
                down = torch.randn(RANK, *shape[1:], generator=draw) / layer.weight[0].numel() ** 0.5
                up = torch.randn(shape[0], RANK, *(1,) * (len(shape) - 2), generator=draw) / 4
                weights.setdefault(component, {})[name] = Drawn(down, up, alpha or (6.0 if len(shape) == 2 else 1.5))
    return weights


# ---- writers -------------------------------------------------------------------------------------


def peft_config(layers: Mapping[str, Drawn], **changes: Any) -> LoraConfig:
    alphas = {f"^{re.escape(name)}": drawn.alpha for name, drawn in layers.items() if drawn.alpha != 6.0}
    names = list(layers)
    settings = {"r": RANK, "lora_alpha": 6.0, "alpha_pattern": alphas, "target_modules": names}
    return LoraConfig(**{**settings, **changes})


def halves(layers: Mapping[str, Drawn], a: str = "lora_A.weight", b: str = "lora_B.weight") -> dict[str, Tensor]:
    return {f"{n}.{key}": t for n, d in layers.items() for key, t in ((a, d.down), (b, d.up))}


def save_by_diffusers(
    pipeline: Any, folder: Path, states: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, LoraConfig]
) -> Path:
    """Write a LoRA by the pipeline's `save_lora_weights`, or PixArt's, which has none, as its training script does."""
    if hasattr(pipeline, "save_lora_weights"):
        arguments: dict[str, Any] = {f"{component}_lora_layers": state for component, state in states.items()}
        settings = {f"{component}_lora_adapter_metadata": config.to_dict() for component, config in configs.items()}
        pipeline.save_lora_weights(folder, **arguments, **settings)
    else:
        from diffusers.loaders.lora_base import LoraBaseMixin

        LoraBaseMixin._save_lora_weights(
            folder, states, {c: config.to_dict() for c, config in configs.items()}, True, None, None, True
        )
    return folder / "pytorch_lora_weights.safetensors"


def write_diffusers(pipeline: Any, folder: Path, weights: Weights) -> Path:
    states = {component: halves(layers) for component, layers in weights.items()}
    configs = {component: peft_config(layers) for component, layers in weights.items()}
    return save_by_diffusers(pipeline, folder, states, configs)


def write_without_alpha(pipeline: Any, folder: Path, weights: Weights) -> Path:
    """Write alpha / rank into B."""
    states = {
        c: halves({n: Drawn(d.down, d.up * d.alpha / RANK, RANK) for n, d in ls.items()}) for c, ls in weights.items()
    }
    return save_by_diffusers(pipeline, folder, states, {})


def write_older_diffusers(pipeline: Any, folder: Path, weights: Weights) -> Path:
    """Write the names of 2023: attention layers by their processor, B with alpha / rank."""
    state = {}
    for component, layers in weights.items():
        for name, drawn in layers.items():
            parent, _, last = name.removesuffix(".0").rpartition(".")
            if component.startswith("text_encoder"):
                stem = f"{with_text_model(name)}.lora_linear_layer"
            elif ".attn" in name and last in ("to_q", "to_k", "to_v", "to_out"):
                stem = f"{parent}.processor.{last}_lora"
            else:
                stem = f"{name}.lora"
            state[f"{component}.{stem}.down.weight"] = drawn.down
            state[f"{component}.{stem}.up.weight"] = drawn.up * drawn.alpha / RANK
    return saved(state, folder)


def write_kohya(pipeline: Any, folder: Path, weights: Weights, rename: Callable[[str], str] = str) -> Path:
    """Write diffusers' names with underscores and an alpha for each layer."""
    state = {}
    prefixes = {"unet": "lora_unet_", "transformer": "lora_transformer_", "text_encoder_2": "lora_te2_"}
    prefixes["text_encoder"] = "lora_te1_" if "text_encoder_2" in weights else "lora_te_"
    for component, layers in weights.items():
        renamed = with_text_model if component.startswith("text_encoder") else rename
        for name, drawn in layers.items():
            flat = prefixes[component] + renamed(name).replace(".", "_")
            state |= {f"{flat}.lora_down.weight": drawn.down, f"{flat}.lora_up.weight": drawn.up}
            state[f"{flat}.alpha"] = torch.tensor(drawn.alpha)
    return saved(state, folder)


def write_stability(pipeline: Any, folder: Path, weights: Weights) -> Path:
    """Write the names of Stability's UNet, which kohya trains for SDXL."""
    return write_kohya(pipeline, folder, weights, stability_name)


def write_peft(pipeline: Any, folder: Path, weights: Weights) -> Path:
    """Write the denoiser's LoRA as peft saves it."""
    ((component, layers),) = list(weights.items())[:1]
    model = get_peft_model(getattr(tiny_pipeline_of(pipeline), component), peft_config(layers))
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in halves(layers, "lora_A.default.weight", "lora_B.default.weight").items():
            state[f"base_model.model.{name}"].copy_(tensor)
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(folder))
    return folder / "adapter_model.safetensors"


def tiny_pipeline_of(pipeline: Any) -> Any:
    return tiny_pipeline(next(n for n, f in FAMILIES.items() if type(pipeline).__name__ in f.pipelines))


def with_text_model(name: str) -> str:
    """Return the name of a layer of CLIP in files, which have a level that models of transformers 5 may lack."""
    return f"text_model.{name.removeprefix('text_model.')}"


def saved(state: Mapping[str, Tensor], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def stability_name(name: str) -> str:
    """Return the name of a layer of SDXL's UNet in Stability's own code."""
    whole = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    if name in whole:
        return whole[name]
    side, *numbers_and_rest = name.split(".", 1)
    kind = re.match(r"(?:(\d)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", numbers_and_rest[0])
    assert kind is not None, name
    block, layer, rest = int(kind[1] or 0), int(kind[3]), kind[4]
    rest = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }.get(rest, rest)
    match side, kind[2]:
        case "down_blocks", "downsamplers":
            return f"input_blocks.{3 * (block + 1)}.0.op"
        case "down_blocks", part:
            return f"input_blocks.{1 + 3 * block + layer}.{int(part == 'attentions')}.{rest}"
        case "mid_block", part:
            return f"middle_block.{1 if part == 'attentions' else 2 * layer}.{rest}"
        case _, "upsamplers":
            return f"output_blocks.{3 * block + 2}.2.{rest}"
        case _, part:
            return f"output_blocks.{3 * block + layer}.{int(part == 'attentions')}.{rest}"


# ---- stock ---------------------------------------------------------------------------------------


def stock_outputs(family: str, loras: Sequence[tuple[Path, float]]) -> dict[str, Tensor]:
    """Return the outputs of the stock pipeline after `load_lora_weights` and `set_adapters`."""
    pipeline = tiny_pipeline(family)
    names = [f"lora{number}" for number in range(len(loras))]
    for name, (file, _) in zip(names, loras, strict=True):
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
        else:
            load_by_peft(pipeline.transformer, file, name)
    for module in components(pipeline, family).values():
        set_weights_and_activate_adapters(module, names, [scale for _, scale in loras])
    return outputs(pipeline, family)


def load_by_peft(transformer: nn.Module, file: Path, name: str) -> None:
    """Load a LoRA as the documentation of PixArt does, whose pipeline has no loader."""
    with safe_open(file, framework="pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in settings.items()})
    inject_adapter_in_model(config, transformer, adapter_name=name)
    state = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    set_peft_model_state_dict(transformer, state, name)
