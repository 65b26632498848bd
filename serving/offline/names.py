"""Names of pictures from a template. A name never leaves the output folder, whatever the line says."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

from serving.errors import APIError, invalid

NUMBERS = ("line", "index", "seed", "steps", "width", "height", "frames")
TEXTS = ("id", "source", "variant", "model", "prompt", "sweep")
DEFAULT_TEMPLATE = "{line:08d}{variant}"
DEFAULT_TEMPLATE_OF_FILES = "{source}-{line:08d}{variant}"
MAX_VALUE_BYTES = 80
MAX_COMPONENT_BYTES = 200
"""Longest name of a file or folder, in bytes of UTF-8; most file systems allow 255."""
KEPT = frozenset("-_=+")


@dataclass(frozen=True)
class NameTemplate:
    """Template of names, such as "{model}/{id}-{seed}". A slash makes folders.

    Raises:
        ValueError: a field is unknown, or the name would leave the output folder or be hidden.
    """

    text: str

    def __post_init__(self) -> None:
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(f"--name is {self.text!r}: {error}") from None
        for _, field, spec, conversion in parts:
            if field is None:
                continue
            if field not in NUMBERS + TEXTS or conversion or (spec and field not in NUMBERS):
                known = ", ".join(NUMBERS + TEXTS)
                raise ValueError(f"--name has the field {{{field}}}; known are {known}, numbers as {{line:08d}}")
        try:
            self.path(dict.fromkeys(NUMBERS, 1), dict.fromkeys(TEXTS, "x"))
        except (APIError, ValueError) as error:
            raise ValueError(f"--name is {self.text!r}: {error}") from None

    def path(self, numbers: Mapping[str, int], texts: Mapping[str, str]) -> str:
        """Return the name of a picture without its suffix, relative to the output folder.

        Raises:
            APIError: 400, the name is too long.
        """
        path = self.text.format(**numbers, **{name: safe(value) for name, value in texts.items()})
        for component in path.split("/"):
            if not component or component.startswith(".") or any(mark in component for mark in "\\\0:"):
                raise invalid(f"the name {path[:80]!r} is not inside the output folder", None, "invalid_value")
            if (num_bytes := len(component.encode())) > MAX_COMPONENT_BYTES:
                message = f"the name {path[:40]!r}... has {num_bytes} bytes; at most {MAX_COMPONENT_BYTES} are allowed"
                raise invalid(message, None, "invalid_value")
        return path


def safe(value: str) -> str:
    """Return a value as a part of a file name: letters, digits and -_=+, at most `MAX_VALUE_BYTES` long."""
    kept = "".join(character if character.isalnum() or character in KEPT else "_" for character in value[:200])
    return kept.encode()[:MAX_VALUE_BYTES].decode(errors="ignore")
