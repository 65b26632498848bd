"""LoRAs on a base: one copy of the base's weights, any number of LoRAs, and a LoRA for each sample of a call.

The output of a layer is W x + scale * alpha / rank * B A x (Hu et al. 2021, eq. 3), with A and B of the sample's LoRA;
`Update` also has what DoRA changes. So a LoRA is added, replaced or removed without compiling anything and without
copying the base.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tdm_runtime.backends.interface import ComponentName, Interface
from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.checkpoint.lora.lora_file import STEP_CONDITION_FILE, LoraFile
from tdm_runtime.checkpoint.lora.merged_lora import LoraTarget, Update, fitting_layers, lora_targets, update_at
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.call import ADAPTERS
from tdm_runtime.model.components import load_component
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.text_encoder import (
    ClipEncoder,
    PipelineEncoder,
    PromptEmbedding,
    TextEncoder,
    TokenizedPrompt,
)

TEXT_ENCODER: ComponentName = "text_encoder"
"""The text encoder of a model that has CLIP alone."""
Loras = Sequence[tuple[LoraFile, float]]
"""LoRAs that change a model together, each with its scale."""
Updates = Mapping[str, Sequence[Update]]
"""Layer -> what is added to its output."""


class LoraLayers:
    """The linear and convolutional layers of a module, which add the LoRA of each sample to their output.

    Not thread-safe: LoRAs are added and removed between calls.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """
        Args:
            module: A module of diffusers or transformers.
            dtype: Its dtype when it is called.
        """
        self._module = module
        self._dtype = dtype
        self._targets = lora_targets(module)
        self._adapters: dict[int, Updates] = {}
        self._samples: Mapping[int, Tensor] = {}
        """Number of a LoRA -> indices of its samples in the running call."""
        for name, layer in self._targets.items():
            layer.register_forward_hook(self._hook(name))

    @contextmanager
    def during(self, samples: Mapping[int, Tensor]) -> Iterator[None]:
        """Apply LoRAs in the calls that are made inside this context.

        Args:
            samples: Number of a LoRA -> indices of its samples. Every sample of a call has one.
        """
        self._samples = samples
        try:
            yield
        finally:
            self._samples = {}

    def updates(self, component: str, loras: Loras) -> Updates:
        """Return what LoRAs at a scale each add to the layers of this module, on its device.

        Args:
            component: name of the module in LoRA files.

        Raises:
            CheckpointError: a LoRA belongs to another model.
        """
        found: dict[str, list[Update]] = {}
        for file, scale in loras:
            for name, layer in fitting_layers(file, component, self._module).items():
                found.setdefault(name, []).append(update_at(layer, scale, self._targets[name]).to(self._dtype))
        return found

    def add(self, number: int, updates: Updates) -> None:
        """Serve a LoRA, or several as one, from the next call on."""
        self._adapters[number] = updates

    def remove(self, number: int) -> None:
        """Forget a LoRA that no sample uses any more."""
        self._adapters.pop(number, None)

    def _hook(self, name: str) -> Any:
        def add_loras(layer: LoraTarget, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
            for number, samples in self._samples.items():
                if updates := self._adapters[number].get(name, ()):
                    rows = self._rows(samples, len(output))
                    for update in updates:
                        output = output.index_add(0, rows, added(layer, inputs[0][rows], output[rows], update))
            return output

        return add_loras

    def _rows(self, samples: Tensor, length: int) -> Tensor:
        """Return the rows of a layer's input that belong to some samples: models of clips flatten [B, F, ...]."""
        each, rest = divmod(length, sum(map(len, self._samples.values())))
        assert each and not rest, f"a layer of {length} rows cannot be divided among the samples"
        return (samples[:, None] * each + torch.arange(each, device=samples.device)).flatten()


class AdapterBank:
    """A torch module that runs the LoRA of each sample of a call."""

    is_batch_invariant = False

    def __init__(self, module: nn.Module, interface: Interface, device: torch.device, threads: int | None) -> None:
        """
        Args:
            threads: CPU threads of a call; None leaves the calling thread's setting alone.
        """
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device = device
        self.name = f"torch {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
        self._backend = TorchBackend(module, device, dtype, threads, interface)
        self.inputs = (*(spec.name for spec in interface.inputs), ADAPTERS)
        """Names of the inputs, in order."""
        self.layers = LoraLayers(module.get_submodule("model"), dtype)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the module with the tensors of `inputs`."""
        *usual, adapters = inputs
        samples = {number: (adapters == number).nonzero()[:, 0] for number in set(adapters.tolist())}
        with self.layers.during(samples):
            return self._backend(*usual)


def added(layer: LoraTarget, inputs: Tensor, output: Tensor, update: Update) -> Tensor:
    """Return what an update adds to the output of a layer; A uses the stride and padding of its layer."""

    def by_channel(values: Tensor) -> Tensor:
        return values.reshape(-1, 1, 1) if isinstance(layer, nn.Conv2d) else values

    if isinstance(layer, nn.Conv2d):
        inside = nn.functional.conv2d(inputs, update.down, None, layer.stride, layer.padding, layer.dilation)
        addition = nn.functional.conv2d(inside, update.up)
    else:
        addition = nn.functional.linear(nn.functional.linear(inputs, update.down), update.up)
    if update.gain is not None:
        bias = 0 if layer.bias is None else by_channel(layer.bias)
        addition = addition + by_channel(update.gain) * (output - bias)
    return addition if update.bias is None else addition + by_channel(update.bias)


class OneAdapter:
    """A backend that runs a bank with one LoRA for all samples."""

    is_batch_invariant = False

    def __init__(self, bank: AdapterBank, number: int) -> None:
        self.device = bank.device
        self._bank = bank
        self._number = number

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._bank(*inputs, torch.full((len(inputs[0]),), self._number, device=self.device))


class LoraTextEncoder:
    """The text encoders of a stock pipeline with one LoRA. Other models use them without it."""

    is_batch_invariant = True
    shares_calls = False

    def __init__(self, encoder: PipelineEncoder, layers: Sequence[LoraLayers], number: int) -> None:
        """
        Args:
            layers: Layers of each text encoder that the LoRA changes.
        """
        self._encoder = encoder
        self._layers = layers
        self._number = number

    def tokenize(self, prompt: str) -> TokenizedPrompt:
        return self._encoder.tokenize(prompt)

    def encode(self, prompts: Sequence[TokenizedPrompt]) -> list[PromptEmbedding]:
        only = {self._number: torch.zeros(1, dtype=torch.int64, device=self._encoder.device)}
        with ExitStack() as during:
            for layers in self._layers:
                during.enter_context(layers.during(only))
            return self._encoder.encode(prompts)  # which encodes each prompt alone


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
        self._denoiser = checkpoint.family.denoiser_folder
        self._threads = threads
        self._banks: dict[str, AdapterBank] = {}
        """Component -> modules that only LoRAs use: the base may run compiled ones."""
        self._texts: dict[str, LoraLayers] = {}
        """Component -> layers of a text encoder that LoRAs and base share."""
        self._last_number = 0

    def prepare(self, name: str, loras: Loras) -> PreparedLora:
        """Check LoRAs against the base and copy them to the device.

        Raises:
            CheckpointError: a LoRA belongs to another base or reads K, or a scale is not finite.
        """
        for file, scale in loras:
            if not math.isfinite(scale):
                raise CheckpointError(f"the scale of {name} is {scale}; give a finite number, 1 is as trained")
            if file.step_condition:
                raise CheckpointError(
                    f"{file.path} was trained with weights that read K ({STEP_CONDITION_FILE} beside it), which LoRAs "
                    "that are added at run time cannot change; serve its folder as a model"
                )
        components = dict.fromkeys(component for file, _ in loras for component in file.layers)
        updates = {component: self._layers(component).updates(component, loras) for component in components}
        identity = "".join(f"\n{file.sha256}\n{scale!r}" for file, scale in loras)
        digest = hashlib.sha256(f"{self.model.digest}{identity}".encode()).hexdigest()
        self._last_number += 1
        return PreparedLora(name, self._last_number, digest, updates)

    def attach(self, lora: PreparedLora) -> LoadedModel:
        """Serve a prepared LoRA from the next call on."""
        for component, updates in lora.updates.items():
            self._layers(component).add(lora.number, updates)
        denoiser = self._bank(self._denoiser)
        denoiser.layers.add(lora.number, lora.updates.get(self._denoiser, {}))
        return replace(
            self.model,
            recipe=replace(self.model.recipe, name=lora.name),
            digest=lora.digest,
            backend=denoiser.name,
            text_encoder=self._text_encoder(lora),
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
        for layers in (*(bank.layers for bank in self._banks.values()), *self._texts.values()):
            layers.remove(model.adapter)

    def _text_encoder(self, lora: PreparedLora) -> TextEncoder:
        """Return the text encoder of a LoRA: that of the base, unless the LoRA changes it."""
        components = [component for component in lora.updates if component != self._denoiser]
        if not components:
            return self.model.text_encoder
        encoder = self.model.text_encoder.encoder
        if isinstance(encoder, PipelineEncoder):
            layers = [self._layers(component) for component in components]
            return TextEncoder(LoraTextEncoder(encoder, layers, lora.number))
        tokenizer = self._checkpoint.load_tokenizer()
        return TextEncoder(ClipEncoder(tokenizer, OneAdapter(self._bank(TEXT_ENCODER), lora.number)))

    def _layers(self, component: str) -> LoraLayers:
        """Return the layers of a component that LoRAs change.

        Raises:
            CheckpointError: the base has no such text encoder.
        """
        encoder = self.model.text_encoder.encoder
        if component == self._denoiser or not isinstance(encoder, PipelineEncoder):
            return self._bank(component).layers
        if component not in self._texts:
            module = encoder.module(component)
            if module is None:
                raise CheckpointError(
                    f"the LoRA changes {component}, which {self.model.name} does not have; use the base of the LoRA"
                )
            if not lora_targets(module):
                raise CheckpointError(
                    f"the LoRA changes {component}, which runs at int8 and takes no LoRA; serve it with "
                    "--text-encoder-precision bf16, fp8 or fp32"
                )
            self._texts[component] = LoraLayers(module, module.dtype)
        return self._texts[component]

    def _bank(self, component: str) -> AdapterBank:
        if component not in self._banks:
            part: ComponentName = "denoiser" if component == self._denoiser else TEXT_ENCODER
            self._banks[component] = AdapterBank(
                *load_component(self._checkpoint, part), self.model.denoiser.device, self._threads
            )
        return self._banks[component]


@dataclass(frozen=True)
class PreparedLora:
    """A LoRA, or several as one, that fits its base."""

    name: str
    number: int
    digest: str
    """sha256 of base, files and scales."""
    updates: Mapping[str, Updates] = field(repr=False)
    """Component -> layer -> what is added to its output."""
