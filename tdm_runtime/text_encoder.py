"""Prompt -> prompt embeddings, with an LRU cache."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class PromptEmbedding:
    """One prompt as the denoiser reads it."""

    prompt_embeds: Tensor
    """[L, D]."""
    num_tokens: int
    """Of the whole prompt, start and end marks counted in."""
    max_tokens: int
    """What the text encoder reads; tokens beyond are cut."""

    @property
    def is_truncated(self) -> bool:
        return self.num_tokens > self.max_tokens


class TextEncoder:
    """Encodes prompts one text model call at a time. Not thread-safe: tokenizers are not re-entrant."""

    def __init__(
        self, tokenizer: CLIPTokenizer, model: CLIPTextModel, device: torch.device, cache_size: int = 1024
    ) -> None:
        self._tokenizer = tokenizer
        self._model = model.to(device)
        self._device = device
        self._cache: OrderedDict[str, PromptEmbedding] = OrderedDict()
        self._cache_size = cache_size
        self.cache_hits = 0
        self.cache_misses = 0

    def encode(self, prompt: str) -> PromptEmbedding:
        """Return a prompt's embedding, from the cache where it was seen lately."""
        if (known := self._cache.get(prompt)) is not None:
            self._cache.move_to_end(prompt)
            self.cache_hits += 1
            return known
        self.cache_misses += 1
        embedding = self._encode(prompt)
        self._cache[prompt] = embedding
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return embedding

    @torch.inference_mode()
    def _encode(self, prompt: str) -> PromptEmbedding:
        max_tokens = self._tokenizer.model_max_length
        ids = self._tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
        kept = ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], self._tokenizer.eos_token_id]
        padded = kept + [self._tokenizer.pad_token_id] * (max_tokens - len(kept))
        output = self._model(torch.tensor([padded], device=self._device)).last_hidden_state[0]
        return PromptEmbedding(output, num_tokens=len(ids), max_tokens=max_tokens)
