"""Prompts -> what the denoiser reads of them, with an LRU cache."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

from tdm_runtime.backends import Backend
from tdm_runtime.checkpoint.tokenizer import PromptTokenizer
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.family import Family, TextEncoders
from tdm_runtime.families.prompt_weights import Chunk, chunks_of, weighted
from tdm_runtime.params import PromptSyntax


class PromptKey(NamedTuple):
    """What an embedding depends on: prompts of one key share it."""

    text: str
    lora_factor: float = 1.0
    """Factor on what the LoRA of the encoder adds."""
    syntax: PromptSyntax = "plain"
    max_chunks: int = 1
    """Most chunks that the denoiser reads; only for a syntax with chunks."""


MARKS = 2
"""Tokens before and after those of a prompt, for CLIP."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt and its tokens."""

    text: str
    num_tokens: int
    """Number of tokens of the whole prompt, start and end marks included."""
    ids: Sequence[int] = field(default=(), repr=False)
    """Token ids as the encoder reads them; empty where it tokenizes by itself."""
    chunks: Sequence[Chunk] = field(default=(), repr=False)
    """Tokens with weights, in place of `ids`; empty for a prompt that is read as plain words."""
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

    def tokenize(self, prompt: PromptKey) -> TokenizedPrompt:
        """Tokenize a prompt. Any thread may call it.

        Raises:
            InvalidRequestError: its syntax cannot be read.
        """

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

    def tokenize(self, prompt: PromptKey) -> TokenizedPrompt:
        if prompt.syntax == "a1111":
            return _weighted_prompt(prompt, self._tokenizer.pieces, self._tokenizer.max_tokens)
        ids, num_tokens = self._tokenizer.encode(prompt.text)
        return TokenizedPrompt(prompt.text, num_tokens, ids)

    def encode(self, prompts: Sequence[TokenizedPrompt]) -> list[PromptEmbedding]:
        rows = [self._rows(prompt) for prompt in prompts]
        ids = torch.tensor([row for of_prompt in rows for row in of_prompt], device=self.backend.device)
        parts = torch.split(self.backend(ids), [len(of_prompt) for of_prompt in rows])
        most = self._tokenizer.max_tokens
        return [
            PromptEmbedding(Conditioning(weighted(part, prompt.chunks)), prompt.num_tokens, most * len(part))
            for prompt, part in zip(prompts, parts, strict=True)
        ]

    def _rows(self, prompt: TokenizedPrompt) -> list[Sequence[int]]:
        """Return the token ids of each chunk, or of a prompt of plain words."""
        if not prompt.chunks:
            return [prompt.ids]
        return [chunk.framed(*self._tokenizer.frame, self._tokenizer.max_tokens) for chunk in prompt.chunks]


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

    def tokenize(self, prompt: PromptKey) -> TokenizedPrompt:
        def pieces(text: str) -> list[int]:
            ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids

        if prompt.syntax == "a1111":
            return _weighted_prompt(prompt, pieces, self._max_tokens)
        return TokenizedPrompt(prompt.text, len(self._tokenizer(prompt.text, verbose=False)["input_ids"]))

    @torch.inference_mode()
    def encode(self, prompts: Sequence[TokenizedPrompt]) -> list[PromptEmbedding]:
        return [
            PromptEmbedding(
                self._encoded(prompt).to(self._target).float(),
                prompt.num_tokens,
                self._max_tokens * max(1, len(prompt.chunks)),
            )
            for prompt in prompts
        ]

    def _encoded(self, prompt: TokenizedPrompt) -> Conditioning:
        if prompt.chunks:
            return self._family.encode_chunks(prompt.chunks, self._encoders)
        return self._family.encode_prompts([prompt.text], self._encoders)


