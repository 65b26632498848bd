"""`tdm-generate`: one prompt, one file, no server."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from pathlib import Path
from typing import cast, get_args

from tdm_runtime.backend_choice import TORCH_BACKENDS, BackendConfig, load_model
from tdm_runtime.backends import BACKENDS, PRECISIONS
from tdm_runtime.checkpoint import DEFAULT_CHECKPOINT
from tdm_runtime.codec import ImageFormat, describe_parameters, encode_image
from tdm_runtime.decoder import Pixels
from tdm_runtime.errors import TDMError
from tdm_runtime.params import MAX_SEED, DecoderName, SamplingParams
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
    parser.add_argument(
        "--decoder", choices=get_args(DecoderName), default="full", help="tiny is cheaper (%(default)s)"
    )
    parser.add_argument("--previews", action="store_true", help="also write what each step but the last would give")
    add_backend_arguments(parser)
    given = parser.parse_args(arguments)
    image_format = FORMATS.get(given.output.suffix.lower())
    if image_format is None:
        parser.error(f"the output {given.output} ends in none of {', '.join(FORMATS)}")
    if not given.output.resolve().parent.is_dir():
        parser.error(f"the folder of {given.output} does not exist")
    try:
        model = load_model(given.checkpoint, backend_config(given))
        if model.choice:
            print(f"backend: {model.choice}", file=sys.stderr)
        recipe = model.recipe
        params = SamplingParams(
            prompt=given.prompt,
            seed=secrets.randbelow(MAX_SEED + 1) if given.seed is None else given.seed,
            num_inference_steps=recipe.default_steps if given.steps is None else given.steps,
            width=recipe.native_sizes[0][0],
            height=recipe.native_sizes[0][1],
            decoder=given.decoder,
        )
        previews: dict[Path, Pixels] = {}

        def keep(step: int, pixels: Pixels) -> None:
            previews[given.output.with_suffix(f".step{step}{given.output.suffix}")] = pixels

        started_s = time.monotonic()
        pixels = generate(model, params, keep if given.previews else None)
    except (TDMError, ValueError) as error:
        print(f"tdm-generate: {error}", file=sys.stderr)
        return 2
    elapsed_ms = 1e3 * (time.monotonic() - started_s)
    text = describe_parameters(params, recipe, model.digest)
    try:
        for file, picture in {**previews, given.output: pixels}.items():
            file.write_bytes(encode_image(picture, cast(ImageFormat, image_format), parameters=text))
    except OSError as error:
        print(f"tdm-generate: {given.output} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    made = f"{params.num_inference_steps} steps, seed {params.seed}, {elapsed_ms:.0f} ms on {model.backend}"
    print(f"{given.output}: {made}")
    return 0


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that runs a checkpoint may be told about its backend; `backend_config` reads it."""
    parser.add_argument(
        "--backend",
        choices=["auto", *BACKENDS],
        default="auto",
        help="what runs the checkpoint; auto measures, once, and takes the fastest whose pictures stay (%(default)s)",
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="of the backend; its own best by default")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a call, 0 = the fastest (%(default)s)")
    parser.add_argument("--artifacts", type=Path, help="folder that tdm-export wrote; its cache by default")
    parser.add_argument(
        "--allow-fallback", action="store_true", help="run torch where the artifacts cannot be used, not refuse"
    )


def backend_config(given: argparse.Namespace) -> BackendConfig:
    """The configuration that the arguments ask for.

    Raises:
        ValueError: naming the argument and its limit.
    """
    artifacts = given.artifacts.resolve() if given.artifacts else None
    if artifacts is not None and given.backend in TORCH_BACKENDS:
        raise ValueError(f"--artifacts is {artifacts}; {given.backend} runs the checkpoint itself, leave it out")
    return BackendConfig(given.backend, given.precision, given.threads, artifacts, given.allow_fallback)


if __name__ == "__main__":
    sys.exit(main())
