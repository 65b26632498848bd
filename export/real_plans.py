"""Build TensorRT plans of full-size architectures with random weights in float16, one at a time, without a GPU.

Export and build of every component are a process each, so that their peak memory can be measured and bounded. Results
are kept in OUTPUT/plans.jsonl, and a second run continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from export.errors import ExportError
from export.onnx_export import export_onnx
from export.real_sizes import module_of
from export.tensorrt_build import MAX_BATCH, build_plan, size_ranges
from tdm_runtime.backends.interface import Interface
from tdm_runtime.families.architectures import REAL_SIZES, RealSize

Figures = dict[str, Any]
RESULTS_FILE = "plans.jsonl"
PROGRAMS: tuple[tuple[str, str], ...] = (
    ("sd15", "denoiser"),
    ("sd15", "decoder"),
    ("sdxl", "decoder"),
    ("pixart", "denoiser"),
    ("cogvideox-2b", "denoiser"),
    ("sd3", "denoiser"),
    ("sdxl", "denoiser"),
)
"""(model, program) in `REAL_SIZES`, small ones first."""
INTERFACE_FILE = "interface.json"
_INTERFACE = TypeAdapter(Interface)
POLL_S = 0.2


def export_stage(component: RealSize, folder: Path, gpu: str) -> Figures:
    """Write the ONNX file in float16."""
    started_s = time.monotonic()
    module, interface = module_of(component, torch.float16)
    parameters = sum(weight.numel() for weight in module.parameters())
    export_onnx(module, interface, folder / "model.onnx", title=component.model_class, dtype=torch.float16)
    (folder / INTERFACE_FILE).write_bytes(_INTERFACE.dump_json(interface))
    return {"parameters": parameters, "export_s": time.monotonic() - started_s}


def build_stage(component: RealSize, folder: Path, gpu: str) -> Figures:
    """Build the plan, with the profile that `tdm-export` gives to a checkpoint of this size."""
    interface = _INTERFACE.validate_json((folder / INTERFACE_FILE).read_bytes())
    sizes, frames = component.sizes, component.sizes.get("frames", 1)
    ranges = size_ranges(interface, [(sizes["height"], sizes["width"])], MAX_BATCH, (1, frames, frames))
    started_s = parsed_s = time.monotonic()

    def note_time() -> None:
        nonlocal parsed_s
        parsed_s = time.monotonic()

    plan = folder / "model.plan"
    built = build_plan(folder / "model.onnx", plan, interface, ranges, gpu=gpu, on_parsed=note_time)
    return {
        "parse_s": parsed_s - started_s,
        "build_s": time.monotonic() - parsed_s,
        "plan_bytes": plan.stat().st_size,
        "max_batch": built.sizes["batch"][2],
        "library": f"{built.library} {built.version}",
    }


STAGES: Mapping[str, Callable[[RealSize, Path, str], Figures]] = {"export": export_stage, "build": build_stage}
"""Stages in order, each with a process of its own."""


def measure(model: str, program: str, output: Path, gpu: str, max_s: float, max_bytes: float) -> Figures:
    """Run the stages of one program. A stage that fails or passes a limit is named in the figures as "stopped"."""
    folder = output / f"{model}-{program}"
    folder.mkdir(parents=True, exist_ok=True)
    figures: Figures = {"model": model, "program": program, "gpu": gpu}
    try:
        for stage in STAGES:
            command = [sys.executable, "-m", __spec__.name, "--output", str(output), "--gpu", gpu]
            given = [*command, "--stage", stage, model, program]
            peak, seconds, answer, stopped = bounded(given, max_s, max_bytes)
            figures[f"{stage}_peak_bytes"] = peak
            if stopped is not None:
                return figures | {"stopped": f"{stage}: {stopped} after {seconds:.0f} s, {peak / 2**30:.1f} GiB"}
            figures |= answer
        return figures
    finally:
        shutil.rmtree(folder)


def bounded(command: Sequence[str], max_s: float, max_bytes: float) -> tuple[int, float, Figures, str | None]:
    """Run a command within bounds. Returns its peak memory, seconds, answer, and why it was stopped or failed.

    Args:
        command: prints its answer in JSON as the last line.
        max_s: most seconds.
        max_bytes: most memory, with mapped file pages.
    """
    peak, started_s, stopped = 0, time.monotonic(), None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            peak = max(peak, _memory_bytes(child.pid))
            seconds = time.monotonic() - started_s
            if seconds > max_s or peak > max_bytes:
                stopped = "the time limit" if seconds > max_s else "the memory limit"
                child.kill()
            time.sleep(POLL_S)
        assert child.stdout is not None
        lines = child.stdout.read().splitlines()
    if stopped is None and child.returncode:
        stopped = f"exit status {child.returncode}"
    return peak, time.monotonic() - started_s, {} if stopped else json.loads(lines[-1]), stopped


def _memory_bytes(pid: int) -> int:
    """Return the peak memory of a process, with mapped file pages; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def table(results: Iterable[Figures]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| model | program | parameters, M | GPU | batch up to | export, s | peak, GiB | parse, s | build, s "
        "| peak, GiB | plan, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        start = f"| {one['model']} | {one['program']} "
        if "stopped" in one:
            millions = one.get("parameters", 0) / 1e6
            lines.append(f"{start}| {millions:.1f} | {one['gpu']} | stopped, {one['stopped']} | | | | | | |")
            continue
        lines.append(
            f"{start}| {one['parameters'] / 1e6:.1f} | {one['gpu']} | {one['max_batch']} | {one['export_s']:.0f} "
            f"| {one['export_peak_bytes'] / 2**30:.1f} | {one['parse_s']:.1f} | {one['build_s']:.0f} "
            f"| {one['build_peak_bytes'] / 2**30:.1f} | {one['plan_bytes'] / 2**30:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m export.real_plans", description=__doc__)
    parser.add_argument("programs", nargs="*", metavar="MODEL PROGRAM", help="one program; by default all")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results; needs 20 GB during the run")
    parser.add_argument("--gpu", default="sm_89", help="compute capability to build for (%(default)s)")
    parser.add_argument("--max-minutes", type=float, default=12, help="most minutes of a stage (%(default)s)")
    parser.add_argument("--max-gib", type=float, default=64, help="most memory of a stage (%(default)s)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    wanted = [tuple(given.programs)] if given.programs else list(PROGRAMS)
    if unknown := [one for one in wanted if one not in PROGRAMS]:
        known = ", ".join(" ".join(one) for one in PROGRAMS)
        parser.error(f"{' '.join(unknown[0])} is not known; choose from {known}")
    if given.stage:
        ((model, program),) = wanted
        folder = given.output / f"{model}-{program}"
        try:
            print(json.dumps(STAGES[given.stage](REAL_SIZES[model][program], folder, given.gpu)))
        except ExportError as error:
            print(f"{model} {program}: {error}", file=sys.stderr)
            return 1
        return 0
    file = given.output / RESULTS_FILE
    given.output.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    known_programs = {(one["model"], one["program"], one["gpu"]) for one in results}
    for model, program in wanted:
        if (model, program, given.gpu) in known_programs:
            continue
        print(f"{model} {program} ...", file=sys.stderr, flush=True)
        results.append(measure(model, program, given.output, given.gpu, 60 * given.max_minutes, given.max_gib * 2**30))
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(results[-1]) + "\n")
    print(table(results))
    return int(any("stopped" in one for one in results))


if __name__ == "__main__":
    sys.exit(main())
