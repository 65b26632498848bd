"""Published few-step checkpoints of which no recipe is built in, and why."""

from __future__ import annotations

from collections.abc import Mapping

_GUIDED = "and this server runs no classifier-free guidance; distil it without (`tdm-train`), or use another checkpoint"
ABSENT: Mapping[str, str] = {
    "perflow": "its authors sample PeRFlow with guidance_scale 2 to 7.5 and a negative prompt "
    f"(README of magic-research/piecewise-rectified-flow), {_GUIDED}",
    "yoso": f"its authors sample YOSO with guidance_scale 1.5 (README of Luo-Yihong/YOSO), {_GUIDED}",
    "2-rectified-flow": "its authors sample 2-Rectified Flow with guidance_scale 1.5 "
    f"(code/README.md of gnobitab/InstaFlow), {_GUIDED}",
}
"""Published checkpoint -> why there is no recipe of it, and the remedy."""


def why_absent(name: str) -> str | None:
    """Return why no recipe of a checkpoint is built in, and the remedy; None for an unknown one."""
    return next((why for absent, why in ABSENT.items() if name.lower().startswith(absent)), None)
