"""Time one picture or clip at a time, text to PNG or MP4 bytes: our backends, the stock diffusers pipeline and others.

    .venv/bin/tdm-export && .venv/bin/python -m benchmarks.backends
    .venv/bin/python -m benchmarks.backends FOLDER --contenders stock-fp32 stock-bf16 openvino:bf16
    .venv/bin/python -m benchmarks.backends --contenders openvino:bf16 openvino-genai:bf16

Each contender runs in its own process, one after the other. Every round runs all contenders again, so that
changes in the machine's speed affect all of them alike. `openvino-genai` and `sd-cpp` (stable-diffusion.cpp) have
environments of their own, which are made where they are missing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmarks.contenders import NotRunError
from benchmarks.machine import machine
from benchmarks.peers.environment import GENAI_EXTRA, SDCPP_EXTRA, interpreter_of
from benchmarks.peers.refusal import CANNOT_RUN
from tdm_runtime.backends import BackendName, Precision
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, Checkpoint, open_checkpoint
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.checkpoint.stock.pipeline_folder import MODEL_INDEX, read_json, text_parts
from tdm_runtime.params import DecoderName

if TYPE_CHECKING:
    import torch

STOCK = ("stock-fp32", "stock-bf16")
GENAI, SDCPP = "openvino-genai", "sd-cpp"
EXTRAS = {GENAI: GENAI_EXTRA, SDCPP: SDCPP_EXTRA}
"""Contender without its precision -> extra of the environment that it needs."""
PRECISIONS = {GENAI: ("bf16", "fp32", "int8"), SDCPP: ("fp16", "q8_0")}
"""Contender -> its precisions, the default first."""
SUBJECTS = ("apple", "cat", "rocket", "pizza", "penguin", "tree", "guitar", "house")
COLOURS = ("red", "blue", "green", "yellow", "purple", "pink", "black", "white")

MakeFile = Callable[[str, int], bytes]
"""(prompt, seed) -> the bytes of one picture's PNG, or of one clip's MP4."""


@dataclass(frozen=True)
class Run:
    """Measurements of one process."""

    first_s: float
    """Seconds from the start of the process's work, imports included, to the first picture."""
    pictures_ms: list[float]
    """Time of each later picture, in milliseconds."""
    cpu_s: float
    """Seconds of all cores for one of them: on a busy machine it says more than the time."""
    peak_gib: float
    """Peak resident memory of the process, in GiB."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 1 if a contender could not be measured."""
    parser = argparse.ArgumentParser(prog="benchmarks.backends", description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", default=DEFAULT_CHECKPOINT, help="checkpoint folder (%(default)s)"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        help=f"{', '.join(STOCK)}, backend[:precision][:tiny], {GENAI}[:bf16|fp32|int8], {SDCPP}[:fp16|q8_0]; "
        "default: both stock ones, torch:fp32, auto and auto:tiny",
    )
    parser.add_argument("--frames", type=int, help="frames of a clip (default: the recipe's)")
    parser.add_argument("--steps", type=int, default=4, help="num_inference_steps (%(default)s)")
    parser.add_argument(
        "--pictures", type=int, default=40, help="pictures per round, after those for warm-up (%(default)s)"
    )
    parser.add_argument("--warm-up", type=int, default=2, help="pictures before, 1 at least (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all contenders (%(default)s)")
    parser.add_argument("--artifacts", type=Path, help="folder written by tdm-export (default: its cache)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.prepare:
        _prepare(given)
        return 0
    if given.only:
        print(json.dumps(asdict(measure(given.only, given))))
        return 0
    contenders = given.contenders or [*STOCK, "torch:fp32", "auto"]
    if given.contenders is None and open_checkpoint(given.checkpoint).has_tiny_vae:
        contenders.append("auto:tiny")
    for name in contenders:
        kind, _, precision = name.partition(":")
        if kind in PRECISIONS and precision not in ("", *PRECISIONS[kind]):
            parser.error(f"{kind} has no precision {precision!r}; choose from {', '.join(PRECISIONS[kind])}")
    runs, not_run = _measured(contenders, given)
    print(machine())
    if runs:
        print(table(runs, given.steps))
    for name, reason in not_run.items():
        print(f"- {name}: not run: {reason}")
    return int(bool(not_run))


def _measured(contenders: Sequence[str], given: argparse.Namespace) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Return the runs of each contender that could be measured, and for each other one why not."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    not_run: dict[str, str] = {}
    for round_number in range(given.rounds + 1):
        for name in contenders:
            if name in not_run:
                continue
            try:
                if round_number:
                    runs[name].append(Run(**json.loads(_in_a_process(name, given).splitlines()[-1])))
                    print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
                elif name.partition(":")[0] in EXTRAS:
                    _in_a_process(name, given, "--prepare")
            except (NotRunError, OSError) as error:
                not_run[name] = str(error)
                print(f"{name}: not run: {error}", file=sys.stderr, flush=True)
    return {name: done for name, done in runs.items() if done}, not_run


def _in_a_process(name: str, given: argparse.Namespace, *flags: str) -> str:
    """Return what the process of a contender prints.

    Raises:
        NotRunError: it failed.
        OSError: its environment cannot be made.
    """
    python = interpreter_of(EXTRAS.get(name.partition(":")[0], ""))
    command = [python, "-m", "benchmarks.backends", str(given.checkpoint), "--only", name, *flags]
    command += ["--steps", str(given.steps), "--pictures", str(given.pictures)]
    command += ["--warm-up", str(given.warm_up)]
    if given.frames:
        command += ["--frames", str(given.frames)]
    if given.artifacts:
        command += ["--artifacts", str(given.artifacts)]
    quiet = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet)
    print(ended.stderr, file=sys.stderr, end="")
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise NotRunError(last if ended.returncode == CANNOT_RUN else f"it ended with {ended.returncode}: {last}")
    return ended.stdout