def _weighted_prompt(prompt: PromptKey, tokenize: Callable[[str], Sequence[int]], max_tokens: int) -> TokenizedPrompt:
    """Tokenize a prompt with weights. Where the denoiser reads one chunk, further tokens are cut.

    Args:
        max_tokens: tokens that the encoder reads at once, marks included.

    Raises:
        InvalidRequestError: the syntax cannot be read, or a denoiser that reads several chunks gets too many.
    """
    chunks = chunks_of(prompt.text, tokenize, max_tokens - MARKS)
    if 1 < prompt.max_chunks < len(chunks):
        most = f"{prompt.max_chunks} of {max_tokens - MARKS} tokens are read"
        raise InvalidRequestError(f"the prompt has {len(chunks)} chunks; at most {most}, shorten it", param="prompt")
    num_tokens = sum(len(chunk.ids) + MARKS for chunk in chunks[: prompt.max_chunks])
    num_tokens += sum(len(chunk.ids) for chunk in chunks[prompt.max_chunks :])
    return TokenizedPrompt(prompt.text, num_tokens, chunks=chunks[: prompt.max_chunks])


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
    mask = prompt.attention_mask
    assert mask is not None, "a family whose prompts differ in length has a mask"
    embeds = functional.pad(prompt.prompt_embeds, (0, 0, 0, missing))
    return replace(prompt, prompt_embeds=embeds, attention_mask=functional.pad(mask, (0, missing)))


class TextEncoder:
    """Encodes prompts and caches the most recent. Only `expect` is thread-safe."""

    def __init__(self, encoder: PromptEncoder, cache_size: int = 1024, reads_lora_factor: bool = False) -> None:
        self.encoder = encoder
        self._cache: OrderedDict[PromptKey, PromptEmbedding] = OrderedDict()
        self._cache_size = cache_size
        self._reads_lora_factor = reads_lora_factor
        self._expected: OrderedDict[PromptKey, TokenizedPrompt] = OrderedDict()
        self.cache_hits = 0
        self.cache_misses = 0

    def expect(self, key: PromptKey) -> bool:
        """Tokenize a prompt that will be encoded soon. Returns False where its embedding is cached.

        Raises:
            InvalidRequestError: its syntax cannot be read.
        """
        if key in self._cache:
            return False
        self._expected[key] = self._tokenize(key)
        if len(self._expected) > max(1, self._cache_size):
            self._expected.popitem(last=False)
        return True

    def encode(self, prompt: str) -> PromptEmbedding:
        """Return the embedding of a prompt of plain words, from the cache if it is there."""
        return self.encode_all([PromptKey(prompt)])[0]

    def encode_all(self, keys: Sequence[PromptKey]) -> list[PromptEmbedding]:
        """Return the embedding of each prompt. Uncached prompts share a call if the encoder is batch-invariant."""
        found = {key: known for key in keys if (known := self._cache.get(key)) is not None}
        missing = list(dict.fromkeys(key for key in keys if key not in found))
        self.cache_hits += len(keys) - len(missing)
        self.cache_misses += len(missing)
        size = max(1, len(missing)) if self.encoder.is_batch_invariant else 1
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            tokenized = [self._tokenized(key) for key in part]
            found |= zip(part, self.encoder.encode(tokenized), strict=True)
        for key in keys:
            self._cache[key] = found[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return [found[key] for key in keys]

    def key(
        self, prompt: str, lora_factor: float = 1.0, syntax: PromptSyntax = "plain", max_chunks: int = 1
    ) -> PromptKey:
        """Return the key of a prompt, without what its embedding does not depend on."""
        factor = lora_factor if self._reads_lora_factor else 1.0
        return PromptKey(prompt, factor, syntax, max_chunks if syntax == "a1111" else 1)

    def _tokenized(self, key: PromptKey) -> TokenizedPrompt:
        expected: TokenizedPrompt | None = self._expected.pop(key, None)  # another thread may have just dropped it
        return self._tokenize(key) if expected is None else expected

    def _tokenize(self, key: PromptKey) -> TokenizedPrompt:
        return replace(self.encoder.tokenize(key), lora_factor=key.lora_factor)
