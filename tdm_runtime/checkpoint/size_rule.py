"""`SizeRule`: which sizes a model makes beside the ones that it was trained at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tdm_runtime.errors import RecipeError

MAX_SIDE = 16384


@dataclass(frozen=True)
class SizeRule:
    """Every size whose sides are multiples of a number, within limits."""

    multiple: int
    """Width and height are multiples of it, in pixels."""
    min_side: int
    """Smallest width or height, in pixels; a multiple of `multiple`."""
    max_side: int
    """Largest width or height, in pixels; a multiple of `multiple`."""
    max_pixels: int
    """Largest product of width and height."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise RecipeError(f"{name} of the size rule is {value!r}; it must be a whole number of at least 1")
        if not self.min_side <= self.max_side <= MAX_SIDE or self.min_side % self.multiple:
            raise RecipeError(
                f"the size rule has sides from {self.min_side} to {self.max_side} in multiples of {self.multiple}; "
                f"give multiples, the smaller first, of at most {MAX_SIDE}"
            )
        if self.max_pixels < self.min_side**2:
            raise RecipeError(
                f"max_pixels of the size rule is {self.max_pixels}; it must be at least min_side squared, "
                f"{self.min_side**2}"
            )

    def __str__(self) -> str:
        return (
            f"multiples of {self.multiple} from {self.min_side} to {self.max_side} "
            f"with at most {self.max_pixels} pixels in all"
        )

    def allows(self, width: int, height: int) -> bool:
        """Return whether the model makes this size, in pixels."""
        sides = (width, height)
        return (
            all(self.min_side <= side <= self.max_side and side % self.multiple == 0 for side in sides)
            and width * height <= self.max_pixels
        )

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """Return the allowed (width, height) that is nearest to a size, in pixels, in shape first and then in area."""
        wanted_ratio, wanted_area = math.log(width / height), math.log(width * height)

        def distance(size: tuple[int, int]) -> tuple[float, float]:
            ratio, area = math.log(size[0] / size[1]), math.log(size[0] * size[1])
            return abs(ratio - wanted_ratio) + 0.5 * abs(area - wanted_area), -size[0] * size[1]

        return min(self._all(), key=distance)

    def _all(self) -> Iterator[tuple[int, int]]:
        for width in range(self.min_side, self.max_side + 1, self.multiple):
            tallest = min(self.max_side, self.max_pixels // width)
            for height in range(self.min_side, tallest + 1, self.multiple):
                yield width, height


def parse_size_rule(raw: Any) -> SizeRule:
    """Read the decoded JSON of a rule.

    Raises:
        RecipeError: a field is missing, unknown or outside its limits.
    """
    try:
        return SizeRule(**raw)
    except TypeError:
        raise RecipeError(
            f"size_rule is {raw!r}; it must be an object with multiple, min_side, max_side and max_pixels"
        ) from None


def rule_around(width: int, height: int, multiple: int) -> SizeRule:
    """Return the rule of a model whose native size is all that is known: up to twice of each side and of the area.

    Args:
        width, height: native size in pixels.
        multiple: sides must be multiples of it, in pixels.
    """

    def up(side: int) -> int:
        return max(1, -(-side // multiple)) * multiple

    return SizeRule(multiple, multiple, up(2 * max(width, height)), 2 * up(width) * up(height))
