"""Tokenizer of a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer


class PromptTokenizer:
    """Gives the token ids that transformers gives for the same folder, without importing transformers."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, end_id: int, pad_id: int) -> None:
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._end_id = end_id
        self._pad_id = pad_id

    @property
    def frame(self) -> tuple[int, int, int]:
        """Ids of the start mark, of the end mark and of padding."""
        return self._tokenizer.encode("").ids[0], self._end_id, self._pad_id

    @classmethod
    def load(cls, folder: Path) -> PromptTokenizer:
        """Read tokenizer.json and tokenizer_config.json; or vocab.json and merges.txt, by transformers.

        Raises:
            OSError, ValueError, KeyError: a file is missing, broken or incomplete.
        """
        if not (folder / "tokenizer.json").is_file():
            from transformers import CLIPTokenizer

            stock = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            return cls(stock.backend_tokenizer, stock.model_max_length, stock.eos_token_id, stock.pad_token_id)
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))

        def token_id(name: str) -> int:
            token = config[name] if isinstance(config[name], str) else config[name]["content"]
            if (found := tokenizer.token_to_id(token)) is None:
                raise ValueError(f"{name} {token!r} is not in the vocabulary")
            return int(found)

        return cls(tokenizer, int(config["model_max_length"]), token_id("eos_token"), token_id("pad_token"))

    def pieces(self, text: str) -> list[int]:
        """Return the token ids of a text, without marks and padding."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, prompt: str) -> tuple[list[int], int]:
        """Return exactly `max_tokens` token ids and the number of tokens that the whole prompt has."""
        ids = self._tokenizer.encode(prompt).ids
        kept = ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], self._end_id]
        return kept + [self._pad_id] * (self.max_tokens - len(kept)), len(ids)
