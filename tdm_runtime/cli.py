"""`tdm-generate`: make one picture or clip without a server."""

from __future__ import annotations

import argparse
import math
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from PIL import Image

from tdm_runtime.backends import BACKENDS, PRECISIONS, PROVIDER_NAMES, TORCH_BACKENDS
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.checkpoint.recipe import Adapter, Recipe
from tdm_runtime.checkpoint.stock.text_precision import TEXT_PRECISIONS, TextConfig
from tdm_runtime.edit import Edit, GivenPicture, default_strength
from tdm_runtime.errors import BackendError, CheckpointError, TDMError, shown
from tdm_runtime.media.given_picture import read_mask, read_picture, to_edit, to_references
from tdm_runtime.media.image_file import ImageFormat, describe_parameters, encode_image
from tdm_runtime.media.made_file import FileFormat, encode_made
from tdm_runtime.media.provenance import Provenance, ProvenanceConfig, ProvenanceKind
from tdm_runtime.media.receipt import Receipt, read_claims, receipt_of
from tdm_runtime.media.video_file import ClipFormat
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_checkpoint, load_model
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import MAX_SEED, DecoderName, PromptSyntax, SamplingParams, parse_size
from tdm_runtime.pipeline import generate

FORMATS: Mapping[str, ImageFormat] = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
MAX_THREADS = 1024
"""Most threads that a receipt may ask for."""
SECOND_EXPERT = "transformer_2"
"""Part that --lora may name: the second transformer of Wan 2.2."""
CLIP_FORMATS: Mapping[str, ClipFormat] = {
    ".mp4": "mp4",
    ".webm": "webm",
    ".webp": "webp",
    ".gif": "gif",
    ".npy": "npy",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, 1 if a receipt was not reproduced, 2 on an error."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if (given.prompt is None) == (given.verify is None):
        parser.error("give a prompt, or --verify with a file, and not both")
    if given.prompt == "-" or ((given.prompt or "").startswith("@") and Path(given.prompt[1:]).is_file()):
        parser.error(f"the prompt is {given.prompt!r}; neither files nor standard input are read, write the prompt out")
    output: Path | None = given.output
    if output is not None and output.suffix.lower() not in {**FORMATS, **CLIP_FORMATS}:
        parser.error(
            f"the output {output} ends in none of {', '.join(FORMATS)}, or of {', '.join(CLIP_FORMATS)} for clips"
        )
    if output is not None and not output.resolve().parent.is_dir():
        parser.error(f"the folder of {output} does not exist")
    if not given.image and (given.mask or given.strength is not None):
        parser.error("--mask and --strength are about --image, which is missing")
    if output is not None and output.is_file() and not given.force:
        parser.error(f"the output {output} exists; choose another name, or replace it with --force")
    try:
        if given.verify is not None:
            return verify(given)
        return make_picture(given)
    except (TDMError, ValueError, OSError) as error:
        print(f"tdm-generate: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tdm-generate", description="Make a picture or a clip from a prompt.")
    parser.add_argument("prompt", nargs="?")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="png, webp or jpeg (picture.png); of a clip mp4, webm, webp, gif or npy, raw frames (clip.mp4)",
    )
    parser.add_argument("--force", action="store_true", help="replace the file of --output if it exists")
    parser.add_argument("--seed", type=int, help="drawn when absent, and printed")
    parser.add_argument("--steps", type=int, help="num_inference_steps; the checkpoint's default when absent")
    parser.add_argument(
        "--prompt-syntax",
        choices=get_args(PromptSyntax),
        default=SamplingParams.prompt_syntax,
        help="a1111 reads weights such as (word:1.3) and [word], and BREAK, for CLIP text encoders (%(default)s)",
    )
    parser.add_argument("--size", metavar="WxH", help="in pixels; the checkpoint's first native size when absent")
    parser.add_argument("--frames", type=int, help="frames of a clip; the checkpoint's default when absent")
    parser.add_argument("--fps", type=int, help="frames per second of a clip; the checkpoint's default when absent")
    parser.add_argument(
        "--guidance", type=float, help="guidance scale, for checkpoints that read one; the recipe's when absent"
    )
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="checkpoint folder (%(default)s)")
    add_lora_argument(parser)
    parser.add_argument(
        "--decoder", choices=get_args(DecoderName), default="full", help="tiny is cheaper (%(default)s)"
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        type=Path,
        help="picture to edit, scaled to --size, by default the nearest size that is made. Without --strength and "
        "--mask, FLUX.2 reads it as a reference; for several references, give --image several times",
    )
    parser.add_argument(
        "--mask", type=Path, help="where --image changes: transparent there or, if it is opaque, white there"
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="how much of --image is made anew, above 0 to 1: of K steps the last ceil(K strength) run "
        f"({default_strength(False)}, with --mask {default_strength(True)}; FLUX.2 reads references instead)",
    )
    parser.add_argument(
        "--previews", action="store_true", help="also write the picture that each step but the last expects"
    )
    parser.add_argument(
        "--verify",
        type=Path,
        metavar="RECEIPT",
        help="make the picture of a receipt again, on the backend it names, and compare: a PNG, MP4 or WebM with "
        "metadata, a receipt in JSON or a server's answer",
    )
    add_provenance_arguments(parser)
    add_backend_arguments(parser)
    return parser


