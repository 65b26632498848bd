"""What tests of the emoji model's stages share."""

from __future__ import annotations

import pytest
from transformers import CLIPTokenizer

from training.emoji.data.glyphs import load_glyphs
from training.emoji.data.text import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    """Tokenizer of the captions, which is trained once."""
    return train_tokenizer(load_glyphs())
