"""`Conditioning`: what a denoiser reads about a batch beside its latents and timesteps."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Prompts of a batch, encoded. Fields that a family does not read stay None."""

    prompt_embeds: Tensor
    """[B, L, D]."""
    pooled_prompt_embeds: Tensor | None = None
    """[B, P]; SDXL and SD3."""
    attention_mask: Tensor | None = None
    """[B, L], 1 where a token is read and 0 where it is padding; PixArt, Z-Image, SANA."""
    time_ids: Tensor | None = None
    """[B, 6]: original height, width, crop top, left, target height, width, in pixels; SDXL."""
    guidance: Tensor | None = None
    """[B], guidance scale that the model was distilled to read, such as 3.5; FLUX.1-dev, SANA-Sprint, LCM."""
    reference_tokens: Tensor | None = None
    """[B, N, C], latents of the reference pictures, one token each; FLUX.2."""
    reference_positions: Tensor | None = None
    """int64 [B, N, axes], positions of these tokens. They are the same in every sample of a call."""

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        """Return the samples at an index tensor [N], a mask [B] or a slice, always as a batch."""
        prompt_embeds, *rest = self.tensors()
        return Conditioning(prompt_embeds[index], *(None if t is None else t[index] for t in rest))

    def tensors(self) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
        """Return the fields in the order of a denoiser's `forward`."""
        rest = (self.pooled_prompt_embeds, self.attention_mask, self.time_ids, self.guidance)
        return self.prompt_embeds, *rest, self.reference_tokens, self.reference_positions

    @classmethod
    def cat(cls, first: Conditioning, second: Conditioning) -> Conditioning:
        """Return one batch, `first` before `second`.

        Raises:
            ValueError: a field is None in one of the two only.
        """
        joined: list[Tensor | None] = []
        for field, a, b in zip(fields(cls), first.tensors(), second.tensors(), strict=True):
            if (a is None) != (b is None):
                raise ValueError(
                    f"{field.name} is given by the {'second' if a is None else 'first'} conditioning only; "
                    "encode both with the same text encoders"
                )
            joined.append(None if a is None or b is None else torch.cat([a, b]))
        prompt_embeds, *rest = joined
        assert prompt_embeds is not None
        return cls(prompt_embeds, *rest)

    def expand(self, count: int) -> Conditioning:
        """Return a batch of one sample, repeated without a copy.

        Raises:
            ValueError: the batch has more than one sample.
        """
        if len(self) != 1:
            raise ValueError(
                f"a batch of one can be expanded, this one has {len(self)} samples; index one with [i:i+1]"
            )
        prompt_embeds, *rest = self.tensors()
        repeated = (None if t is None else t.expand(count, *t.shape[1:]) for t in rest)
        return Conditioning(prompt_embeds.expand(count, *prompt_embeds.shape[1:]), *repeated)

    def float(self) -> Conditioning:
        """Return a copy with float32 in place of other floating-point numbers."""
        prompt_embeds, *rest = self.tensors()
        floats = (t.float() if t is not None and t.is_floating_point() else t for t in rest)
        return Conditioning(prompt_embeds.float(), *floats)

    def to(self, device: torch.device | str) -> Conditioning:
        """Return a copy on another device."""
        prompt_embeds, *rest = self.tensors()
        return Conditioning(prompt_embeds.to(device), *(None if t is None else t.to(device) for t in rest))
