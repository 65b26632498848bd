"""Text part of the embedded model: its BPE vocabulary and a small CLIP text model."""

from __future__ import annotations

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.emoji.data.glyphs import Glyph
from training.emoji.data.scenes import BACKGROUNDS, caption, sample_scene

MAX_TOKENS = 32
VOCABULARY_SIZE = 1536
SPECIAL_TOKENS = ["<|startoftext|>", "<|endoftext|>"]


def train_tokenizer(glyphs: tuple[Glyph, ...]) -> CLIPTokenizer:
    """Learn a byte-level BPE on captions. It can encode any text, and words of captions become few tokens."""
    rng = random.Random(0)
    corpus = [caption(sample_scene(glyphs, 0, index), rng) for index in range(20000)]
    corpus += [name for glyph in glyphs for name in glyph.names] * 10 + sorted(BACKGROUNDS) * 100
    stock = CLIPTokenizer()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = stock.backend_tokenizer.normalizer
    bpe.pre_tokenizer = stock.backend_tokenizer.pre_tokenizer
    bytes_alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS + bytes_alphabet + [f"{c}</w>" for c in bytes_alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained text model, prompt_embeds [B, 32, 128]."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Return token ids [B, 32], padded or truncated."""
    rows = tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    ids: Tensor = rows["input_ids"]
    return ids.to(torch.long)


GRID_PROMPTS = (
    "a red heart",
    "a cat face on a yellow background",
    "a red heart left of a butterfly on a blue background",
    "a small rocket at the top on a purple background",
    "a big strawberry on a pink background",
    "a penguin above a pizza on a green background",
    "an elephant next to a tree",
    "a yellow star on a black background",
)
