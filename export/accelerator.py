"""`python -m export.accelerator --output DIR`: build, verify and time every backend on this machine's GPU.

Models: the embedded checkpoint, and Stable Diffusion 1.5 at 512x512 and SDXL at 1024x1024 with random weights, each at
4 steps. Results are kept in DIR, and a second run continues where the first one stopped. `--device cpu --tiny` tries
only the script.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from export.accelerator_report import Report, Row, saved_report, table
from export.onnx_export import export_onnx
from export.real_sizes import module_of
from export.tensorrt_build import TIMING_CACHE, build_plan, require_gpus
from export.verify import component_parity
from tdm_runtime.backends import TORCH_DTYPES, Backend, BackendName, Precision
from tdm_runtime.backends.interface import ComponentName, Interface
from tdm_runtime.backends.machine import TOOLS, gpu_architecture, installed
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.checkpoint.recipe import load_recipe
from tdm_runtime.errors import BackendError
from tdm_runtime.families.architectures import REAL_SIZES, RealSize
from tdm_runtime.families.call import denoiser_arguments
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.model.components import load_component
from tdm_runtime.model.similarity import psnr_db
from tdm_runtime.sampling.sampler import solve

STEPS = 4
PARTS: tuple[ComponentName, ...] = ("text_encoder", "denoiser", "decoder")
"""Components that are measured; a model may lack some of them here."""
MODELS = ("embedded", "sd15", "sdxl")
CEILING_OF: Mapping[Precision, str] = {"fp32": "tf32", "bf16": "bf16", "fp16": "fp16"}
"""Precision -> the type whose matrix product is its ceiling. float32 convolutions run in TF32 by default."""
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Way:
    """Backend and precision that run a model."""

    backend: BackendName
    precision: Precision

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}"


WAYS: tuple[Way, ...] = (
    Way("torch", "fp32"),
    Way("torch", "bf16"),
    Way("torch-compiled", "bf16"),
    Way("cuda-graphs", "fp32"),
    Way("cuda-graphs", "bf16"),
    Way("onnxruntime", "fp32"),
    Way("onnxruntime", "fp16"),
    Way("tensorrt", "bf16"),
    Way("tensorrt", "fp16"),
)


@dataclass(frozen=True)
class Part:
    """One component of a model."""

    module: nn.Module
    """Module in float32 on the CPU. Every way takes a copy of it."""
    interface: Interface
    sizes: Mapping[str, int]
    """Sizes of one picture in latents, without the batch."""

    def inputs(self, batch: int, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """Return random inputs of a call."""
        sizes = {"batch": batch, **self.sizes}
        return tuple(t.to(device) for t in self.interface.random_inputs(sizes, torch.Generator().manual_seed(seed)))

    def flops(self, batch: int) -> int:
        """Return the floating-point operations of a call, counting matrix products and convolutions only."""
        weights = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        on_meta = {name: weight.to("meta") for name, weight in weights.items()}
        names = [spec.name for spec in self.interface.inputs]
        inputs = dict(zip(names, self.inputs(batch, torch.device("meta")), strict=True))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            torch.func.functional_call(self.module, on_meta, kwargs=inputs)
        return int(counter.get_total_flops())


Model = Mapping[ComponentName, Part]
Backends = Mapping[ComponentName, Backend]


# -- models -----------------------------------------------------------------------------------


def load(name: str, tiny: bool) -> Model:
    """Load the components of a model, with real weights (embedded) or random ones."""
    if name == "embedded":
        checkpoint = open_checkpoint(DEFAULT_CHECKPOINT)
        width, height = checkpoint.recipe.native_sizes[0]
        _, latent_height, latent_width = checkpoint.geometry.latent_shape(width, height)
        latents = {"height": latent_height, "width": latent_width}
        return {part: Part(*load_component(checkpoint, part), latents) for part in PARTS}
    real = REAL_SIZES[name]
    chosen = {part: _tiny(name, part, real[part]) if tiny else real[part] for part in PARTS if part in real}
    sizes = {part: {k: v for k, v in one.sizes.items() if k != "batch"} for part, one in chosen.items()}
    return {part: Part(*module_of(one), sizes[part]) for part, one in chosen.items()}


def _tiny(name: str, part: ComponentName, real: RealSize) -> RealSize:
    """Return the same architecture with few channels."""
    unet = {"layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 16, "time_cond_proj_dim": 8}
    changes: Mapping[tuple[str, str], Mapping[str, object]] = {
        ("sd15", "denoiser"): unet | {"block_out_channels": (16, 16, 32, 32), "attention_head_dim": 2},
        ("sdxl", "denoiser"): unet
        | {
            "block_out_channels": (16, 16, 32),
            "transformer_layers_per_block": (1, 1, 1),
            "attention_head_dim": (2, 2, 4),
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 36,
        },
        ("sd15", "text_encoder"): {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    }
    vae = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    sizes = {size: 1 if size == "batch" else 16 for size in real.sizes}
    return replace(real, config={**real.config, **changes.get((name, part), vae)}, sizes=sizes)


# -- ways -------------------------------------------------------------------------------------


def opened(way: Way, part: Part, title: str, device: torch.device, max_batch: int, folder: Path) -> Backend:
    """Load or build one component for one way.

    Raises:
        BackendError: this machine lacks a library or device that the way needs.
        ExportError: the component cannot be built.
    """
    dtype = TORCH_DTYPES[way.precision]
    if way.backend == "torch":
        from tdm_runtime.backends.pytorch import TorchBackend

        return TorchBackend(copy.deepcopy(part.module), device, dtype, interface=part.interface)
    if way.backend == "torch-compiled":
        from tdm_runtime.backends.pytorch import CompiledTorchBackend

        return CompiledTorchBackend(copy.deepcopy(part.module), device, dtype, interface=part.interface)
    if way.backend == "cuda-graphs":
        from tdm_runtime.backends.cuda_graphs import CudaGraphBackend

        return CudaGraphBackend(copy.deepcopy(part.module), device, dtype, part.interface)
    if way.backend == "onnxruntime":
        from tdm_runtime.backends.onnxruntime import OnnxRuntimeBackend, require_provider

        require_provider("cuda" if device.type == "cuda" else "cpu", device)
        return OnnxRuntimeBackend(_onnx(part, dtype, title, folder), part.interface, device)
    if way.backend == "tensorrt":
        from tdm_runtime.backends.tensorrt import TensorRTBackend

        require_gpus(way.precision, ())
        sizes = {name: (size, size, size) for name, size in part.sizes.items() if name in part.interface.size_names}
        plan = folder / f"{title}.plan"
        onnx_file = _onnx(part, dtype, title, folder)
        ranges = sizes | {"batch": (1, max_batch, max_batch)}
        build_plan(onnx_file, plan, part.interface, ranges, timing_cache=folder / TIMING_CACHE)
        return TensorRTBackend(plan, part.interface, device)
    raise BackendError(
        f"{way.backend} is not measured here; choose one of {', '.join(dict.fromkeys(one.backend for one in WAYS))}"
    )


def _onnx(part: Part, dtype: torch.dtype, title: str, folder: Path) -> Path:
    file = folder / f"{title}.onnx"
    export_onnx(part.module, part.interface, file, title=title, dtype=dtype)
    return file


@torch.inference_mode()
def picture(backends: Backends, parts: Model, device: torch.device) -> Tensor:
    """Make one picture, uint8 [1, H, W, 3], as `tdm_runtime.pipeline.generate` does, from random conditioning."""
    recipe = load_recipe(DEFAULT_CHECKPOINT)
    table = recipe.step_table(STEPS, *recipe.native_sizes[0])
    names = [spec.name for spec in parts["denoiser"].interface.inputs]
    drawn = dict(zip(names, parts["denoiser"].inputs(1, device), strict=True))
    noise = drawn.pop("latents")
    for name in ("timesteps", "step_counts"):
        del drawn[name]
    if "text_encoder" in backends:
        drawn["prompt_embeds"] = backends["text_encoder"](*parts["text_encoder"].inputs(1, device))
    prompt, step_counts = Conditioning(**drawn), torch.tensor([STEPS], device=device)

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        return backends["denoiser"](*denoiser_arguments(names, latents, timesteps, step_counts, prompt))

    *_, (latents, _) = solve(table, noise, predict)
    return backends["decoder"](latents)


# -- measuring --------------------------------------------------------------------------------


def call_ms(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median time of a call by CUDA events. Each call starts on an idle GPU, so launch time counts."""
    for _ in range(min(WARM_UP_CALLS, rounds)):
        call()
    return statistics.median(_one_call_ms(call, device) for _ in range(rounds))