def _prepare(given: argparse.Namespace) -> None:
    """Write the checkpoint as another project reads it; a later process finds it."""
    kind, _, precision = given.only.partition(":")
    checkpoint = open_checkpoint(given.checkpoint)
    if kind == GENAI:
        from benchmarks.peers.genai import converted_folder

        converted_folder(checkpoint, "int8" if precision == "int8" else "fp16")
    else:
        from benchmarks.peers.sd_cpp import readable_folder

        readable_folder(checkpoint)


def measure(name: str, given: argparse.Namespace) -> Run:
    """Time one contender in this process."""
    started_s = time.perf_counter()
    make = _maker(given, name)
    texts = prompts()
    make(next(texts), 0)
    first_s = time.perf_counter() - started_s
    for seed in range(1, given.warm_up):
        make(next(texts), seed)
    pictures_ms, cpu_started_s = [], time.process_time()
    for seed in range(given.warm_up, given.warm_up + given.pictures):
        began_s = time.perf_counter()
        content = make(next(texts), seed)
        pictures_ms.append(1e3 * (time.perf_counter() - began_s))
        assert content.startswith(b"\x89PNG") or content[4:8] == b"ftyp"
    cpu_s = (time.process_time() - cpu_started_s) / given.pictures
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Run(first_s, pictures_ms, cpu_s, peak_kib / 2**20)


def _maker(given: argparse.Namespace, name: str) -> MakeFile:
    kind, _, precision = name.partition(":")
    if kind == GENAI:
        from benchmarks.peers.genai import GenAIPipeline, GenAIPrecision

        pipeline = GenAIPipeline(given.checkpoint, cast(GenAIPrecision, precision or PRECISIONS[GENAI][0]))
        return lambda prompt, seed: pipeline.make([prompt], [seed], given.steps)[0]
    if kind == SDCPP:
        from benchmarks.peers.sd_cpp import SDCppType, sd_cpp

        return sd_cpp(given.checkpoint, cast(SDCppType, precision or PRECISIONS[SDCPP][0]), given.steps)
    return stock(given, name) if name in STOCK else ours(given, name)