def make_picture(given: argparse.Namespace) -> int:
    """Make and write one picture or clip. Returns the exit status."""
    provenance = Provenance(provenance_config(given))
    model = load_model(given.checkpoint, backend_config(given), adapters=given.lora)
    if model.choice:
        print(f"backend: {model.choice}", file=sys.stderr)
    recipe = model.recipe
    output = given.output or Path("picture.png" if recipe.frames is None else "clip.mp4")
    made = "pictures" if recipe.frames is None else "clips"
    formats: Mapping[str, FileFormat] = FORMATS if recipe.frames is None else CLIP_FORMATS
    if output.suffix.lower() not in formats:
        raise ValueError(f"the output is {output}; {recipe.name} makes {made}: {', '.join(formats)}")
    pictures = [read_picture(file.read_bytes()) for file in given.image]
    references = to_references(pictures, recipe, given.strength is not None or given.mask is not None)
    width, height = _size(given, recipe, pictures, references)
    params = SamplingParams(
        prompt=given.prompt,
        seed=secrets.randbelow(MAX_SEED + 1) if given.seed is None else given.seed,
        num_inference_steps=recipe.default_steps if given.steps is None else given.steps,
        width=width,
        height=height,
        decoder=given.decoder,
        guidance_scale=given.guidance,
        frames=recipe.default_frames if given.frames is None else given.frames,
        fps=given.fps,
        edit=None if references else _edit(given, pictures, width, height),
        prompt_syntax=given.prompt_syntax,
        references=references,
    )
    previews: dict[Path, Pixels] = {}

    def keep(step: int, pixels: Pixels) -> None:
        if recipe.frames is None:
            previews[output.with_suffix(f".step{step}{output.suffix}")] = pixels
        else:
            previews[output.with_suffix(f".step{step}.png")] = pixels[0]

    started_s = time.monotonic()
    pixels = generate(model, params, keep if given.previews else None)
    elapsed_ms = 1e3 * (time.monotonic() - started_s)
    pixels = provenance.marked(pixels)
    text = describe_parameters(params, recipe, model.digest)
    watermark = provenance.watermark_of(width, height)
    receipt = receipt_of(model, params, pixels, is_strict=True, watermark=watermark)  # made alone
    file_format = formats[output.suffix.lower()]
    try:
        for file, preview in previews.items():
            preview_format = FORMATS[file.suffix.lower()]
            content = encode_image(provenance.marked(preview), preview_format, parameters=text)
            file.write_bytes(provenance.signed(content, preview_format, params))
        output.write_bytes(encode_made(model, params, pixels, file_format, receipt=receipt, provenance=provenance))
    except OSError as error:
        raise OSError(f"{output} cannot be written: {error.strerror}") from None
    steps = f"{params.num_steps} of {params.num_inference_steps}" if params.edit else f"{params.num_inference_steps}"
    done = f"{steps} steps, seed {params.seed}, {elapsed_ms:.0f} ms on {model.backend}"
    print(f"{output}: {done}")
    for warning in provenance.warnings(width, height, file_format):
        print(warning, file=sys.stderr)
    return 0


