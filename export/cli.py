"""`tdm-export`: build and verify the programs of the fast backends."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from tdm_runtime.backends import BackendName, Precision
from tdm_runtime.backends.machine import gpu_architecture, installed
from tdm_runtime.backends.openvino import has_bf16
from tdm_runtime.backends.tensorrt_library import PACKAGES
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, Checkpoint, open_checkpoint
from tdm_runtime.checkpoint.manifest import Manifest, default_artifacts, kernel_choice, load_manifest
from tdm_runtime.errors import TDMError

USAGE_ERROR = 2
EXPORTED: tuple[BackendName, ...] = ("openvino", "onnxruntime", "tensorrt")
PRECISIONS: dict[BackendName, tuple[Precision, ...]] = {
    "openvino": ("bf16", "fp32", "int8"),
    "onnxruntime": ("fp32",),
    "tensorrt": ("bf16", "fp16", "fp32", "fp8"),
}
"""Precisions that each backend can be built at, best first."""

Target = tuple[BackendName, Precision]
Targets = tuple[Target, ...]


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    targets = _targets(parser, given.backend, given.precision)
    prompts = _prompts(parser, given.prompts) if given.prompts else None
    try:
        checkpoint = open_checkpoint(given.checkpoint)
        folder = given.output.resolve() if given.output else default_artifacts(checkpoint)
        if given.verify:
            manifest = _verified(checkpoint, load_manifest(folder, checkpoint), folder, prompts)
        elif not given.force and (known := _up_to_date(checkpoint, folder, targets, given.gpu)) is not None:
            print(f"{folder} is up to date")
            if any(build.measured_on != kernel_choice(build) for build in known.builds):
                print("its parity was measured on another CPU; `--verify` measures it on this one")
            manifest = known
        else:
            wanted = _and_those_there(checkpoint, folder, targets, given.gpu)
            manifest = _built(checkpoint, folder, *wanted, prompts, anew=given.force)
    except TDMError as error:
        print(f"tdm-export: {error}", file=sys.stderr)
        return USAGE_ERROR
    from export.verify import parity_table

    print(parity_table(manifest))
    print(f"\n{folder}: {', '.join(build.name for build in manifest.builds)}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="tdm-export",
        description="Compile a checkpoint for the fast backends and measure how close their pictures are.",
    )
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", default=DEFAULT_CHECKPOINT, help="checkpoint folder (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="artifacts folder (default: a cache where servers look)")
    parser.add_argument(
        "--backend",
        default="tensorrt" if gpu_architecture() and installed(PACKAGES) else "openvino",
        help=f"comma list of {', '.join(EXPORTED)} (%(default)s)",
    )
    parser.add_argument(
        "--precision",
        help="comma list of "
        + "; ".join(f"{backend}: {', '.join(precisions)}" for backend, precisions in PRECISIONS.items())
        + " (default: the first of each backend; openvino: fp32 on a CPU without bf16)",
    )
    parser.add_argument(
        "--gpu",
        type=_gpus,
        default=(),
        help="comma list of GPUs that TensorRT builds for, as sm_86,sm_89 (default: this machine's)",
    )
    parser.add_argument("--verify", action="store_true", help="build nothing; measure the existing builds again")
    parser.add_argument("--prompts", type=Path, help="file with one prompt per line, instead of the built-in prompts")
    parser.add_argument("--force", action="store_true", help="build everything again, also what is up to date")
    return parser


def _gpus(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if wrong := [name for name in names if not re.fullmatch(r"sm_\d{2,3}", name)]:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)} is no compute capability; write sm_86, or sm_86,sm_89")
    return names


def _prompts(parser: argparse.ArgumentParser, file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"the prompts file {file} cannot be read: {error}")
    if not (prompts := tuple(line for line in lines if line.strip())):
        parser.error(f"the prompts file {file} is empty; write one prompt per line")
    return prompts


def _targets(parser: argparse.ArgumentParser, backends: str, precisions: str | None) -> Targets:
    wanted = precisions.split(",") if precisions else None
    if unknown := set(wanted or ()) - set(get_args(Precision)):
        parser.error(f"unknown precision {', '.join(sorted(unknown))}; choose from {', '.join(get_args(Precision))}")
    targets: list[Target] = []
    for backend in backends.split(","):
        if backend not in EXPORTED:
            parser.error(f"unknown backend {backend!r}; choose from {', '.join(EXPORTED)}")
        built = PRECISIONS[backend]
        chosen = [precision for precision in built if precision in (wanted or [_default_precision(backend)])]
        if not chosen:
            parser.error(f"{backend} is built at {', '.join(built)}; --precision names none of them")
        targets += [(backend, precision) for precision in chosen]
    return tuple(targets)


def _default_precision(backend: BackendName) -> Precision:
    """Return the first precision of a backend, or fp32 on a CPU that does not compute in bfloat16."""
    first = PRECISIONS[backend][0]
    return "fp32" if backend == "openvino" and not has_bf16() else first


def _and_those_there(
    checkpoint: Checkpoint, folder: Path, targets: Targets, gpus: tuple[str, ...]
) -> tuple[Targets, tuple[str, ...]]:
    """Return targets and GPUs, with those already in the folder, because the folder is replaced as a whole."""
    try:
        builds = load_manifest(folder, checkpoint).builds
    except TDMError:
        return targets, gpus
    wanted = {(build.backend, build.precision) for build in builds} | set(targets)
    every = tuple(
        (name, precision) for name in EXPORTED for precision in PRECISIONS[name] if (name, precision) in wanted
    )
    return every, tuple(dict.fromkeys([*gpus, *(build.gpu for build in builds if build.gpu)]))


def _up_to_date(checkpoint: Checkpoint, folder: Path, targets: Targets, gpus: tuple[str, ...]) -> Manifest | None:
    """Return the existing manifest if it has every target, verified and for this machine or these GPUs; else None."""
    from tdm_runtime.checkpoint.manifest import check_build

    try:
        manifest = load_manifest(folder, checkpoint)
        for backend, precision in targets:
            build = manifest.find(backend, precision)
            if build is None:
                return None
            if backend == "tensorrt" and gpus:
                there = {one.gpu for one in manifest.builds if one.name == build.name}
                if not there.issuperset(gpus) or installed(build.requires) != dict(build.requires):
                    return None
                continue
            if not build.pictures:
                return None
            check_build(manifest, build, folder, checkpoint)
    except TDMError:
        return None
    return manifest


def _built(
    checkpoint: Checkpoint,
    folder: Path,
    targets: Targets,
    gpus: tuple[str, ...],
    prompts: tuple[str, ...] | None,
    *,
    anew: bool,
) -> Manifest:
    from export.build import BuildPlan, build_artifacts

    plan = BuildPlan(targets, gpus=gpus)
    with _progress(plan.steps(checkpoint)) as announce:
        manifest = build_artifacts(checkpoint, plan, folder, announce, anew=anew)
    return _verified(checkpoint, manifest, folder, prompts)


def _verified(checkpoint: Checkpoint, manifest: Manifest, folder: Path, prompts: tuple[str, ...] | None) -> Manifest:
    from export.verify import verify
    from tdm_runtime.model.parity import ParityConfig

    config = ParityConfig() if prompts is None else ParityConfig(prompts)
    with _progress(1 + len(manifest.builds) + len(manifest.interfaces)) as announce:
        manifest = verify(checkpoint, manifest, folder, config, announce)
    manifest.save(folder)
    return manifest


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar on stderr, and the total time at the end."""
    from tqdm import tqdm

    started_s = time.monotonic()
    with tqdm(total=total, bar_format="{l_bar}{bar:20}| {n_fmt}/{total_fmt} {desc}", file=sys.stderr) as bar:

        def announce(what: str) -> None:
            if bar.desc:
                bar.update()
            bar.set_description_str(what)

        yield announce
        bar.update()
        bar.set_description_str(f"done in {time.monotonic() - started_s:.0f} s")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
