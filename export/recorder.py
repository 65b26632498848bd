"""Calls of components as real pictures or clips make them, from which quantisation takes its ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from tdm_runtime.backends import Backend
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.parity import compared_frames
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

Call = Mapping[str, NDArray[Any]]
"""Input name -> array, for one call."""


class Recorder:
    """Backend that records the inputs of its calls."""

    def __init__(self, backend: Backend, names: Sequence[str]) -> None:
        """
        Args:
            names: of the inputs, in their order.
        """
        self.device = backend.device
        self.is_batch_invariant = backend.is_batch_invariant
        self._backend = backend
        self._names = names
        self.calls: list[Call] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        arrays = [tensor.cpu().numpy().copy() for tensor in inputs]
        self.calls.append(dict(zip(self._names, arrays, strict=True)))
        return self._backend(*inputs)


def make_each(model: LoadedModel, prompts: Sequence[str]) -> None:
    """Make one picture or short clip of each prompt at the first native size, cycling through all step counts."""
    recipe = model.recipe
    width, height = recipe.native_sizes[0]
    for seed, prompt in enumerate(prompts):
        steps = recipe.step_counts[seed % len(recipe.step_counts)]
        generate(model, SamplingParams(prompt, seed, steps, width, height, frames=compared_frames(recipe)))
