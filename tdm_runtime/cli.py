"""`tdm-generate`: one prompt, one file, no server."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from pathlib import Path
from typing import cast

from transformers.utils.logging import disable_progress_bar

from tdm_runtime.checkpoint import DEFAULT_CHECKPOINT
from tdm_runtime.codec import ImageFormat, describe_parameters, encode_image
from tdm_runtime.errors import TDMError
from tdm_runtime.loaded_model import load_model
from tdm_runtime.params import MAX_SEED, SamplingParams
from tdm_runtime.pipeline import generate

FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="tdm-generate", description="Make a picture from a prompt.")
    parser.add_argument("prompt")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("picture.png"), help="png, webp or jpeg (%(default)s)"
    )
    parser.add_argument("--seed", type=int, help="drawn when absent, and printed")
    parser.add_argument("--steps", type=int, help="num_inference_steps; the checkpoint's default when absent")
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="checkpoint folder (%(default)s)")
    given = parser.parse_args(arguments)
    image_format = FORMATS.get(given.output.suffix.lower())
    if image_format is None:
        parser.error(f"the output {given.output} ends in none of {', '.join(FORMATS)}")
    if not given.output.resolve().parent.is_dir():
        parser.error(f"the folder of {given.output} does not exist")
    disable_progress_bar()  # of weights that load in a moment
    try:
        model = load_model(given.checkpoint)
        recipe = model.recipe
        params = SamplingParams(
            prompt=given.prompt,
            seed=secrets.randbelow(MAX_SEED + 1) if given.seed is None else given.seed,
            num_inference_steps=recipe.default_steps if given.steps is None else given.steps,
            width=recipe.native_sizes[0][0],
            height=recipe.native_sizes[0][1],
        )
        started_s = time.monotonic()
        pixels = generate(model, params)
    except TDMError as error:
        print(f"tdm-generate: {error}", file=sys.stderr)
        return 2
    elapsed_ms = 1e3 * (time.monotonic() - started_s)
    text = describe_parameters(params, recipe, model.digest)
    try:
        given.output.write_bytes(encode_image(pixels, cast(ImageFormat, image_format), parameters=text))
    except OSError as error:
        print(f"tdm-generate: {given.output} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{given.output}: {params.num_inference_steps} steps, seed {params.seed}, {elapsed_ms:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
