"""Export, convert and run full-size architectures with random weights on this machine, one at a time.

Every stage of every component runs in its own process, so that its peak memory can be measured. Results are kept in
OUTPUT/results.jsonl, and a second run continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.onnx_export import export_onnx
from export.openvino_build import write_ir
from tdm_runtime.backends.interface import Interface
from tdm_runtime.checkpoint.folder import (
    DEFAULT_CHECKPOINT,
    open_checkpoint,
    weight_hashes,
)
from tdm_runtime.checkpoint.folder_files import TINY_VAE
from tdm_runtime.checkpoint.recipe import RECIPE_FILE, Recipe, load_recipe
from tdm_runtime.checkpoint.stock.implied_recipe import implied_recipe
from tdm_runtime.checkpoint.stock.pipeline_folder import MODEL_INDEX
from tdm_runtime.families import FAMILIES, Family, decoder_for, denoiser_for
from tdm_runtime.families.architectures import REAL_SIZES, STOCK_TEXT, RealSize, random_model
from tdm_runtime.families.latent_space import ClipDecoderModule, ClipPart
from tdm_runtime.model.components import TextEncoderModule

Figures = dict[str, Any]
RESULTS_FILE = "results.jsonl"
MAX_CALLS = 5
MAX_CALLS_S = 120.0
"""Calls repeat until `MAX_CALLS` or this time is reached. The first call is left out unless it is the only one."""
_PARTS: Mapping[str, str] = {"text_encoder": "text_encoder", "decoder": "vae", "tiny_decoder": TINY_VAE}
"""Component -> folder; the denoiser's is named by its family."""


@dataclass(frozen=True)
class StockFolder:
    """What the folder of a stock pipeline has beside its weights."""

    family: Family
    scheduler: str
    """Class in diffusers."""
    settings: Mapping[str, Any]
    """Of the scheduler, where they differ from the class's own."""
    steps: tuple[int, ...] = (4,)
    denoiser_changes: Mapping[str, Any] = field(default_factory=dict)


