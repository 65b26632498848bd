"""Default prompts for the calibration and verification of builds."""

from __future__ import annotations

CALIBRATION = (
    "a green apple",
    "two cats on a blue background",
    "a big red car",
    "a small tree in the top left",
    "a sun above a house",
    "a dog left of a ball",
    "a yellow star on a black background",
    "a cup of tea",
    "a purple heart",
    "a fish below a boat",
    "a guitar right of a drum",
    "a snowman on a pink background",
)
VERIFICATION = (
    "a red apple",
    "a rocket on a blue background",
    "a cat left of a dog",
    "a small penguin",
    "a pizza above a cup",
    "a butterfly on a green background",
    "a big yellow bus",
    "a purple flower in the bottom right",
)
"""None of these is a calibration prompt."""
