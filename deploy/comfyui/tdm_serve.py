"""ComfyUI node: pictures and edits from a tdm-serve server.

Copy this file into ComfyUI's folder `custom_nodes` and restart it. The node "tdm-serve picture" is in the category
"image".
A server with keys takes the key from the environment variable TDM_API_KEY.
"""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

TIMEOUT_S = 300.0
MAX_SEED = 2**32 - 1


class TDMServePicture:
    """Makes pictures for a prompt, or changes a given one."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "image"
    DESCRIPTION = "Pictures in 1 to 4 steps from a tdm-serve server; with an image, changes it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """Return the inputs, as ComfyUI asks for them."""
        return {
            "required": {
                "prompt": ("STRING", {"multiline": True, "default": "a red heart"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
                "steps": ("STRING", {"default": "auto", "tooltip": "a step count of the model, or auto"}),
            },
            "optional": {
                "image": ("IMAGE",),
                "mask": ("MASK",),
                "strength": ("FLOAT", {"default": 0.75, "min": 0.01, "max": 1.0, "step": 0.05}),
                "latency_budget_ms": ("FLOAT", {"default": 0.0, "min": 0.0, "tooltip": "0 sets no budget"}),
                "size": ("STRING", {"default": "auto"}),
                "n": ("INT", {"default": 1, "min": 1, "max": 10}),
                "model": ("STRING", {"default": "", "tooltip": "empty: the first model of the server"}),
                "server": ("STRING", {"default": "http://127.0.0.1:8000"}),
            },
        }

    def make(
        self,
        prompt: str,
        seed: int,
        steps: str = "auto",
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float = 0.75,
        latency_budget_ms: float = 0.0,
        size: str = "auto",
        n: int = 1,
        model: str = "",
        server: str = "http://127.0.0.1:8000",
    ) -> tuple[Tensor]:
        """Ask the server.

        Args:
            image: float [B, H, W, 3] in [0, 1]; the first is changed.
            mask: float [B, H, W] or [H, W], 1 where the picture changes, in the size of `image`.

        Returns:
            Pictures, float32 [n, H, W, 3] in [0, 1].

        Raises:
            RuntimeError: the server refused, with its reason, or cannot be reached.
        """
        fields: dict[str, Any] = {
            "prompt": prompt,
            "seed": seed,
            "num_inference_steps": int(steps) if steps.strip().isdigit() else steps.strip(),
            "size": size,
            "n": n,
        }
        if model:
            fields["model"] = model
        if latency_budget_ms:
            fields["latency_budget_ms"] = latency_budget_ms
        if image is None:
            return (_answer(server, "/v1/images/generations", fields),)
        fields |= {"image": _png(image[0]), "strength": strength}
        if mask is not None:
            fields["mask"] = _png(mask[0] if mask.ndim == 3 else mask)
        return (_answer(server, "/v1/images/edits", fields),)


def _png(pixels: Tensor) -> str:
    """Return a picture or mask in [0, 1] as a PNG file in base64."""
    stream = io.BytesIO()
    levels = (pixels.cpu().numpy() * 255.0).round().clip(0, 255).astype(np.uint8)
    Image.fromarray(levels).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _answer(server: str, route: str, fields: dict[str, Any]) -> Tensor:
    headers = {"content-type": "application/json"}
    if key := os.environ.get("TDM_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    url = server.rstrip("/") + route
    request = urllib.request.Request(url, json.dumps(fields).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            data = json.load(response)["data"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {_reason(error)}") from None
    except OSError as error:
        raise RuntimeError(f"{url} cannot be reached: {error}; start tdm-serve, or change `server`") from None
    pictures = [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).convert("RGB") for one in data]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32) / 255.0)


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError):
        return f"HTTP {error.code}"


NODE_CLASS_MAPPINGS = {"TDMServePicture": TDMServePicture}
NODE_DISPLAY_NAME_MAPPINGS = {"TDMServePicture": "tdm-serve picture"}