_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
STOCK_FOLDERS: Mapping[str, StockFolder] = {
    "sdxl": StockFolder(
        FAMILIES["sdxl"], "EulerDiscreteScheduler", _SD_BETAS, denoiser_changes={"time_cond_proj_dim": None}
    ),
    "sd3": StockFolder(FAMILIES["sd3"], "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}
"""Models that `--checkpoint` writes as a stock folder without an input for K, by the name in `REAL_SIZES`."""
WRITTEN = ("sd15", *STOCK_FOLDERS)


def write_random(model: str, folder: Path, pixels: int | None = None) -> None:
    """Write a checkpoint of full size with random weights, float16 on disk.

    Tokenizers are those of the embedded checkpoint. sd15 has its scheduler, recipe and input for K too.

    Args:
        pixels: width and height of its native size; the published one where it is absent.

    Raises:
        CheckpointError: the written checkpoint cannot be served.
    """
    folder.mkdir(parents=True, exist_ok=True)
    family = STOCK_FOLDERS[model].family if model in STOCK_FOLDERS else FAMILIES["stable_diffusion"]
    changes = STOCK_FOLDERS[model].denoiser_changes if model in STOCK_FOLDERS else {}
    parts = dict(STOCK_TEXT.get(model, {}))
    for name, component in REAL_SIZES[model].items():
        is_denoiser = name == "denoiser"
        part = family.denoiser_folder if is_denoiser else _PARTS[name]
        parts[part] = replace(component, config={**component.config, **changes}) if is_denoiser else component
    for part, component in parts.items():
        random: Any = random_model(component)
        random.to(torch.float16).save_pretrained(folder / part)
        del random
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in parts if part.startswith("text_encoder")]
    for part in tokenizers:
        _copy_tokenizer(DEFAULT_CHECKPOINT / "tokenizer", folder / part, max_tokens=77)
    if model in STOCK_FOLDERS:
        recipe = _stock_recipe(STOCK_FOLDERS[model], parts, tokenizers, folder)
    else:
        shutil.copytree(DEFAULT_CHECKPOINT / "scheduler", folder / "scheduler", dirs_exist_ok=True)
        shutil.copy(DEFAULT_CHECKPOINT / MODEL_INDEX, folder)
        recipe = load_recipe(DEFAULT_CHECKPOINT)
    latents = REAL_SIZES[model]["decoder"].sizes
    size = (pixels, pixels) if pixels else (8 * latents["width"], 8 * latents["height"])
    recipe = replace(recipe, name=f"{model}-random", native_sizes=(size,), files=weight_hashes(folder))
    (folder / RECIPE_FILE).write_text(recipe.to_json(), encoding="utf-8")
    open_checkpoint(folder)


def _stock_recipe(stock: StockFolder, parts: Mapping[str, RealSize], tokenizers: Sequence[str], folder: Path) -> Recipe:
    """Write scheduler and model_index.json. Returns the recipe that they imply."""
    import diffusers

    getattr(diffusers, stock.scheduler)(**stock.settings).save_pretrained(folder / "scheduler")
    families = {part: "transformers" if part.startswith("text_encoder") else "diffusers" for part in parts}
    index: dict[str, Any] = {"_class_name": stock.family.pipelines[0]}
    index |= {part: [None, None] for part in stock.family.optional_text}
    index |= {part: [families[part], component.model_class] for part, component in parts.items()}
    index |= {part: ["transformers", "CLIPTokenizer"] for part in tokenizers}
    index["scheduler"] = ["diffusers", stock.scheduler]
    (folder / MODEL_INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return implied_recipe(stock.family, folder, stock.steps)


def _copy_tokenizer(source: Path, target: Path, max_tokens: int) -> None:
    target.mkdir(exist_ok=True)
    shutil.copy(source / "tokenizer.json", target)
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"model_max_length": max_tokens, "max_length": max_tokens}
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def module_of(component: RealSize, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Interface]:
    """Return a component with random weights, and its interface. The step condition K has random weights too."""
    model: Any = random_model(component, dtype=dtype)
    if component.model_class == "CLIPTextModel":
        text_encoder = TextEncoderModule(model)
        return text_encoder, text_encoder.interface()
    if component.model_class.startswith("Autoencoder"):
        decoder = decoder_for(model)
        if not isinstance(decoder, ClipDecoderModule):
            return decoder, decoder.interface()
        part = ClipPart(decoder, next(kind for kind in decoder.kinds if kind.name == component.part))
        return part, part.interface()
    denoiser = denoiser_for(model)
    if denoiser.condition_dim is None:
        denoiser.add_step_condition()
        nn.init.normal_(denoiser.timestep_embedding.cond_proj.weight, std=1 / 16)
    return denoiser, denoiser.interface(component.tokens)


def _export(component: RealSize, folder: Path) -> Figures:
    """Compute reference outputs with torch at the small shape, then write the ONNX file."""
    module, interface = module_of(component)
    inputs = interface.random_inputs(component.small, torch.Generator().manual_seed(1))
    named = {spec.name: tensor for spec, tensor in zip(interface.inputs, inputs, strict=True)}
    with torch.no_grad():
        expected = module(**named)
    if component.part:
        expected = expected[0]  # pixels, before the cache
    assert torch.isfinite(expected).all(), "random weights of this scale overflow"
    _save_arrays(folder / "small.npz", named | {"expected": expected})
    published = interface.random_inputs(component.sizes, torch.Generator().manual_seed(2))
    _save_arrays(folder / "published.npz", dict(zip(named, published, strict=True)))
    start, cpu_start = time.monotonic(), time.process_time()
    export_onnx(module, interface, folder / "model.onnx", title=component.model_class)
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    onnx_bytes = (folder / "model.onnx.data").stat().st_size
    return {
        "parameters": onnx_bytes // 4,
        "export_s": seconds,
        "export_cpu_s": cpu_seconds,
        "onnx_bytes": onnx_bytes,
    }


def _save_arrays(file: Path, tensors: Mapping[str, Tensor]) -> None:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(file, **arrays)


def _convert(component: RealSize, folder: Path) -> Figures:
    """Write the OpenVINO IR with float16 weights, as `tdm-export` does, and delete the ONNX file."""
    start = time.monotonic()
    write_ir(folder / "model.onnx", folder / "model.xml")
    _mark_compressed(folder / "model.xml")
    seconds = time.monotonic() - start
    for file in folder.glob("model.onnx*"):
        file.unlink()
    return {"convert_s": seconds, "ir_bytes": (folder / "model.bin").stat().st_size}


def _mark_compressed(file: Path) -> None:
    """Mark the conversions of float16 weights as decompression; otherwise OpenVINO makes float32 copies.

    Loading then needs a third less memory, 2.2 GiB for Stable Diffusion 1.5, and computes the same numbers.
    """
    tree = ElementTree.parse(file)
    layers = list(tree.iter("layer"))
    halves = {layer.get("name") for layer in layers if layer.get("type") == "Const"}
    for layer in layers:
        if layer.get("type") == "Convert" and f"{layer.get('name')}/half" in halves and layer.find("rt_info") is None:
            marks = ElementTree.Element("rt_info")
            ElementTree.SubElement(marks, "attribute", name="decompression", version="0")
            layer.insert(1, marks)  # after <data>
    tree.write(file)


def _parity(component: RealSize, folder: Path) -> Figures:
    """Measure the relative L2 distance to torch at the small shape, in both precisions. Weights are float16."""
    import openvino

    tensors = dict(np.load(folder / "small.npz"))
    expected = tensors.pop("expected")
    figures: Figures = {}
    for precision in ("f32", "bf16"):
        model = openvino.Core().read_model(folder / "model.xml")
        program = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        figures[f"relative_l2_{precision}"] = _relative_l2(program(tensors)[0], expected)
        del program, model
    return figures


def _run(component: RealSize, folder: Path) -> Figures:
    """Time calls at the published shape."""
    import openvino

    tensors = dict(np.load(folder / "published.npz"))
    start = time.monotonic()
    model = openvino.Core().read_model(folder / "model.xml")
    model.reshape({name: list(tensor.shape) for name, tensor in tensors.items()})
    program = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    figures: Figures = {"load_s": time.monotonic() - start}
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    while len(seconds) <= MAX_CALLS and sum(seconds) < MAX_CALLS_S:
        start, cpu_start = time.monotonic(), time.process_time()
        output = program(tensors)[0]
        seconds.append(time.monotonic() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    assert np.isfinite(output).all(), "the output is not finite"
    warm = slice(1, None) if len(seconds) > 1 else slice(None)
    return figures | {
        "call_s": statistics.median(seconds[warm]),
        "call_cpu_s": statistics.median(cpu_seconds[warm]),
        "calls": len(seconds[warm]),
        "output_shape": list(output.shape),
    }


STAGES: Mapping[str, Callable[[RealSize, Path], Figures]] = {
    "export": _export,
    "convert": _convert,
    "parity": _parity,
    "run": _run,
}
"""Stages in order. Each writes into the component's folder what the next one needs."""


def _relative_l2(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the relative L2 distance; pixels are centred first."""
    centre = 127.5 if expected.dtype == np.uint8 else 0.0
    reference = expected.astype(np.float64) - centre
    return float(np.linalg.norm(actual - centre - reference) / np.linalg.norm(reference))


def _peak_rss_bytes() -> int:
    """Return the peak memory of this process, including mapped file pages."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure(model: str, component: str, output: Path) -> Figures:
    """Run all stages of one component, each in its own process.

    Raises:
        subprocess.CalledProcessError: a stage failed; its output went to stderr.
    """
    folder = output / f"{model}-{component}"
    folder.mkdir(parents=True, exist_ok=True)
    figures: Figures = {"model": model, "component": component}
    try:
        for stage in STAGES:
            command = [sys.executable, "-m", __spec__.name, model, "--output", str(output)]
            answer = subprocess.run(
                [*command, "--component", component, "--stage", stage], check=True, stdout=subprocess.PIPE, text=True
            )
            figures |= json.loads(answer.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder)
    return figures


def table(results: Iterable[Figures]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| model | component | parameters, M | export, s | CPU s | peak, GiB | IR, GiB | L2 f32 | L2 bf16 "
        "| shape out | load, s | call, s (calls) | CPU s | peak, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        note = REAL_SIZES[one["model"]][one["component"]].note
        lines.append(
            f"| {one['model']} | {one['component']} | {one['parameters'] / 1e6:.1f} | {one['export_s']:.0f} "
            f"| {one['export_cpu_s']:.0f} | {one['export_peak_bytes'] / 2**30:.1f} | {one['ir_bytes'] / 2**30:.2f} "
            f"| {one['relative_l2_f32']:.0e} | {one['relative_l2_bf16']:.0e} "
            f"| {'x'.join(map(str, one['output_shape']))}{note and f' ({note})'} | {one['load_s']:.1f} "
            f"| {one['call_s']:.3g} ({one['calls']}) | {one['call_cpu_s']:.3g} | {one['run_peak_bytes'] / 2**30:.1f} |"
        )
    return "\n".join(lines)


def _measure_all(models: Sequence[str], output: Path) -> int:
    """Measure the components that have no results yet. Returns the number of failed components."""
    file = output / RESULTS_FILE
    output.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    known = {(one["model"], one["component"]) for one in results}
    failures = 0
    for model in models:
        for component in REAL_SIZES[model]:
            if (model, component) in known:
                continue
            print(f"{model} {component} ...", file=sys.stderr, flush=True)
            try:
                results.append(measure(model, component, output))
            except subprocess.CalledProcessError as error:
                print(
                    f"{model} {component} failed: {error.cmd[-1]} exited with status {error.returncode}",
                    file=sys.stderr,
                )
                failures += 1
                continue
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(results[-1]) + "\n")
    print(table(results))
    return failures


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m export.real_sizes", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(REAL_SIZES)} (default: all)")
    parser.add_argument("--output", type=Path, help="folder for the results; needs several GB during the run")
    parser.add_argument(
        "--checkpoint",
        nargs=2,
        metavar=("MODEL", "DIR"),
        help=f"write a checkpoint with random weights; MODEL is {', '.join(WRITTEN)}",
    )
    parser.add_argument(
        "--pixels", type=int, help="width and height of that checkpoint's pictures (the published ones)"
    )
    parser.add_argument("--component", help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.models) - set(REAL_SIZES)):
        parser.error(f"unknown model {', '.join(unknown)}; choose from {', '.join(REAL_SIZES)}")
    if given.checkpoint:
        if given.checkpoint[0] not in WRITTEN:
            parser.error(f"--checkpoint cannot write {given.checkpoint[0]}; it writes {', '.join(WRITTEN)}")
        write_random(given.checkpoint[0], Path(given.checkpoint[1]), given.pixels)
        return 0
    if given.output is None:
        parser.error("give --output DIR or --checkpoint MODEL DIR")
    if given.stage:
        model, component = given.models[0], given.component
        figures = STAGES[given.stage](REAL_SIZES[model][component], given.output / f"{model}-{component}")
        print(json.dumps(figures | {f"{given.stage}_peak_bytes": _peak_rss_bytes()}))
        return 0
    return 1 if _measure_all(given.models or list(REAL_SIZES), given.output) else 0


if __name__ == "__main__":
    sys.exit(main())
