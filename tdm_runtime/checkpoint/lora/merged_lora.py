"""LoRAs merged into the weights of a model at load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tdm_runtime.checkpoint.lora.lora_file import LoraFile, LoraLayer
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.denoiser import Denoiser

LoraTarget = nn.Linear | nn.Conv2d
"""Layers that LoRAs change."""


def merge_loras(modules: Mapping[str, nn.Module], loras: Sequence[tuple[LoraFile, float]]) -> None:
    """Change the weights of modules as LoRAs at a scale each change their outputs.

    LoRAs add up. A DoRA also multiplies what LoRAs before it added, as in PEFT, so its place in the order matters.

    Args:
        modules: Component (`unet`, `transformer`, `text_encoder`, ...) -> a module of diffusers or transformers, or a
            `Denoiser`, which also receives the weights that read K. Parts of a LoRA for other components are unread.

    Raises:
        CheckpointError: a LoRA belongs to another base. No weight is changed then.
    """
    models = {name: module.model if isinstance(module, Denoiser) else module for name, module in modules.items()}
    fitted = {
        component: [(fitting_layers(file, component, model), scale) for file, scale in loras]
        for component, model in models.items()
    }
    conditions = [file for file, _ in loras if file.step_condition]
    if len(conditions) > 1:
        raise CheckpointError(
            f"{conditions[0].path} and {conditions[1].path} both bring weights that read K; a model has room for one"
        )
    for component, model in models.items():
        targets = lora_targets(model)
        for name in dict.fromkeys(name for layers, _ in fitted[component] for name in layers):
            layer = targets[name]
            merge(layer, [(update_of(f[name], layer), scale) for f, scale in fitted[component] if name in f])
    for denoiser in modules.values():
        if isinstance(denoiser, Denoiser) and conditions:
            denoiser.load_step_condition(conditions[0].step_condition)


def lora_targets(module: nn.Module) -> dict[str, LoraTarget]:
    """Return the layers of a module that LoRAs can change, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraTarget)}


def fitting_layers(file: LoraFile, component: str, module: nn.Module) -> dict[str, LoraLayer]:
    """Return what a LoRA changes in a module, by the names and in the shapes of the module's layers.

    Raises:
        CheckpointError: the LoRA belongs to another base.
    """
    targets = lora_targets(module)
    # Models of transformers before 5 had a level `text_model`, which files keep.
    names = {prefix + name: name for name in targets for prefix in ("text_model.", "")}
    # Files of older diffusers say `to_out.0` for every `to_out`, and FLUX.2 has layers of both names.
    names |= {f"{name}.0": target for name, target in names.items() if name.endswith("to_out")}
    names |= {name.replace(".", "_"): target for name, target in names.items()}
    layers = file.layers.get(component, {})
    matched = {given: names.get(given, names.get(layer.flat_name or "")) for given, layer in layers.items()}
    if strangers := [given for given, name in matched.items() if name is None]:
        raise CheckpointError(
            f"{file.path} changes {strangers[0][:100]!r}, which this base does not have ({len(strangers)} of "
            f"{len(layers)} layers of its {component}); use the base of the LoRA"
        )
    found = {name: layers[given] for given, name in matched.items() if name is not None}
    return {name: _fitting(file, name, layer, targets[name]) for name, layer in found.items()}


def _fitting(file: LoraFile, name: str, layer: LoraLayer, target: LoraTarget) -> LoraLayer:
    """Return a layer of a LoRA in the shape of its target: files may write 1x1 convolutions as matrices."""
    shape, down, up = target.weight.shape, layer.down, layer.up
    if 2 in (down.ndim, len(shape)) and down[0].numel() == target.weight[0].numel():
        down = down.reshape(-1, *shape[1:])
    given = (up.shape[0], *down.shape[1:])
    if given != tuple(shape) or up.numel() != up.shape[0] * down.shape[0]:
        raise CheckpointError(
            f"{file.path} changes {name} of shape {given}, here it has {tuple(shape)}; use the base of the LoRA"
        )
    if getattr(target, "groups", 1) != 1 or (layer.bias is not None and target.bias is None):
        what = "a bias, which this layer lacks" if layer.bias is not None else "a grouped convolution"
        raise CheckpointError(f"{file.path} changes {name} by {what}; use the base of the LoRA")
    return replace(layer, down=down, up=up.reshape(*up.shape[:1], -1, *(1,) * (len(shape) - 2)))


@dataclass(frozen=True)
class Dora:
    """Norms that a DoRA gives the rows of a changed weight W + s up down, s being the scale."""

    magnitude: Tensor
    """Norms that were trained, [out]."""
    squares: tuple[Tensor, Tensor, Tensor]
    """|W|^2, 2 W . (up down) and |up down|^2 of each row, [out] each."""

    def factor(self, scales: Tensor) -> Tensor:
        """Return the trained norms over those of the changed weight, [N, out], at scales [N]."""
        constant, linear, square = self.squares
        return self.magnitude / (constant + scales[:, None] * (linear + scales[:, None] * square)).sqrt()


@dataclass(frozen=True)
class Update:
    """What a LoRA at a scale s adds to the output y of a layer with bias b.

    It is f s (up(down(x)) + bias) + (f - 1) (y - b), where f is 1, or the factor of a DoRA at s.
    """

    down: Tensor
    """[rank, in], of a convolution [rank, in, h, w]."""
    up: Tensor
    """[out, rank], of a convolution [out, rank, 1, 1]; alpha / rank is multiplied in."""
    bias: Tensor | None
    """[out]; alpha / rank is multiplied in."""
    dora: Dora | None
    """Float32 at any dtype of the others."""

    def to(self, dtype: torch.dtype) -> Update:
        """Return the update in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Update(self.down.to(dtype), self.up.to(dtype), bias, self.dora)


@torch.no_grad()
def update_of(layer: LoraLayer, target: LoraTarget) -> Update:
    """Return the float32 update of a layer, on the layer's device.

    Args:
        layer: as `fitting_layers` returns it.
    """
    device = target.weight.device
    down, up = layer.down.to(device).float(), layer.up.to(device).float() * layer.scaling
    bias = None if layer.bias is None else layer.bias.to(device).float() * layer.scaling
    if layer.magnitude is None:
        return Update(down, up, bias, None)
    weight, change = target.weight.float().flatten(1), up.flatten(1) @ down.flatten(1)
    squares = ((weight * weight).sum(1), 2 * (weight * change).sum(1), (change * change).sum(1))
    return Update(down, up, bias, Dora(layer.magnitude.to(device).float(), squares))


@torch.no_grad()
def merge(target: LoraTarget, updates: Sequence[tuple[Update, float]]) -> None:
    """Change weight and bias of a layer so that its output has updates at a scale each, one after the other."""
    weight, bias = target.weight.float().flatten(1), torch.zeros(len(target.weight), device=target.weight.device)
    for update, scale in updates:
        weight = weight + scale * (update.up.flatten(1) @ update.down.flatten(1))
        bias = bias if update.bias is None else bias + scale * update.bias
        if update.dora is not None:
            factor = update.dora.factor(weight.new_tensor([scale]))[0]
            weight, bias = weight * factor[:, None], bias * factor
    target.weight.copy_(weight.reshape(target.weight.shape))
    if target.bias is not None:
        target.bias += bias.to(target.bias)
