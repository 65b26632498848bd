"""LoRAs on a base: one copy of the base's weights, any number of LoRAs, and a LoRA for each sample of a call.

The output of a layer is W x + scale * alpha / rank * B A x (Hu et al. 2021, eq. 3), with A and B of the sample's LoRA.
So a LoRA is added, replaced or removed without compiling anything and without copying the base.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tdm_runtime.backends.interface import Interface
from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.checkpoint.lora_file import DENOISER, TEXT_ENCODER, LoraFile, LoraLayer
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.call import ADAPTERS
from tdm_runtime.model.components import load_component
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.text_encoder import ClipEncoder, TextEncoder


class AdapterBank:
    """A torch module whose linear and convolutional layers add the LoRA of each sample.

    Not thread-safe: LoRAs are added and removed between calls.
    """

    is_batch_invariant = False

    def __init__(self, module: nn.Module, interface: Interface, device: torch.device, threads: int | None) -> None:
        """
        Args:
            threads: CPU threads of a call; None leaves the calling thread's setting alone.
        """
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device = device
        self.name = f"torch {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
        self._dtype = dtype
        self._backend = TorchBackend(module, device, dtype, threads, interface)
        self.inputs = (*(spec.name for spec in interface.inputs), ADAPTERS)
        """Names of the inputs, in order."""
        modules = module.get_submodule("model").named_modules()
        self._layers = {name: layer for name, layer in modules if isinstance(layer, nn.Linear | nn.Conv2d)}
        self._flat_names = {name.replace(".", "_"): name for name in self._layers}
        self._adapters: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        self._rows: dict[int, Tensor] = {}
        """Number of a LoRA -> indices of its samples in the running call."""
        for name, layer in self._layers.items():
            layer.register_forward_hook(self._hook(name))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the module with the tensors of `inputs`."""
        *usual, adapters = inputs
        self._rows = {number: (adapters == number).nonzero()[:, 0] for number in set(adapters.tolist())}
        try:
            return self._backend(*usual)
        finally:
            self._rows = {}

    def match(self, file: LoraFile, layers: Mapping[str, LoraLayer], scale: float) -> dict[str, tuple[Tensor, Tensor]]:
        """Match the layers of a LoRA with those of this module, and check their shapes.

        Raises:
            CheckpointError: the LoRA belongs to another model.
        """
        matched = {}
        for given, layer in layers.items():
            name = given if given in self._layers else self._flat_names.get(given.removeprefix("text_model_"))
            if name is None:
                raise CheckpointError(
                    f"{file.path} changes {given[:100]!r}, which this base does not have; use the base of the LoRA"
                )
            assert layer.down is not None and layer.up is not None, "read_lora leaves no halves"
            self._check_shape(file, name, layer.down, layer.up)
            up = scale * layer.up
            matched[name] = (layer.down.to(self.device, self._dtype), up.to(self.device, self._dtype))
        return matched

    def add(self, number: int, layers: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Serve a LoRA from the next call on."""
        self._adapters[number] = dict(layers)

    def remove(self, number: int) -> None:
        """Forget a LoRA that no sample uses any more."""
        self._adapters.pop(number, None)

    def _check_shape(self, file: LoraFile, name: str, down: Tensor, up: Tensor) -> None:
        layer = self._layers[name]
        shape = tuple(layer.weight.shape)
        given = (up.shape[0], *down.shape[1:])
        if given != shape or up.shape[1] != down.shape[0]:
            raise CheckpointError(
                f"{file.path} changes {name} of shape {given}, here it has {shape}; use the base of the LoRA"
            )

    def _hook(self, name: str) -> Any:
        def add_lora(layer: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> Tensor | None:
            for number, rows in self._rows.items():
                if (weights := self._adapters[number].get(name)) is not None:
                    output = output.index_add(0, rows, _delta(layer, inputs[0][rows], *weights))
            return output

        return add_lora


def _delta(layer: nn.Module, inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return B A x; A uses the stride and padding of its layer."""
    if isinstance(layer, nn.Conv2d):
        inside = nn.functional.conv2d(inputs, down, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return nn.functional.conv2d(inside, up)
    return nn.functional.linear(nn.functional.linear(inputs, down), up)


class OneAdapter:
    """A backend that runs a bank with one LoRA for all samples."""

    is_batch_invariant = False

    def __init__(self, bank: AdapterBank, number: int) -> None:
        self.device = bank.device
        self._bank = bank
        self._number = number

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._bank(*inputs, torch.full((len(inputs[0]),), self._number, device=self.device))


class LoraBase:
    """A model that takes LoRAs. Any thread may call `prepare`; only the engine's thread `attach` and `detach`."""

    def __init__(self, checkpoint: Checkpoint, model: LoadedModel, threads: int | None = None) -> None:
        """
        Args:
            model: The base. LoRAs share its decoders and, unless they change it, its text encoder.
            threads: CPU threads of a denoiser call.
        """
        self.model = model
        self._checkpoint = checkpoint
        self._threads = threads
        self._banks: dict[str, AdapterBank] = {}
        self._last_number = 0

    def prepare(self, name: str, file: LoraFile, scale: float) -> PreparedLora:
        """Check a LoRA against the base and copy it to the device.

        Raises:
            CheckpointError: the LoRA belongs to another base, or `scale` is not finite.
        """
        if not math.isfinite(scale):
            raise CheckpointError(f"the scale of {name} is {scale}; give a finite number, 1 is as trained")
        layers = {part: self._bank(part).match(file, found, scale) for part, found in file.layers.items()}
        digest = hashlib.sha256(f"{self.model.digest}\n{file.sha256}\n{scale!r}".encode()).hexdigest()
        self._last_number += 1
        return PreparedLora(name, self._last_number, digest, layers)

    def attach(self, lora: PreparedLora) -> LoadedModel:
        """Serve a prepared LoRA from the next call on."""
        for part, layers in lora.layers.items():
            self._bank(part).add(lora.number, layers)
        denoiser = self._bank(DENOISER)
        denoiser.add(lora.number, lora.layers.get(DENOISER, {}))
        text_encoder = self.model.text_encoder
        if TEXT_ENCODER in lora.layers:
            tokenizer = self._checkpoint.load_tokenizer()
            text_encoder = TextEncoder(ClipEncoder(tokenizer, OneAdapter(self._bank(TEXT_ENCODER), lora.number)))
        return replace(
            self.model,
            recipe=replace(self.model.recipe, name=lora.name),
            digest=lora.digest,
            backend=denoiser.name,
            text_encoder=text_encoder,
            denoiser=denoiser,
            denoiser_inputs=denoiser.inputs,
            parity={},
            choice="",
            base=self.model.name,
            adapter=lora.number,
        )

    def detach(self, model: LoadedModel) -> None:
        """Remove a LoRA that no sample uses any more."""
        assert model.adapter is not None, "only a LoRA can be taken from its base"
        for bank in self._banks.values():
            bank.remove(model.adapter)

    def _bank(self, part: str) -> AdapterBank:
        if part not in self._banks:
            module, interface = load_component(self._checkpoint, "denoiser" if part == DENOISER else "text_encoder")
            self._banks[part] = AdapterBank(module, interface, self._device, self._threads)
        return self._banks[part]

    @property
    def _device(self) -> torch.device:
        return self.model.denoiser.device


@dataclass(frozen=True)
class PreparedLora:
    """A LoRA that fits its base."""

    name: str
    number: int
    digest: str
    """sha256 of base, file and scale."""
    layers: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]] = field(repr=False)
    """Component -> layer -> A and scale * alpha / rank * B."""
