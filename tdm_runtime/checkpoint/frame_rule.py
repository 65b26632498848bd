"""`FrameRule`: how many frames the clips of a model may have."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tdm_runtime.errors import RecipeError

MAX_FRAMES = 1025
"""Most frames that any rule allows."""


@dataclass(frozen=True)
class FrameRule:
    """1 frame, or any whole number of further steps, up to a limit."""

    default: int
    """Frames of a request that does not name them."""
    step: int
    """Allowed are 1 + step k frames: a VAE that compresses time by 4 makes 4 k + 1."""
    max_frames: int
    """Most frames; one of those allowed."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or not 1 <= value <= MAX_FRAMES:
                raise RecipeError(f"{name} of frames is {value!r}; it must be a whole number from 1 to {MAX_FRAMES}")
        for name in ("default", "max_frames"):
            if (getattr(self, name) - 1) % self.step or getattr(self, name) > self.max_frames:
                raise RecipeError(f"{name} of frames is {getattr(self, name)}; it must be one of {self}")

    def __str__(self) -> str:
        if self.step == 1:
            return f"1 to {self.max_frames} frames"
        return f"{self.step} k + 1 frames, at most {self.max_frames}"

    def allows(self, frames: int) -> bool:
        """Return whether the model makes clips of this many frames."""
        return 1 <= frames <= self.max_frames and (frames - 1) % self.step == 0

    def nearest(self, frames: int) -> int:
        """Return the allowed number that is nearest, the smaller of two."""
        steps = max(0, -(-(2 * (frames - 1) - self.step) // (2 * self.step)))
        return min(1 + steps * self.step, self.max_frames)


def parse_frame_rule(raw: Any) -> FrameRule:
    """Read the decoded JSON of a rule.

    Raises:
        RecipeError: a field is missing, unknown or outside its limits.
    """
    try:
        return FrameRule(**raw)
    except TypeError:
        raise RecipeError(f"frames is {raw!r}; it must be an object with default, step and max_frames") from None