def prompts() -> Iterator[str]:
    """Yield a different prompt every time, so that no text cache is hit."""
    number = 0
    while True:
        subject, colour = SUBJECTS[number % len(SUBJECTS)], COLOURS[number // len(SUBJECTS) % len(COLOURS)]
        yield f"a {colour} {subject} {number}"
        number += 1


def stock(given: argparse.Namespace, name: str) -> MakeFile:
    """Return a maker that uses the folder's own diffusers pipeline as its documentation shows it."""
    import torch

    from tdm_runtime.media.video_file import encode_frames

    checkpoint = open_checkpoint(given.checkpoint)
    pipeline = stock_pipeline(checkpoint, torch.bfloat16 if name == "stock-bf16" else torch.float32)
    width, height = checkpoint.recipe.native_sizes[0]
    arguments = stock_arguments(checkpoint, given.steps)
    frames, fps = clip_of(checkpoint.recipe, given)
    if frames is not None:
        arguments |= {"num_frames": frames, "output_type": "np"}

    def make(prompt: str, seed: int) -> bytes:
        made = pipeline(
            prompt,
            num_inference_steps=given.steps,
            width=width,
            height=height,
            generator=torch.Generator().manual_seed(seed),
            **arguments,
        )
        if frames is not None:
            return encode_frames((255 * made.frames[0]).round().astype("uint8"), "mp4", fps)
        picture = made.images[0]
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return stream.getvalue()

    return make


def stock_pipeline(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Return the diffusers pipeline of a folder; text encoders that it may lack must be named as absent."""
    from diffusers import DiffusionPipeline

    index = read_json(checkpoint.base_folder / MODEL_INDEX)
    absent = set(checkpoint.family.optional_text) - set(text_parts(index, checkpoint.family))
    pipeline = DiffusionPipeline.from_pretrained(checkpoint.base_folder, dtype=dtype, **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_arguments(checkpoint: Checkpoint, steps: int) -> dict[str, Any]:
    """Return the arguments with which a family's pipeline makes one call of the denoiser for each step."""
    recipe, family = checkpoint.recipe, checkpoint.family.name
    scale = 0.0 if recipe.guidance_scale is None else recipe.guidance_scale
    if checkpoint.family.makes_clips:
        scale = 1.0  # their pipelines pass no K to the denoiser; more would be guidance
    elif recipe.step_condition == "timestep_cond":
        scale = steps + 1.0  # passes K to the denoiser; there is no guidance
    arguments: dict[str, Any] = {"guidance_scale": scale}
    if family in ("pixart", "sana"):
        arguments["use_resolution_binning"] = False
    if family == "sana" and steps != 2:
        arguments["intermediate_timesteps"] = None  # the default is for two steps
    if family == "flux" and recipe.guidance_scale is None:
        arguments["max_sequence_length"] = 256  # FLUX.1 schnell
    return arguments


def clip_of(recipe: Recipe, given: argparse.Namespace) -> tuple[int | None, int]:
    """Return frames and frames per second of each clip; None and 0 for a model of pictures."""
    return (None if recipe.frames is None else given.frames or recipe.frames.default), recipe.fps or 0


def ours(given: argparse.Namespace, name: str) -> MakeFile:
    """Return a maker that uses this runtime: `load_model`, `generate`, `encode_image` or `encode_frames`."""
    from tdm_runtime.media.image_file import encode_image
    from tdm_runtime.media.video_file import encode_frames
    from tdm_runtime.model.artifacts import BackendConfig
    from tdm_runtime.model.choice import load_model
    from tdm_runtime.params import SamplingParams
    from tdm_runtime.pipeline import generate

    backend, *rest = name.split(":")
    decoder: DecoderName = "tiny" if "tiny" in rest else "full"
    precision = next((cast(Precision, part) for part in rest if part != "tiny"), None)
    config = BackendConfig(cast(BackendName, backend), precision, threads=0, artifacts=given.artifacts)
    model = load_model(given.checkpoint, config)
    print(f"{name}: {model.choice or model.backend}", file=sys.stderr)
    width, height = model.recipe.native_sizes[0]
    frames, fps = clip_of(model.recipe, given)

    def make(prompt: str, seed: int) -> bytes:
        params = SamplingParams(prompt, seed, given.steps, width, height, decoder, frames=frames)
        pixels = generate(model, params)
        return encode_image(pixels, "png") if frames is None else encode_frames(pixels, "mp4", fps)

    return make


def table(runs: dict[str, list[Run]], steps: int) -> str:
    """Return a Markdown table of latencies over all rounds and the speed-up over each stock pipeline."""
    medians = {name: statistics.median(ms for run in done for ms in run.pictures_ms) for name, done in runs.items()}
    references = [name for name in STOCK if name in runs]
    header = [
        f"{steps} steps",
        "ms, p50",
        "p90",
        "CPU s",
        *(f"speed-up over {name}" for name in references),
        "first picture, s",
        "peak GiB",
    ]
    lines = [header, ["---"] * len(header)]
    for name, done in runs.items():
        every = [ms for run in done for ms in run.pictures_ms]
        p90 = statistics.quantiles(every, n=10)[-1] if len(every) > 1 else every[0]
        ratios = [f"{medians[reference] / medians[name]:.2f}" for reference in references]
        cpu_s = statistics.median(run.cpu_s for run in done)
        first_s = statistics.median(run.first_s for run in done)
        peak = max(run.peak_gib for run in done)
        lines.append(
            [name, f"{medians[name]:.1f}", f"{p90:.1f}", f"{cpu_s:.3g}", *ratios, f"{first_s:.1f}", f"{peak:.2f}"]
        )
    return "\n".join(_row(cells) for cells in lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
