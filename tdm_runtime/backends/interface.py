"""`Interface`: the tensors that a component is called with and those that it returns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ComponentName = Literal["text_encoder", "encoder", "denoiser", "decoder", "tiny_decoder"]
DType = Literal["float32", "int64", "uint8"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an interface."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    """Sizes of the axes. A number is fixed; a named size ("batch", "height", ...) may change from call to call.
    "height_x2" is twice "height"."""

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with its named sizes filled in."""
        named = [(size, 1) if isinstance(size, int) else name_and_factor(size) for size in self.shape]
        return tuple(factor * (size if isinstance(size, int) else sizes[size]) for size, factor in named)


def multiple_of(name: str, factor: int) -> str:
    """Return the name of a size that is always `factor` times another one."""
    return name if factor == 1 else f"{name}_x{factor}"


def name_and_factor(size: str) -> tuple[str, int]:
    """Return the name of the size that `size` is a multiple of, and the factor; the reverse of `multiple_of`."""
    found = re.fullmatch(r"(.+)_x(\d+)", size)
    return (found[1], int(found[2])) if found else (size, 1)


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a component. The first axis of every tensor is the batch."""

    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    further_outputs: tuple[TensorSpec, ...] = ()
    """Outputs after the first: what a decoder of clips keeps for its next part."""
    optional_inputs: tuple[TensorSpec, ...] = ()
    """Further inputs, which a call brings all or none of. Only torch runs them; compiled programs have none."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """All outputs, in order."""
        return (self.output, *self.further_outputs)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of all inputs, in order, the optional ones last."""
        return tuple(spec.name for spec in (*self.inputs, *self.optional_inputs))

    @property
    def size_names(self) -> tuple[str, ...]:
        """Names of the sizes that may change from call to call, each once."""
        names = [name_and_factor(size)[0] for spec in self.inputs for size in spec.shape if isinstance(size, str)]
        return tuple(dict.fromkeys(names))

    @property
    def kept_float32(self) -> frozenset[str]:
        """Inputs that stay float32 at any precision: those that become angles, and those that SDXL joins to them."""
        names = {spec.name for spec in self.inputs}
        joined = {"pooled_prompt_embeds"} if "time_ids" in names else set()
        return frozenset(names & ({"timesteps", "time_ids", "guidance"} | joined))

    def random_inputs(self, sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw inputs like those of a request: normal latents and embeddings, timesteps in [1, 999], K in [1, 4]."""
        return tuple(_random(spec, spec.resolve(sizes), generator) for spec in self.inputs)


def _random(spec: TensorSpec, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    match spec.name:
        case "timesteps":
            return torch.randint(1, 1000, tuple(shape), generator=generator).float()
        case "step_counts":
            return torch.randint(1, 5, tuple(shape), generator=generator)
        case "input_ids":
            return torch.randint(0, 50, tuple(shape), generator=generator)
        case "attention_mask":
            lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
            return (torch.arange(shape[1]) < lengths).long()
        case "guidance":
            return 1 + 4 * torch.rand(tuple(shape), generator=generator)
        case "time_ids":
            return torch.tensor([[512.0, 512.0, 0.0, 0.0, 512.0, 512.0]]).repeat(shape[0], 1)
    return torch.randn(tuple(shape), generator=generator)