def verify(given: argparse.Namespace) -> int:
    """Make the pictures of a file's receipts again. Returns the exit status.

    Raises:
        TDMError, OSError: the file holds no receipt, or the receipt names another checkpoint, another given picture or
            a backend that cannot run here.
    """
    file, checkpoint, text = given.verify, given.checkpoint, backend_config(given).text
    pictures = [read_picture(file.read_bytes()) for file in given.image]
    status = 0
    for claim in read_claims(file):
        receipt = claim.receipt
        backend, _, precision = receipt.backend.partition(" ")
        if backend not in BACKENDS or precision not in PRECISIONS:
            raise BackendError(f"the receipt's backend is {shown(receipt.backend)}; it must be one of {BACKENDS}")
        threads = 0 if receipt.threads is None else receipt.threads
        if not 0 <= threads <= MAX_THREADS:
            raise BackendError(f"the receipt's threads are {threads}; at most {MAX_THREADS} are started")
        config = BackendConfig(backend, precision, threads, text=text)
        model = _model_of(receipt, checkpoint, config, given.lora)
        if model.digest != receipt.digest:
            raise CheckpointError(
                f"the receipt is of {shown(receipt.model)} {receipt.digest[:12]} and {checkpoint} is "
                f"{model.recipe.name} {model.digest[:12]}; name its folder with --checkpoint"
            )
        references = to_references(pictures, model.recipe, receipt.strength is not None)
        edit = None if references else _edit(given, pictures, receipt.width, receipt.height, receipt.strength)
        problem = claim.check(generate(model, receipt.to_params(edit, references)))
        said = "reproduced" if problem is None else f"not reproduced: {problem}"
        print(f"{file}: seed {receipt.seed}, {receipt.num_inference_steps} steps on {receipt.backend}, {said}")
        status = status or int(problem is not None)
    return status


def _size(
    given: argparse.Namespace, recipe: Recipe, pictures: Sequence[Image.Image], references: Sequence[GivenPicture]
) -> tuple[int, int]:
    """Return width and height in pixels: the size asked for, or of an edit the size nearest to the first picture."""
    if given.size is not None:
        return parse_size(given.size)
    sizes = [one.size for one in references or pictures]
    return recipe.nearest_size(*sizes[0]) if sizes else recipe.native_sizes[0]


def _edit(
    given: argparse.Namespace, pictures: Sequence[Image.Image], width: int, height: int, strength: float | None = None
) -> Edit | None:
    """Return the edit of --image, --mask and --strength in a size, in pixels; None without --image.

    Args:
        pictures: those of --image.
        strength: of a receipt; None takes that of the command.
    """
    if not pictures:
        return None
    mask = None if given.mask is None else read_mask(given.mask.read_bytes())
    return to_edit(pictures[0], given.strength if strength is None else strength, width, height, mask)


def _model_of(receipt: Receipt, checkpoint: Path, config: BackendConfig, adapters: Sequence[Adapter]) -> LoadedModel:
    """Return the model of a receipt: LoRAs are merged, or on their base where the receipt has their scale.

    Raises:
        CheckpointError: a LoRA on a base is not exactly one.
    """
    if receipt.lora_scale is None:
        return load_model(checkpoint, config, adapters=adapters)
    if len(adapters) != 1:
        raise CheckpointError(
            f"the receipt is of {shown(receipt.model)}, a LoRA on a base, and --lora names {len(adapters)} files; give "
            "its base with --checkpoint and the LoRA with --lora FILE:SCALE, at the scale of the server's model card"
        )
    from tdm_runtime.checkpoint.lora.lora_file import read_lora
    from tdm_runtime.model.lora import LoraBase

    opened = open_checkpoint(checkpoint)
    base = LoraBase(opened, load_checkpoint(opened, config))
    return base.attach(
        base.prepare(receipt.model, [(read_lora(Path(a.file), opened.family), a.scale) for a in adapters])
    )


def add_lora_argument(parser: argparse.ArgumentParser) -> None:
    """Add --lora, which may be given several times. The result is a list of `Adapter`."""
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_adapter,
        metavar="[PART=]FILE[:SCALE]",
        help="LoRA that is merged into the weights, at scale 1 or another; may be given several times. "
        f"{SECOND_EXPERT}= is the second expert of Wan 2.2",
    )


