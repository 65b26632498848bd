"""What clients of other servers send: names of fields that mean others here, and prompt syntax that is not read."""

from __future__ import annotations

import re
from collections.abc import Mapping

FIELDS: Mapping[str, str] = {
    "steps": "num_inference_steps",
    "step": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "width": 'size, such as "512x512"',
    "height": 'size, such as "512x512"',
    "rng_seed": "seed",
    "mode": "num_inference_steps or latency_budget_ms",
    "lora_weight": "lora_scale",
    "loras": "model, which names a LoRA, and lora_scale",
    "num_images": "n",
    "num_images_per_prompt": "n",
    "batch_size": "n",
    "images": "image, a file or its bytes in base64",
    "init_image": "image, to /v1/images/edits",
    "denoising_strength": "strength",
    "image_strength": "strength",
}
"""Field of another server -> the field meant."""
UNSUPPORTED: Mapping[str, str] = {"input_reference": "clips are made from the prompt alone"}
"""Field of OpenAI's API that is not served -> why."""
_SYNTAX = {
    "<lora:...>": re.compile(r"<lora:[^>]*>", re.IGNORECASE),
    "(word:1.3)": re.compile(r"\([^():]*[^():\d\s]\s*:\s*\d(?:\.\d+)?\s*\)"),
    "[word]": re.compile(r"\[[^\[\]]+\]"),
    "BREAK": re.compile(r"\bBREAK\b"),
}
"""Prompt syntax of web interfaces -> its pattern."""


def prompt_warnings(prompt: str) -> list[str]:
    """Return warnings about syntax that the model reads as plain words."""
    found = [name for name, pattern in _SYNTAX.items() if pattern.search(prompt)]
    remedy = "name a LoRA by model and lora_scale, or" if "<lora:...>" in found else "leave it out, or"
    remedy += " send prompt_syntax a1111"
    return [f"the prompt has {' and '.join(found)}, which is read as plain words; {remedy}"] if found else []
