"""Prompts that builds are calibrated with, unless others are given."""

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
"""None of them is compared afterwards (`tdm_runtime/model/parity.py`)."""
