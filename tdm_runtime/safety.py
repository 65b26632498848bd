"""Checks of prompts and pictures: a list of blocked words, and a hook for a checker of your own."""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.model.decoder import Pixels

REFUSED = "content_policy_violation"
"""Code of the errors."""


class SafetyChecker(Protocol):
    """Returns why a prompt or picture is refused, or None to allow it. Called from any thread."""

    def check_prompt(self, prompt: str) -> str | None:
        """Check a prompt before its pictures are made."""

    def check_picture(self, pixels: Pixels) -> str | None:
        """Check a picture or preview, uint8 [H, W, 3], before it is sent."""


class BlockedWords:
    """Refuses prompts that contain a word of a list. Case, accents and spacing make no difference."""

    def __init__(self, words: Sequence[str]) -> None:
        """
        Raises:
            ValueError: the list is empty.
        """
        folded = sorted({text for word in words if (text := _folded(word))}, key=len, reverse=True)
        if not folded:
            raise ValueError("the list of blocked words is empty; write one a line, or leave it out")
        self._pattern = re.compile("|".join(map(_pattern, folded)))

    def check_prompt(self, prompt: str) -> str | None:
        return "a word that this server does not draw" if self._pattern.search(_folded(prompt)) else None

    def check_picture(self, pixels: Pixels) -> str | None:
        return None


UNSPACED_SCRIPTS = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ")
"""Begin of the Unicode names of letters that are written without spaces between words."""


def _pattern(word: str) -> str:
    """Return the pattern of a word: alone where letters and digits have spaces around words, anywhere in other text."""

    def is_spaced(character: str) -> bool:
        return character.isalnum() and not unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS)

    before, behind = (r"(?<!\w)" if is_spaced(word[0]) else ""), (r"(?!\w)" if is_spaced(word[-1]) else "")
    return f"{before}{re.escape(word)}{behind}"


def _folded(text: str) -> str:
    """Return the text without case, accents, full-width letters, invisible characters and repeated spaces."""
    parts = unicodedata.normalize("NFKD", text.casefold())
    kept = (part for part in parts if unicodedata.category(part) not in ("Mn", "Cf"))
    return " ".join("".join(kept).split())


class Safety:
    """All checkers of a server."""

    def __init__(self, checkers: Sequence[SafetyChecker] = ()) -> None:
        self._checkers = checkers

    @classmethod
    def load(cls, blocked_words: Path | None, safety_checker: str | None) -> Safety:
        """Create the checkers of a server.

        Args:
            blocked_words: file with one word a line, in UTF-8; None is no such list.
            safety_checker: MODULE:FACTORY of a `SafetyChecker`; None is no such checker.

        Raises:
            ValueError: a checker cannot be created; the message says why.
        """
        checkers: list[SafetyChecker] = []
        if blocked_words is not None:
            checkers.append(BlockedWords(_lines(blocked_words)))
        if safety_checker is not None:
            checkers.append(_made(safety_checker))
        return cls(checkers)

    @property
    def is_on(self) -> bool:
        """Whether the server has any checker."""
        return bool(self._checkers)

    def check_prompt(self, prompt: str) -> None:
        """
        Raises:
            InvalidRequestError: with the code `content_policy_violation`.
        """
        for checker in self._checkers:
            if reason := checker.check_prompt(prompt):
                raise InvalidRequestError(f"the prompt holds {reason}; ask for another", param="prompt", code=REFUSED)

    def check_picture(self, pixels: Pixels) -> None:
        """
        Raises:
            InvalidRequestError: with the code `content_policy_violation`.
        """
        for checker in self._checkers:
            if reason := checker.check_picture(pixels):
                message = f"the picture shows {reason}; ask for another, or take another seed"
                raise InvalidRequestError(message, param="prompt", code=REFUSED)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); write one word a line, in UTF-8") from None


def _made(name: str) -> SafetyChecker:
    """Import MODULE:FACTORY and call it."""
    module, _, factory = name.partition(":")
    try:
        checker: SafetyChecker = getattr(importlib.import_module(module), factory)()
        if not (callable(checker.check_prompt) and callable(checker.check_picture)):
            raise TypeError("check_prompt and check_picture are not both functions")
    except Exception as error:
        raise ValueError(f"the safety checker {name!r} cannot be made: {type(error).__name__}: {error}") from error
    return checker
