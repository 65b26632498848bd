"""Prompts -> what the denoiser reads of them, with an LRU cache."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.nn import functional

from tdm_runtime.backends import Backend
from tdm_runtime.checkpoint.tokenizer import PromptTokenizer
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.family import Family, TextEncoders


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt and its tokens."""

    text: str
    num_tokens: int
    """Number of tokens of the whole prompt, start and end marks included."""
    ids: Sequence[int] = field(default=(), repr=False)
    """Token ids as the encoder reads them; empty where it tokenizes by itself."""
    lora_factor: float = 1.0
    """Factor on what the LoRA of the encoder adds."""


@dataclass(frozen=True)
class PromptEmbedding:
    """Embedding of one prompt."""

    conditioning: Conditioning
    """A batch of one."""
    num_tokens: int
    """Number of tokens of the whole prompt, start and end marks included."""
    max_tokens: int
    """Number of tokens that the text encoder reads; further tokens are cut."""

    @property
    def is_truncated(self) -> bool:
        return self.num_tokens > self.max_tokens


class PromptEncoder(Protocol):
    """Runs the text encoders of a checkpoint."""

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a prompt's embedding has the same bits alone and in any batch."""

    @property
    def shares_calls(self) -> bool:
        """Whether several prompts take less time in one call than one after the other."""

    def tokenize(self, prompt: str) -> TokenizedPrompt:
        """Tokenize a prompt. Any thread may call it."""

    def encode(self, prompts: Sequence[TokenizedPrompt]) -> list[PromptEmbedding]:
        """Encode prompts in one call."""


class ClipEncoder:
    """One CLIP text encoder on any backend, as Stable Diffusion has it."""

    def __init__(self, tokenizer: PromptTokenizer, backend: Backend) -> None:
        self.backend = backend
        self._tokenizer = tokenizer

    @property
    def is_batch_invariant(self) -> bool:
        return self.backend.is_batch_invariant

    @property
    def shares_calls(self) -> bool:
        return self.backend.is_batch_invariant  # otherwise `TextEncoder` encodes one after the other

    def tokenize(self, prompt: str) -> TokenizedPrompt:
        ids, num_tokens = self._tokenizer.encode(prompt)
        return TokenizedPrompt(prompt, num_tokens, ids)

    def encode(self, prompts: Sequence[TokenizedPrompt]) -> list[PromptEmbedding]:
        embeds = self.backend(torch.tensor([prompt.ids for prompt in prompts], device=self.backend.device))
        return [
            PromptEmbedding(Conditioning(embeds[n : n + 1]), prompt.num_tokens, self._tokenizer.max_tokens)
            for n, prompt in enumerate(prompts)
        ]


class PipelineEncoder:
    """The text encoders of a stock pipeline, run by torch. Each prompt is encoded alone, and in float32 afterwards."""

    is_batch_invariant = True
    shares_calls = False

    def __init__(self, family: Family, encoders: TextEncoders, device: torch.device | None = None) -> None:
        """
        Args:
            device: Device of the embeddings; None is that of the text encoders.
        """
        self._family = family
        self._target = encoders.device if device is None else device
        self._encoders = encoders
        self._tokenizer = copy.deepcopy(family.tokenizer(encoders))
        """Copy of the tokenizer whose encoder reads the most, to count tokens. The pipeline's own one runs on the
        engine's thread, where it changes its settings for padding."""
        self._max_tokens = family.max_tokens(encoders)

    @property
    def device(self) -> torch.device:
        """Device of the text encoders."""
        return self._encoders.device

    def module(self, component: str) -> Any:
        """Return a text encoder of transformers by its folder; None if the checkpoint came without it."""
        return getattr(self._encoders.pipeline, component)

    def tokenize(self, prompt: str) -> TokenizedPrompt:
        return TokenizedPrompt(prompt, len(self._tokenizer(prompt, verbose=False)["input_ids"]))

    @torch.inference_mode()
    def encode(self, prompts: Sequence[TokenizedPrompt]) -> list[PromptEmbedding]:
        found = (self._family.encode_prompts([prompt.text], self._encoders) for prompt in prompts)
        return [
            PromptEmbedding(conditioning.to(self._target).float(), prompt.num_tokens, self._max_tokens)
            for prompt, conditioning in zip(prompts, found, strict=True)
        ]