def _adapter(text: str) -> Adapter:
    part = SECOND_EXPERT if text.startswith(f"{SECOND_EXPERT}=") else ""
    text = text.removeprefix(f"{part}=")
    path, colon, scale = text.rpartition(":")
    try:
        number = float(scale)
    except ValueError:
        path, colon = text, ""  # the colon belongs to the path
    if not colon:
        return Adapter(str(Path(text).resolve()), part=part)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"the scale of {path} is {scale}; give a finite number, 1 is as trained")
    return Adapter(str(Path(path).resolve()), number, part)


def add_provenance_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that writes files; `provenance_config` reads them."""
    parser.add_argument(
        "--provenance",
        type=_provenance_kinds,
        default=(),
        metavar="c2pa,watermark",
        help="say that a model made it: a signed C2PA manifest in files, an invisible watermark in pixels, or both",
    )
    parser.add_argument(
        "--c2pa-cert", type=Path, metavar="FILE", help="certificates in PEM that sign manifests, the signer's first"
    )
    parser.add_argument("--c2pa-key", type=Path, metavar="FILE", help="private key in PEM of the first certificate")


def provenance_config(given: argparse.Namespace) -> ProvenanceConfig:
    """Return the provenance of parsed arguments.

    Raises:
        ValueError: see `ProvenanceConfig`.
    """
    cert, key = (file and file.resolve() for file in (given.c2pa_cert, given.c2pa_key))
    return ProvenanceConfig(given.provenance, cert, key)


def _provenance_kinds(text: str) -> tuple[ProvenanceKind, ...]:
    known = get_args(ProvenanceKind)
    kinds = [part.strip() for part in text.split(",")]
    if not {*kinds} <= {*known}:
        raise argparse.ArgumentTypeError(
            f"{text[:64]!r} is not one or both of {', '.join(known)}, separated by a comma"
        )
    return tuple(kind for kind in known if kind in kinds)


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the backend options of every command that runs a checkpoint; `backend_config` reads them."""
    parser.add_argument(
        "--backend",
        choices=["auto", *BACKENDS],
        default="auto",
        help="what runs the checkpoint; auto measures, once, and takes the fastest whose pictures stay (%(default)s)",
    )
    parser.add_argument(
        "--provider",
        choices=PROVIDER_NAMES,
        help="execution provider of onnxruntime; cuda beside a GPU, or else cpu by default",
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="of the backend; its own best by default")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a call, 0 = the fastest (%(default)s)")
    parser.add_argument("--artifacts", type=Path, help="folder that tdm-export wrote; its cache by default")
    parser.add_argument(
        "--text-encoder-precision",
        choices=TEXT_PRECISIONS,
        default=TextConfig.precision,
        help="of the text encoders of stock pipelines; less than fp32 saves memory and changes pictures (%(default)s)",
    )
    parser.add_argument(
        "--text-encoder-device",
        type=_torch_device,
        metavar="cpu|cuda[:N]",
        help="of the text encoders of stock pipelines; that of the denoiser by default",
    )
    parser.add_argument(
        "--allow-fallback", action="store_true", help="run torch where the artifacts cannot be used, not refuse"
    )


def backend_config(given: argparse.Namespace) -> BackendConfig:
    """Return the backend configuration of parsed arguments.

    Raises:
        ValueError: naming the argument and its limit.
    """
    artifacts = given.artifacts.resolve() if given.artifacts else None
    if artifacts is not None and given.backend in TORCH_BACKENDS:
        raise ValueError(f"--artifacts is {artifacts}; {given.backend} runs the checkpoint itself, leave it out")
    text = TextConfig(given.text_encoder_precision, given.text_encoder_device)
    return BackendConfig(
        given.backend,
        given.precision,
        given.threads,
        artifacts,
        given.allow_fallback,
        text=text,
        provider=given.provider,
    )


def _torch_device(text: str) -> str:
    if re.fullmatch(r"cpu|cuda(:\d{1,2})?", text, re.ASCII) is None:
        raise argparse.ArgumentTypeError(f"{text[:32]!r} is no device; give cpu, cuda or cuda:N")
    return text


if __name__ == "__main__":
    sys.exit(main())