def _one_call_ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started_s = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started_s)
    event: Callable[..., Any] = torch.cuda.Event  # torch has no type for it
    started, ended = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize(device)
    started.record()
    call()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended))


def ceilings_tflops(device: torch.device, side: int, rounds: int) -> dict[str, float]:
    """Return the TFLOP/s of a square matrix product, by type. Without TF32 hardware, tf32 equals fp32."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("tf32", torch.float32), *list(TORCH_DTYPES.items())[1:]):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        with _tf32(name == "tf32"):
            found[name] = 2 * side**3 / call_ms(partial(torch.mm, a, b), device, rounds) / 1e9
    return found


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 for float32 products and convolutions within the block."""
    owners: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [owner.allow_tf32 for owner in owners]
    try:
        for owner in owners:
            owner.allow_tf32 = allowed
        yield
    finally:
        for owner, was in zip(owners, before, strict=True):
            owner.allow_tf32 = was


@dataclass(frozen=True)
class Reference:
    """Outputs and cost of torch float32 without TF32."""

    outputs: Mapping[tuple[str, int], Tensor]
    """(component or "picture", batch) -> output on the CPU."""
    flops: Mapping[tuple[str, int], int]
    """(component or "picture", batch) -> floating-point operations."""


def calls_of(parts: Model, batches: Sequence[int]) -> list[tuple[ComponentName, int]]:
    """Return the measured calls. Only the denoiser is called in batches."""
    return [(name, batch) for name in parts for batch in (batches if name == "denoiser" else (1,))]


