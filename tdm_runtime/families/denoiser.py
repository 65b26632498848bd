"""Base of the denoiser adapters: one signature, and the input for the step count K.

diffusers' `TimestepEmbedding` adds `cond_proj(condition)` to the sinusoid of the timestep. A
pretrained model gets a zero `cond_proj`, so its outputs are unchanged at first (TDM, sec. 3.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdm_runtime.backends.interface import DType, Interface, TensorSpec
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.step_condition import embed_step_count


class Denoiser(nn.Module, ABC):
    """A diffusers denoiser as every backend, trainer and exporter calls it: tensors in, one tensor out.

    It takes one call at a time, because K may reach the model beside its arguments (`PassedCondition`).
    """

    timestep_embedding_name: ClassVar[str]
    """Path of the model's TimestepEmbedding, which K enters."""
    text_dim_name: ClassVar[str]
    """Name in the model's config of the width of the prompt embeddings."""
    saves_step_condition: ClassVar[bool] = False
    """Whether the model's own `save_pretrained` and `from_pretrained` keep the input for K."""
    latent_axes: ClassVar[tuple[str, ...]] = ("height", "width")
    """Names of the axes of a sample's latents after the channels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # nn.Module starts with True
        self.latent_channels: int = model.config.in_channels
        self.patch_size: int = getattr(model.config, "patch_size", 1)
        """Latents per token side; latent height and width are multiples of it."""

    @property
    def text_dim(self) -> int:
        """Width D of the prompt embeddings that the model reads."""
        return int(self.model.config[self.text_dim_name])

    @property
    def further_models(self) -> Mapping[str, nn.Module]:
        """Models beside the first, by the folders that they come from."""
        return {}

    @property
    def fixed_tokens(self) -> int | None:
        """Number of prompt tokens that the model reads, where it reads no other; None where it may differ."""
        return None

    @property
    def timestep_embedding(self) -> Any:
        """Embedding of the timestep that holds `cond_proj`; None there means no input for K."""
        return self.model.get_submodule(self.timestep_embedding_name)

    @property
    def sinusoid_layer(self) -> nn.Linear:
        """Layer that reads the sinusoid of the timestep, and the projected K with it."""
        layer: nn.Linear = self.timestep_embedding.linear_1
        return layer

    @property
    def condition_dim(self) -> int | None:
        """Width of the embedding of K that the model takes; None if it has no input for K."""
        projection = self.timestep_embedding.cond_proj
        return None if projection is None else int(projection.in_features)

    @property
    def reads_step_count(self) -> bool:
        """Whether the model has an input for K."""
        return self.condition_dim is not None

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        step_counts: Tensor | None,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        time_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        reference_tokens: Tensor | None = None,
        reference_positions: Tensor | None = None,
    ) -> Tensor:
        """Predict the model output.

        Args:
            latents: [B, C, H, W]; [B, C, F, H, W] for clips.
            timesteps: whole or fractional, [B].
            step_counts: [B], the K of each sample; unread if the model has no input for it. With None the model
                runs without K, exactly as it was pretrained; teachers are called so.
            prompt_embeds, pooled_prompt_embeds, attention_mask, time_ids, guidance, reference_tokens,
                reference_positions: see `Conditioning`.

        Returns:
            Model output of the latents' shape, of the recipe's prediction type.

        Raises:
            ValueError: the model reads a part of the conditioning that is None.
        """
        texts = (prompt_embeds, pooled_prompt_embeds, attention_mask, time_ids, guidance)
        prompt = Conditioning(*texts, reference_tokens, reference_positions)
        return self.predict(latents, timesteps, self._embedded(step_counts), prompt)

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """Call the model with its family's own arguments; `condition` is the embedded K, [B, condition_dim]."""

    def interface(self, tokens: int | str) -> Interface:
        """Return what `forward` is called with: batch, height, width and frames may differ from call to call.

        Args:
            tokens: L of the prompt embeddings; "tokens" if it may differ from call to call.

        Raises:
            CheckpointError: the model reads a fixed number of tokens, and another one was given.
        """

        def batched(name: str, dtype: DType, shape: Sequence[int | str]) -> TensorSpec:
            return TensorSpec(name, dtype, ("batch", *shape))

        latents: tuple[int | str, ...] = (self.latent_channels, *self.latent_axes)
        return Interface(
            (
                batched("latents", "float32", latents),
                batched("timesteps", "float32", ()),
                batched("step_counts", "int64", ()),
                batched("prompt_embeds", "float32", (tokens, self.text_dim)),
                *(batched(name, dtype, shape) for name, (dtype, shape) in self.conditioning_inputs(tokens).items()),
            ),
            batched("model_output", "float32", latents),
            optional_inputs=tuple(
                batched(name, dtype, shape) for name, (dtype, shape) in self.optional_inputs().items()
            ),
        )

    def conditioning_inputs(self, tokens: int | str) -> Mapping[str, tuple[DType, Sequence[int | str]]]:
        """Return what the model reads beside prompt_embeds, with dtype and shape of one sample.

        The keys are fields of `Conditioning`, in the order of that class.

        Args:
            tokens: see `interface`.
        """
        return {}

    def optional_inputs(self) -> Mapping[str, tuple[DType, Sequence[int | str]]]:
        """Return what only some calls bring, as `conditioning_inputs` does: reference pictures."""
        return {}

    def read_guidance(self) -> None:
        """Make the guidance scale an input, because the recipe names one. Most models that read it always do."""

    def add_step_condition(self, dim: int = 256) -> None:
        """Give the model an input for K that changes no output yet. A model that has such an input keeps it.

        Args:
            dim: width of the embedding of K, even, at least 4.
        """
        if dim < 4 or dim % 2:
            raise ValueError(f"dim is {dim}; the embedding of K has an even width of at least 4")
        if self.condition_dim is not None:
            return
        first = self.sinusoid_layer
        projection = nn.Linear(dim, first.in_features, bias=False, device=first.weight.device, dtype=first.weight.dtype)
        nn.init.zeros_(projection.weight)
        self.timestep_embedding.cond_proj = projection

    def step_condition_state(self) -> dict[str, Tensor]:
        """Return the weights that read K, by their name in the model, copied to the CPU; empty without such an input.

        Models whose `from_pretrained` does not know them (`saves_step_condition`) keep them in a file beside the model.
        """
        if self.condition_dim is None:
            return {}
        return {self._projection_name: self.timestep_embedding.cond_proj.weight.detach().cpu().clone()}

    def load_step_condition(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights of `step_condition_state`; a model without an input for K gets one.

        Raises:
            CheckpointError: the weights belong to another model.
        """
        name, rows = self._projection_name, self.sinusoid_layer.in_features
        if set(state) != {name}:
            raise CheckpointError(
                f"the step condition has the weights {sorted(state)}, {type(self).__name__} reads {[name]}; "
                "load the file that was saved beside this model"
            )
        shape = tuple(state[name].shape)
        allowed = (rows, self.condition_dim or shape[-1])
        if shape != allowed:
            raise CheckpointError(f"{name} has shape {shape}, the model takes {allowed}; load the file of this model")
        self.add_step_condition(shape[1])
        with torch.no_grad():
            self.timestep_embedding.cond_proj.weight.copy_(state[name])

    @property
    def _projection_name(self) -> str:
        return f"{self.timestep_embedding_name}.cond_proj.weight"

    def _embedded(self, step_counts: Tensor | None) -> Tensor | None:
        dim = self.condition_dim
        if step_counts is None or dim is None:
            return None
        return embed_step_count(step_counts, dim).to(self.timestep_embedding.cond_proj.weight.dtype)


class PassedCondition:
    """Passes K to a TimestepEmbedding that its model calls without a condition.

    The hook is permanent and the condition is set for one block only, because torch.compile ignores hooks that come
    and go. Gradient checkpointing recomputes transformer blocks only, which come after the embedding.
    """

    def __init__(self, embedding: nn.Module) -> None:
        self._condition: Tensor | None = None
        embedding.register_forward_pre_hook(self._add, with_kwargs=True)

    @contextmanager
    def during(self, condition: Tensor | None) -> Iterator[None]:
        """Pass `condition` to the embedding within the block. It is cleared afterwards, also after an error."""
        self._condition = condition
        try:
            yield
        finally:
            self._condition = None

    def _add(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return None if self._condition is None else (args, {**kwargs, "condition": self._condition})


def require(name: str, value: Tensor | None, family: str) -> Tensor:
    """Return a part of the conditioning that a family needs.

    Raises:
        ValueError: the part is None.
    """
    if value is None:
        raise ValueError(f"{name} is None; {family} reads it: encode prompts with all text encoders of the checkpoint")
    return value


def require_outputs(model: Any, allowed: tuple[int, ...]) -> None:
    """Check that a model predicts its own latents.

    Raises:
        CheckpointError: it does not. Inpainting and image-to-video models, for example, read a picture too.
    """
    inputs, outputs = model.config.in_channels, getattr(model.config, "out_channels", None)
    if outputs is not None and outputs not in allowed:
        raise CheckpointError(
            f"{type(model).__name__} takes {inputs} channels and gives {outputs}, allowed are "
            f"{' or '.join(map(str, allowed))}; use a text-to-image or text-to-video checkpoint"
        )
