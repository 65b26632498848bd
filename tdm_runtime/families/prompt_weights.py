"""Prompts with weighted words in the syntax of AUTOMATIC1111's web interface, for CLIP text encoders.

`(word)` weighs 1.1, `((word))` 1.21, `(word:1.3)` 1.3 and `[word]` 1 / 1.1. An opening bracket that nothing closes
reaches to the end; a closing one that nothing opened is literal, and so is a bracket behind a backslash. `BREAK` ends
a chunk.

A chunk is what the encoder reads at once, 75 tokens between two marks for CLIP. Its hidden states are multiplied by
the weights of their tokens and then scaled as a whole, so that their mean is what it was ("Original" emphasis there;
`lpw_stable_diffusion` of diffusers does the same). Chunks are concatenated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdm_runtime.errors import InvalidRequestError

ROUND, SQUARE = 1.1, 1 / 1.1
"""Weights of a pair of brackets."""
NEGLIGIBLE = 1e-5
"""Mean of hidden states that is rounding alone, in parts of their root mean square: such states are not scaled back."""
MAX_WEIGHT = 10.0
"""Largest weight of a word, either way."""
MAX_CHUNKS = 8
"""Most chunks of a prompt on any model, 600 tokens of CLIP."""
LORA_TAG = re.compile(r"<lora:([^:<>]+)(?::([^<>]*))?>", re.IGNORECASE)
"""`<lora:NAME:SCALE>`."""
BREAK = re.compile(r"\s*\bBREAK\b\s*")
_MARK = re.compile(
    r"\\(?P<literal>[()\[\]\\]?)|(?P<bracket>[()\[\]])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)", re.ASCII
)


@dataclass(frozen=True)
class WeightedText:
    """Words of one weight."""

    text: str
    weight: float


@dataclass(frozen=True)
class Chunk:
    """What a text encoder reads at once."""

    ids: tuple[int, ...]
    """Token ids without marks and padding."""
    weights: tuple[float, ...]
    """Weight of each token."""

    def framed(self, start: int, end: int, pad: int, length: int) -> list[int]:
        """Return its ids between the two marks, padded to a length."""
        return [start, *self.ids, end] + [pad] * (length - len(self.ids) - 2)


def parse_weights(prompt: str) -> list[WeightedText]:
    """Return the texts of a prompt with their weights, in order. Neighbours of one weight are joined.

    Raises:
        InvalidRequestError: a weight is larger than `MAX_WEIGHT`.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def add(text: str) -> None:
        texts.append(text)
        weights.append(1.0)

    def weigh(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    position = 0
    for mark in _MARK.finditer(prompt):
        add(prompt[position : mark.start()])
        position = mark.end()
        bracket = mark["bracket"]
        if mark["literal"] is not None:
            add(mark["literal"])  # a backslash before anything else is dropped
        elif bracket in opened:
            opened[bracket].append(len(texts))
        elif (closed := opened["[" if bracket == "]" else "("]) == []:
            add(mark[0])
        elif mark["weight"] is not None:
            weigh(closed.pop(), float(mark["weight"]))
        else:
            weigh(closed.pop(), SQUARE if bracket == "]" else ROUND)
    add(prompt[position:])
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[bracket]:
            weigh(start, factor)
    return list(_joined(texts, weights))


def _joined(texts: Sequence[str], weights: Sequence[float]) -> Iterator[WeightedText]:
    text, before = "", 1.0
    for part, weight in zip(texts, weights, strict=True):
        if not part:
            continue
        if not abs(weight) <= MAX_WEIGHT:
            message = f"a weight in the prompt is {weight:g}; give -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, such as 1.3"
            raise InvalidRequestError(message, param="prompt")
        if weight != before and text:
            yield WeightedText(text, before)
            text = ""
        text, before = text + part, weight
    yield WeightedText(text, before)


def chunks_of(prompt: str, tokenize: Callable[[str], Sequence[int]], room: int) -> list[Chunk]:
    """Return the chunks of a prompt, at least one.

    Args:
        tokenize: returns the token ids of a text, without marks.
        room: most tokens of a chunk.

    Raises:
        InvalidRequestError: the prompt names a LoRA, or a weight is too large.
    """
    if (tag := LORA_TAG.search(prompt)) is not None:
        message = f"the prompt names the LoRA {tag[1][:64]!r}; take it out, and add the LoRA to the model (--lora FILE)"
        raise InvalidRequestError(message, param="prompt")
    groups: list[list[tuple[int, float]]] = [[]]
    for part in parse_weights(prompt):
        for number, text in enumerate(BREAK.split(part.text)):
            if number:
                groups.append([])
            groups[-1] += [(token, part.weight) for token in tokenize(text)]
    if len(groups) > 1 and not groups[-1]:
        groups.pop()
    parts = [group[start : start + room] for group in groups for start in range(0, max(1, len(group)), room)]
    return [Chunk(tuple(token for token, _ in part), tuple(weight for _, weight in part)) for part in parts]


def weighted(embeds: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    """Return the embeddings of a prompt, [1, N L, D], from the hidden states of its N chunks, [N, L, D]."""
    if any(weight != 1.0 for chunk in chunks for weight in chunk.weights):
        weights = torch.ones(embeds.shape[:2])  # marks and padding weigh 1
        for row, chunk in zip(weights, chunks, strict=True):
            row[1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights)
        scaled = embeds.float() * weights[..., None].to(embeds.device)
        before, after = (states.mean((1, 2), keepdim=True) for states in (embeds.float(), scaled))
        least = NEGLIGIBLE * scaled.square().mean((1, 2), keepdim=True).sqrt()
        is_noise = torch.minimum(before.abs(), after.abs()) <= least  # their ratio would mean nothing
        embeds = scaled * torch.where(is_noise, 1.0, before / after)
    return embeds.flatten(0, 1)[None]