def reference_of(parts: Model, device: torch.device, batches: Sequence[int], folder: Path) -> Reference:
    """Run every measured call in torch float32 without TF32."""
    outputs: dict[tuple[str, int], Tensor] = {}
    with _tf32(False):
        backends = {n: opened(Way("torch", "fp32"), part, n, device, 1, folder) for n, part in parts.items()}
        for name, batch in calls_of(parts, batches):
            outputs[name, batch] = backends[name](*parts[name].inputs(batch, device)).cpu()
        outputs["picture", 1] = picture(backends, parts, device).cpu()
    flops: dict[tuple[str, int], int] = {call: parts[call[0]].flops(call[1]) for call in calls_of(parts, batches)}
    once = sum(flops[name, 1] for name in parts if name != "denoiser")
    flops["picture", 1] = once + STEPS * parts["denoiser"].flops(1)
    return Reference(outputs, flops)


def measured(
    name: str,
    parts: Model,
    way: Way,
    reference: Reference,
    ceilings: Mapping[str, float],
    given: Settings,
) -> Iterator[Row]:
    """Yield the rows of one way: its components, then the picture. A failure yields a last row with the reason."""
    blank = Row(name, way.name, "picture", 1)
    backends: dict[ComponentName, Backend] = {}
    try:
        for part in parts:
            blank = replace(blank, part=part)
            title = f"{name}-{part}-{way.backend}-{way.precision}"
            backends[part] = opened(way, parts[part], title, given.device, max(given.batches), given.output)
        calls: list[tuple[str, int, Callable[[], Tensor]]] = [
            (part, batch, partial(backends[part], *parts[part].inputs(batch, given.device)))
            for part, batch in calls_of(parts, given.batches)
        ]
        calls.append(("picture", 1, partial(picture, backends, parts, given.device)))
        for part_name, batch, call in calls:
            blank = replace(blank, part=part_name, batch=batch)
            output, expected = call().cpu(), reference.outputs[part_name, batch]
            ms = call_ms(call, given.device, given.rounds)
            tflops = reference.flops[part_name, batch] / ms / 1e9
            yield replace(
                blank,
                ms=ms,
                tflops=tflops,
                of_ceiling=tflops / ceilings[CEILING_OF[way.precision]],
                relative_l2=component_parity(expected, output).relative_l2,
                psnr_db=psnr_db(expected.numpy(), output.numpy()) if output.dtype == torch.uint8 else None,
            )
    except Exception as error:  # for example a missing library or too little memory; the other ways go on
        yield replace(blank, reason=" ".join(str(error).split())[:300] or type(error).__name__)


@dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    device: torch.device
    output: Path
    models: tuple[str, ...]
    ways: tuple[Way, ...]
    batches: tuple[int, ...]
    rounds: int
    tiny: bool


def measure(given: Settings) -> Report:
    """Measure what the report of this environment lacks. The report is saved after every way."""
    given.output.mkdir(parents=True, exist_ok=True)
    report = _known(given)
    for name in given.models:
        done = {(row.model, row.way) for row in report.rows if not row.reason}
        ways = [way for way in given.ways if (name, way.name) not in done]
        if not ways:
            continue
        print(f"{name}: reference", file=sys.stderr, flush=True)
        parts = load(name, given.tiny)
        reference = reference_of(parts, given.device, given.batches, given.output)
        for way in ways:
            print(f"{name}: {way.name}", file=sys.stderr, flush=True)
            others = [row for row in report.rows if (row.model, row.way) != (name, way.name)]
            rows = measured(name, parts, way, reference, report.ceilings_tflops, given)
            report = replace(report, rows=tuple(sorted([*others, *rows], key=_place)))
            report.save(given.output)
            _clear(given)
    return report


def _place(row: Row) -> tuple[int, int]:
    """Return the sort key of a row, so that the order of measurement does not matter."""
    return MODELS.index(row.model), [way.name for way in WAYS].index(row.way)


def _known(given: Settings) -> Report:
    """Return the report in the folder if it is of this environment; else a new one with measured ceilings."""
    here = environment(given)
    report = saved_report(given.output)
    if report is not None and report.environment == here:
        return report
    return Report(here, ceilings_tflops(given.device, 256 if given.tiny else 8192, given.rounds))


def _clear(given: Settings) -> None:
    """Free the memory of a way and delete its files."""
    gc.collect()
    if given.device.type == "cuda":
        torch.cuda.empty_cache()
    for pattern in ("*.onnx", "*.onnx.data", "*.plan", "*.plan.json"):
        for file in given.output.glob(pattern):
            file.unlink()


def environment(given: Settings) -> dict[str, str]:
    """Return the hardware, versions and settings that the numbers depend on."""
    found = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    if given.device.type == "cuda":
        card = torch.cuda.get_device_properties(given.device)
        found |= {
            "gpu": f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {gpu_architecture()}",
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        }
    settings = {"batches": " ".join(map(str, given.batches)), "rounds": str(given.rounds), "tiny": str(given.tiny)}
    return found | installed(TOOLS) | settings


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 1 if the torch backend could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m export.accelerator", description=__doc__)
    backends = get_args(BackendName)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the report; needs about 15 GB during the run"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--backends", nargs="+", choices=backends, help="default: all")
    parser.add_argument("--precisions", nargs="+", choices=CEILING_OF, help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="batch sizes of the denoiser (1 8)")
    parser.add_argument("--rounds", type=int, default=20, help="number of timed calls per median (%(default)s)")
    parser.add_argument("--device", default="cuda", help="torch device (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny models and matrices, only to try the script")
    asked = parser.parse_args(arguments)
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; run this on a machine with an NVIDIA GPU, or try --device cpu --tiny")
    if min(asked.batches) < 1 or asked.rounds < 1:
        parser.error(f"--batches is {asked.batches} and --rounds is {asked.rounds}; all must be at least 1")
    ways = tuple(
        way
        for way in WAYS
        if way.backend in (asked.backends or backends) and way.precision in (asked.precisions or CEILING_OF)
    )
    batches = tuple(sorted({1, *cast(list[int], asked.batches)}))
    report = measure(
        Settings(torch.device(asked.device), asked.output, tuple(asked.models), ways, batches, asked.rounds, asked.tiny)
    )
    print(table(report))
    return 1 if any(row.reason for row in report.rows if row.way.startswith("torch ")) else 0


if __name__ == "__main__":
    sys.exit(main())
