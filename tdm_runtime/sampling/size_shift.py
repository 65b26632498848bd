"""`SizeShift`: a flow schedule's shift by the size of the picture, as FLUX.1-dev and FLUX.2 shift theirs.

A larger picture keeps more of its structure under the same noise, so its steps are moved towards the noise
(Esser et al. 2024, sec. 5.3.2). diffusers calls it dynamic shifting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.schedule import Array

MuRule = Literal["tokens", "flux2"]
ShiftCurve = Literal["exponential", "linear"]
MAX_TOKENS = 1_000_000


@dataclass(frozen=True)
class SizeShift:
    """Rule that shifts sigmas by the number of tokens of a picture: its size gives mu, and mu gives the shift."""

    mu: MuRule = "tokens"
    """How mu follows. "tokens": linearly from the number of tokens. "flux2": from tokens and steps, with the constants
    of FLUX.2, which leave the four numbers below unread."""
    pixels_per_token: int = 16
    """Along each side."""
    base_tokens: int = 256
    base_shift: float = 0.5
    """mu at `base_tokens`."""
    max_tokens: int = 4096
    max_shift: float = 1.15
    """mu at `max_tokens`."""
    curve: ShiftCurve = "exponential"
    """The shift is e^mu ("exponential") or mu itself ("linear")."""
    terminal: float | None = None
    """The shifted sigmas are stretched so that the last one is this number; None leaves them."""

    def __post_init__(self) -> None:
        _require("mu", self.mu, self.mu in get_args(MuRule), f"one of {', '.join(get_args(MuRule))}")
        _require("curve", self.curve, self.curve in get_args(ShiftCurve), f"one of {', '.join(get_args(ShiftCurve))}")
        for name in ("pixels_per_token", "base_tokens", "max_tokens"):
            value = getattr(self, name)
            _require(name, value, type(value) is int and 1 <= value <= MAX_TOKENS, f"a whole number to {MAX_TOKENS}")
        _require("max_tokens", self.max_tokens, self.max_tokens > self.base_tokens, "above base_tokens")
        for name in ("base_shift", "max_shift"):
            value = getattr(self, name)
            _require(name, value, type(value) in (int, float) and abs(value) <= 20, "a number from -20 to 20")
        end = self.terminal
        _require("terminal", end, end is None or (type(end) is float and 0 < end < 1), "in (0, 1), or null")

    def mu_of(self, num_inference_steps: int, width: int, height: int) -> float:
        """Return mu for a step count and a size in pixels."""
        tokens = (width // self.pixels_per_token) * (height // self.pixels_per_token)
        if self.mu == "flux2":
            return _flux2_mu(tokens, num_inference_steps)
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (tokens - self.base_tokens)

    def shift_at(self, mu: float) -> float:
        """Return the shift of a flow schedule for mu.

        Raises:
            RecipeError: mu gives no shift, which a linear curve can.
        """
        shift = math.exp(mu) if self.curve == "exponential" else mu
        if shift <= 0:
            raise RecipeError(f"the shift of this size is {shift:g}; it must be above 0: raise base_shift")
        return shift

    def shifted(self, sigmas: Array, mu: float) -> Array:
        """Shift sigmas in (0, 1].

        Raises:
            RecipeError: mu gives no shift.
        """
        shift = self.shift_at(mu)
        return self.stretched(shift * sigmas / (1.0 + (shift - 1.0) * sigmas))

    def stretched(self, sigmas: Array) -> Array:
        """Stretch falling sigmas so that the last one is `terminal`, if that is set."""
        if self.terminal is None:
            return sigmas
        stretched: Array = 1.0 - (1.0 - sigmas) * (1.0 - self.terminal) / (1.0 - sigmas[-1])
        return stretched


def _flux2_mu(tokens: int, num_inference_steps: int) -> float:
    """Return mu of FLUX.2: a plane through two lines that were fitted at 10 and at 200 steps."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return at_200 + slope * (num_inference_steps - 200.0)


def _require(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise RecipeError(f"{name} is {value!r}; it must be {allowed}")
