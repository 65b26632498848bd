"""LoRAs on a base: one copy of the base's weights, any number of LoRAs, and a LoRA for each sample of a call.

The output of a layer is W x + scale * alpha / rank * B A x (Hu et al. 2021, eq. 3), with A, B and scale of the sample;
`Update` also has what DoRA changes. So a LoRA is added, replaced or removed without compiling anything and without
copying the base, and each sample of a call may have its own scale.
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
from tdm_runtime.checkpoint.lora.merged_lora import LoraTarget, Update, fitting_layers, lora_targets, update_of
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.call import ADAPTERS, LORA_FACTORS
from tdm_runtime.model.components import load_component
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.text_encoder import (
    ClipEncoder,
    PipelineEncoder,
    PromptEmbedding,
    PromptEncoder,
    PromptKey,
    TextEncoder,
    TokenizedPrompt,
)

TEXT_ENCODER: ComponentName = "text_encoder"
"""The text encoder of a model that has CLIP alone."""
Loras = Sequence[tuple[LoraFile, float]]
"""LoRAs that change a model together, each with its scale."""
Updates = Mapping[str, Sequence[tuple[Update, float]]]
"""Layer -> what is added to its output, each at a scale."""
Rows = Mapping[int, tuple[Tensor, Tensor]]
"""Number of a LoRA -> indices of its samples in a call, int64 [N], and their factors on its scales, float32 [N]."""


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
        self._samples: Rows = {}
        """The samples of the running call."""
        for name, layer in self._targets.items():
            layer.register_forward_hook(self._hook(name))

    @contextmanager
    def during(self, samples: Rows) -> Iterator[None]:
        """Apply LoRAs in the calls that are made inside this context. Every sample of a call has one."""
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
        found: dict[str, list[tuple[Update, float]]] = {}
        for file, scale in loras:
            for name, layer in fitting_layers(file, component, self._module).items():
                update = update_of(layer, self._targets[name]).to(self._dtype)
                found.setdefault(name, []).append((update, scale))
        return found

    def add(self, number: int, updates: Updates) -> None:
        """Serve a LoRA, or several as one, from the next call on."""
        self._adapters[number] = updates

    def remove(self, number: int) -> None:
        """Forget a LoRA that no sample uses any more."""
        self._adapters.pop(number, None)

    def _hook(self, name: str) -> Any:
        def add_loras(layer: LoraTarget, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
            for number, (samples, factors) in self._samples.items():
                if updates := self._adapters[number].get(name, ()):
                    rows, of_rows = self._rows(samples, factors, len(output))
                    for update, scale in updates:
                        addition = added(layer, inputs[0][rows], output[rows], update, scale * of_rows)
                        output = output.index_add(0, rows, addition)
            return output

        return add_loras

    def _rows(self, samples: Tensor, factors: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return the rows of a layer's input that belong to some samples, and the factor of each row.

        Models of clips flatten [B, F, ...].
        """
        each, rest = divmod(length, sum(len(indices) for indices, _ in self._samples.values()))
        assert each and not rest, f"a layer of {length} rows cannot be divided among the samples"
        rows = (samples[:, None] * each + torch.arange(each, device=samples.device)).flatten()
        return rows, factors.repeat_interleave(each)


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
        self.backend = TorchBackend(module, device, dtype, threads, interface)
        """Runs the module with the LoRAs of `layers.during`."""
        self.inputs = (ADAPTERS, LORA_FACTORS, *interface.input_names)
        """Names of the inputs, in order."""
        self.layers = LoraLayers(module.get_submodule("model"), dtype)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the module with the tensors of `inputs`."""
        adapters, factors, *usual = inputs
        samples = {number: (adapters == number).nonzero()[:, 0] for number in set(adapters.tolist())}
        with self.layers.during({number: (indices, factors[indices]) for number, indices in samples.items()}):
            return self.backend(*usual)


def added(layer: LoraTarget, inputs: Tensor, output: Tensor, update: Update, scales: Tensor) -> Tensor:
    """Return what an update adds to the output of a layer; A uses the stride and padding of its layer.

    Args:
        inputs, output: Of the layer, [N, ...].
        scales: float32 [N].
    """

    def spread(values: Tensor) -> Tensor:
        """Shape values of each row or channel, [N or 1, 1 or out], like the output."""
        rows, channels = values.shape
        between, behind = (0, 2) if isinstance(layer, nn.Conv2d) else (output.ndim - 2, 0)
        return values.to(output.dtype).reshape(rows, *(1,) * between, channels, *(1,) * behind)

    if isinstance(layer, nn.Conv2d):
        inside = nn.functional.conv2d(inputs, update.down, None, layer.stride, layer.padding, layer.dilation)
        addition = nn.functional.conv2d(inside, update.up)
    else:
        addition = nn.functional.linear(nn.functional.linear(inputs, update.down), update.up)
    if update.bias is not None:
        addition = addition + spread(update.bias[None])
    addition = spread(scales[:, None]) * addition
    if update.dora is None:
        return addition
    factor, bias = update.dora.factor(scales), 0 if layer.bias is None else spread(layer.bias[None])
    return spread(factor) * addition + spread(factor - 1) * (output - bias)


class LoraTextEncoder:
    """Text encoders with one LoRA. Each prompt is encoded alone; other models use the same encoders without it."""

    is_batch_invariant = True
    shares_calls = False

    def __init__(self, encoder: PromptEncoder, device: torch.device, layers: Sequence[LoraLayers], number: int) -> None:
        """
        Args:
            device: Device of the text encoders.
            layers: Layers of each text encoder that the LoRA changes.
        """
        self._encoder = encoder
        self._device = device
        self._layers = layers
        self._number = number

    def tokenize(self, prompt: PromptKey) -> TokenizedPrompt:
        return self._encoder.tokenize(prompt)

    def encode(self, prompts: Sequence[TokenizedPrompt]) -> list[PromptEmbedding]:
        return [self._encoded(prompt) for prompt in prompts]

    def _encoded(self, prompt: TokenizedPrompt) -> PromptEmbedding:
        first = torch.zeros(1, dtype=torch.int64, device=self._device)
        only = {self._number: (first, torch.tensor([prompt.lora_factor], device=self._device))}
        with ExitStack() as during:
            for layers in self._layers:
                during.enter_context(layers.during(only))
            return self._encoder.encode([prompt])[0]


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
        # The scale of one LoRA is a factor that requests may change.
        alone = loras[0][1] if len(loras) == 1 else None
        scaled = loras if alone is None else [(loras[0][0], 1.0)]
        components = dict.fromkeys(component for file, _ in loras for component in file.layers)
        updates = {component: self._layers(component).updates(component, scaled) for component in components}
        identity = "".join(f"\n{file.sha256}\n{at!r}" for file, at in loras)
        digest = hashlib.sha256(f"{self.model.digest}{identity}".encode()).hexdigest()
        self._last_number += 1
        return PreparedLora(name, self._last_number, digest, alone, updates)

    def attach(self, lora: PreparedLora) -> LoadedModel:
        """Serve a prepared LoRA from the next call on."""
        for component, updates in lora.updates.items():
            self._layers(component).add(lora.number, updates)
        denoiser = self._bank(self._denoiser)
        denoiser.layers.add(lora.number, lora.updates.get(self._denoiser, {}))
        return replace(
            self.model,
            recipe=replace(self.model.recipe, name=lora.name, lora_scale=lora.scale),
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
        encoder: PromptEncoder = self.model.text_encoder.encoder
        if isinstance(encoder, PipelineEncoder):
            device = encoder.device
        else:  # the base may run a compiled one
            backend = self._bank(TEXT_ENCODER).backend
            encoder, device = ClipEncoder(self._checkpoint.load_tokenizer(), backend), backend.device
        layers = [self._layers(component) for component in components]
        return TextEncoder(LoraTextEncoder(encoder, device, layers, lora.number), reads_lora_factor=True)

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
    scale: float | None
    """Scale of requests that name none; None where several LoRAs have their fixed scales."""
    updates: Mapping[str, Updates] = field(repr=False)
    """Component -> layer -> what is added to its output."""
