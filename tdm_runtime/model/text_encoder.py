"""Prompt embeddings, with an LRU cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdm_runtime.backends import Backend
from tdm_runtime.checkpoint.tokenizer import PromptTokenizer
from tdm_runtime.families.conditioning import Conditioning


@dataclass(frozen=True)
class PromptEmbedding:
    """Embedding of one prompt."""

    prompt_embeds: Tensor
    """[L, D]."""
    num_tokens: int
    """Number of tokens of the whole prompt, start and end marks included."""
    max_tokens: int
    """Number of tokens that the text encoder reads; further tokens are cut."""

    @property
    def is_truncated(self) -> bool:
        return self.num_tokens > self.max_tokens


def conditioning_of(prompts: Sequence[PromptEmbedding]) -> Conditioning:
    """Return the conditioning of a batch. One prompt gives a view, without a copy."""
    embeds = [prompt.prompt_embeds for prompt in prompts]
    return Conditioning(embeds[0][None] if len(embeds) == 1 else torch.stack(embeds))


class TextEncoder:
    """Encodes prompts and caches the most recent. Only `expect` is thread-safe."""

    def __init__(self, tokenizer: PromptTokenizer, backend: Backend, cache_size: int = 1024) -> None:
        self.backend = backend
        self._tokenizer = tokenizer
        self._cache: OrderedDict[str, PromptEmbedding] = OrderedDict()
        self._cache_size = cache_size
        self._tokens: OrderedDict[str, tuple[list[int], int]] = OrderedDict()
        """Token ids and token counts of expected prompts."""
        self.cache_hits = 0
        self.cache_misses = 0

    def expect(self, prompt: str) -> bool:
        """Tokenize a prompt that will be encoded soon. Returns False where its embedding is cached."""
        if prompt in self._cache:
            return False
        self._tokens[prompt] = self._tokenizer.encode(prompt)
        if len(self._tokens) > max(1, self._cache_size):
            self._tokens.popitem(last=False)
        return True

    def encode(self, prompt: str) -> PromptEmbedding:
        """Return the embedding of a prompt, from the cache if it is there."""
        return self.encode_all([prompt])[0]

    def encode_all(self, prompts: Sequence[str]) -> list[PromptEmbedding]:
        """Return the embedding of each prompt. Uncached prompts share a call if the backend is batch-invariant."""
        found = {prompt: known for prompt in prompts if (known := self._cache.get(prompt)) is not None}
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in found))
        self.cache_hits += len(prompts) - len(missing)
        self.cache_misses += len(missing)
        size = max(1, len(missing)) if self.backend.is_batch_invariant else 1
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            found |= zip(part, self._encode(part), strict=True)
        for prompt in prompts:
            self._cache[prompt] = found[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return [found[prompt] for prompt in prompts]

    def _encode(self, prompts: Sequence[str]) -> list[PromptEmbedding]:
        expected = {prompt: self._tokens.pop(prompt) for prompt in prompts if prompt in self._tokens}
        tokens = [expected.get(prompt) or self._tokenizer.encode(prompt) for prompt in prompts]
        embeds = self.backend(torch.tensor([ids for ids, _ in tokens], device=self.backend.device))
        return [
            PromptEmbedding(embeds[n], num_tokens, self._tokenizer.max_tokens)
            for n, (_, num_tokens) in enumerate(tokens)
        ]
