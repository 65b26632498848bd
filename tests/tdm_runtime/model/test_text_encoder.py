"""Prompt embeddings equal those of the stock libraries and are cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.model.components import TextEncoderModule
from tdm_runtime.model.text_encoder import ClipEncoder, TextEncoder

LONG_PROMPT = "a red apple above a green tree " * 20
Parts = tuple[CLIPTokenizer, CLIPTextModel]
MakeEncoder = Callable[..., TextEncoder]


@pytest.fixture(scope="module")
def parts(checkpoint_folder: Path) -> Parts:
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(checkpoint_folder / "tokenizer")
    return tokenizer, open_checkpoint(checkpoint_folder).load_text_model()


@pytest.fixture
def make_encoder(parts: Parts, checkpoint_folder: Path) -> MakeEncoder:
    """Builds encoders, each with its own cache."""
    tokenizer = open_checkpoint(checkpoint_folder).load_tokenizer()
    backend = TorchBackend(TextEncoderModule(parts[1]), torch.device("cpu"))
    return lambda **options: TextEncoder(ClipEncoder(tokenizer, backend), **options)


@pytest.mark.parametrize(
    "prompt",
    [
        "cat",
        "A Red APPLE, two trees!",
        "",
        "   ",
        "красный \U0001f34e 苹果",
        "don't 12345",
        "<|endoftext|>",
        LONG_PROMPT,
    ],
)
def test_encoding_equals_the_stock_tokenizer_and_model(parts: Parts, make_encoder: MakeEncoder, prompt: str) -> None:
    tokenizer, model = parts
    rows = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(rows["input_ids"]).last_hidden_state[0]
    assert torch.equal(make_encoder().encode(prompt).conditioning.prompt_embeds[0], expected)


def test_embeddings_are_finite_float32_of_one_shape(parts: Parts, make_encoder: MakeEncoder) -> None:
    encoder, config = make_encoder(), parts[1].config
    for prompt in ("cat", LONG_PROMPT):
        embeds = encoder.encode(prompt).conditioning.prompt_embeds[0]
        assert embeds.shape == (config.max_position_embeddings, config.hidden_size)
        assert embeds.dtype == torch.float32
        assert torch.isfinite(embeds).all()


def test_different_prompts_have_different_embeddings(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder()
    assert not torch.equal(
        encoder.encode("cat").conditioning.prompt_embeds[0], encoder.encode("dog").conditioning.prompt_embeds[0]
    )


def test_a_long_prompt_is_flagged_and_cut(parts: Parts, make_encoder: MakeEncoder) -> None:
    short, long = make_encoder().encode("cat"), make_encoder().encode(LONG_PROMPT)
    assert not short.is_truncated and long.is_truncated
    assert short.max_tokens == long.max_tokens == parts[1].config.max_position_embeddings
    assert long.num_tokens == len(parts[0](LONG_PROMPT, truncation=False, verbose=False)["input_ids"])


def test_a_prompt_is_truncated_from_the_first_token_that_does_not_fit(parts: Parts, make_encoder: MakeEncoder) -> None:
    encoder, max_tokens = make_encoder(), parts[1].config.max_position_embeddings
    for words in range(1, max_tokens + 2):
        prompt = "cat " * words
        fits = len(parts[0](prompt, truncation=False, verbose=False)["input_ids"]) <= max_tokens
        assert encoder.encode(prompt).is_truncated == (not fits)


def test_a_prompt_seen_before_is_not_encoded_again(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder()
    first = encoder.encode("cat")
    assert (encoder.cache_hits, encoder.cache_misses) == (0, 1)
    assert encoder.encode("cat") is first
    assert (encoder.cache_hits, encoder.cache_misses) == (1, 1)
    encoder.encode("Cat")
    assert (encoder.cache_hits, encoder.cache_misses) == (1, 2)


def test_the_least_recently_used_prompt_is_dropped_first(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(cache_size=2)
    one, two = encoder.encode("one"), encoder.encode("two")
    assert encoder.encode("one") is one
    encoder.encode("three")  # two is the oldest now
    assert encoder.encode("one") is one
    again = encoder.encode("two")
    assert again is not two
    assert torch.equal(again.conditioning.prompt_embeds[0], two.conditioning.prompt_embeds[0])


def test_without_a_cache_every_prompt_is_encoded(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(cache_size=0)
    encoder.encode("cat")
    encoder.encode("cat")
    assert (encoder.cache_hits, encoder.cache_misses) == (0, 2)