def stacked(prompts: Sequence[Conditioning]) -> Conditioning:
    """Return one batch of batches of one. One comes back as it is, without a copy.

    Prompts of different lengths are padded at the end; their `attention_mask` hides the padding.
    """
    if len(prompts) == 1:
        return prompts[0]
    longest = max(prompt.prompt_embeds.shape[1] for prompt in prompts)
    rows = [_padded(prompt, longest).tensors() for prompt in prompts]
    embeds, *rest = ([part for part in parts if part is not None] for parts in zip(*rows, strict=True))
    return Conditioning(torch.cat(embeds), *(torch.cat(parts) if parts else None for parts in rest))


def _padded(prompt: Conditioning, tokens: int) -> Conditioning:
    missing = tokens - prompt.prompt_embeds.shape[1]
    if missing == 0:
        return prompt
    embeds, pooled, mask, *rest = prompt.tensors()
    assert mask is not None, "a family whose prompts differ in length has a mask"
    return Conditioning(functional.pad(embeds, (0, 0, 0, missing)), pooled, functional.pad(mask, (0, missing)), *rest)


PromptKey = tuple[str, float]
"""A prompt, and the factor on what the LoRA of the encoder adds."""


class TextEncoder:
    """Encodes prompts and caches the most recent. Only `expect` is thread-safe.

    Methods take a prompt and a factor on what the LoRA of the encoder adds, which other encoders do not read.
    """

    def __init__(self, encoder: PromptEncoder, cache_size: int = 1024, reads_lora_factor: bool = False) -> None:
        self.encoder = encoder
        self._cache: OrderedDict[PromptKey, PromptEmbedding] = OrderedDict()
        self._cache_size = cache_size
        self._reads_lora_factor = reads_lora_factor
        self._expected: OrderedDict[PromptKey, TokenizedPrompt] = OrderedDict()
        self.cache_hits = 0
        self.cache_misses = 0

    def expect(self, prompt: str, lora_factor: float = 1.0) -> bool:
        """Tokenize a prompt that will be encoded soon. Returns False where its embedding is cached."""
        key = self.key(prompt, lora_factor)
        if key in self._cache:
            return False
        self._expected[key] = self._tokenize(key)
        if len(self._expected) > max(1, self._cache_size):
            self._expected.popitem(last=False)
        return True

    def encode(self, prompt: str, lora_factor: float = 1.0) -> PromptEmbedding:
        """Return the embedding of a prompt, from the cache if it is there."""
        return self.encode_all([prompt], [lora_factor])[0]

    def encode_all(self, prompts: Sequence[str], lora_factors: Sequence[float] = ()) -> list[PromptEmbedding]:
        """Return the embedding of each prompt. Uncached prompts share a call if the encoder is batch-invariant.

        Args:
            lora_factors: one of each prompt; 1 each where left out.
        """
        keys = [self.key(*each) for each in zip(prompts, lora_factors or [1.0] * len(prompts), strict=True)]
        found = {key: known for key in keys if (known := self._cache.get(key)) is not None}
        missing = list(dict.fromkeys(key for key in keys if key not in found))
        self.cache_hits += len(keys) - len(missing)
        self.cache_misses += len(missing)
        size = max(1, len(missing)) if self.encoder.is_batch_invariant else 1
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            tokenized = [self._expected.pop(key) if key in self._expected else self._tokenize(key) for key in part]
            found |= zip(part, self.encoder.encode(tokenized), strict=True)
        for key in keys:
            self._cache[key] = found[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return [found[key] for key in keys]

    def key(self, prompt: str, lora_factor: float = 1.0) -> PromptKey:
        """Return what an embedding depends on: prompts of one key share it."""
        return prompt, lora_factor if self._reads_lora_factor else 1.0

    def _tokenize(self, key: PromptKey) -> TokenizedPrompt:
        prompt, lora_factor = key
        return replace(self.encoder.tokenize(prompt), lora_factor=lora_factor)
