"""Build TensorRT plans from ONNX files. Where the library can, plans let their weights be replaced without a rebuild.

Networks are strongly typed: a plan computes in the precision of the ONNX file. With tensorrt-rtx plans are built on any
machine, as the tests do; with tensorrt on the GPU that runs them, which has not been tried yet.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from export.errors import ExportError
from export.fp8_onnx import record_calls, write_fp8_onnx
from export.onnx_export import export_onnx
from export.prompts import CALIBRATION
from tdm_runtime.backends import TORCH_DTYPES, Precision
from tdm_runtime.backends.interface import ComponentName, Interface, name_and_factor
from tdm_runtime.backends.machine import installed
from tdm_runtime.backends.tensorrt import BuiltFor, SizeRange, built_for_file
from tdm_runtime.backends.tensorrt_library import import_tensorrt, parser_errors
from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.checkpoint.manifest import Build, BuiltComponent, Manifest, default_artifacts
from tdm_runtime.errors import BackendError
from tdm_runtime.model.components import component_names, load_programs, program_names
from tdm_runtime.model.decoder import MAX_CALL_PIXELS
from tdm_runtime.whole_file import write_whole

MAX_BATCH = 8
"""Most samples of one call, the engine's default batch size. Larger batches are split."""
TIMING_CACHE = "tensorrt-timing.cache"
"""File in the folder of all artifacts; its kernel times are shared by every build on this machine."""
LEAST_CAPABILITY: Mapping[Precision, tuple[int, int]] = {"bf16": (8, 0), "fp8": (8, 9)}
"""Precision -> least compute capability. Other precisions run on every GPU that TensorRT supports."""
TOKENS: SizeRange = (1, 256, 1024)
"""Tokens of a prompt, where a denoiser takes any number. Stock pipelines pass at most 77 of CLIP and 512 of T5."""
MAX_ELEMENTS = 2**31 - 1
"""Most elements of a tensor: TensorRT's convolutions count them with 32 bits."""


def build_tensorrt(
    checkpoint: Checkpoint,
    manifest: Manifest,
    precision: Precision,
    folder: Path,
    announce: Callable[[str], None],
    gpus: Sequence[str] = (),
) -> list[Build]:
    """Build every component of a checkpoint whose float32 ONNX files are in `folder`. Returns a build for each GPU.

    Args:
        precision: at fp8 only the denoiser's matrix products are fp8, and everything else is fp16.
        announce: receives a description of each component's build.
        gpus: compute capabilities to build for, as "sm_86"; by default this machine's.

    Raises:
        BackendError: TensorRT or the GPU is missing, or a GPU does not support the precision.
        ExportError: a component cannot be built; the message names it and the reason.
    """
    library, gpus = import_tensorrt(), require_gpus(precision, gpus)
    timing_cache = default_artifacts(checkpoint).parent / TIMING_CACHE
    timing_cache.parent.mkdir(parents=True, exist_ok=True)
    components: dict[str, dict[str, BuiltComponent]] = {gpu: {} for gpu in gpus}
    profiles: dict[str, Mapping[str, SizeRange]] = {}
    for component in component_names(checkpoint):
        latents = _latent_sizes(checkpoint, component)
        for name, onnx_file in _onnx_in(precision, checkpoint, component, folder):
            announce(f"{name}: ONNX to TensorRT {precision}")
            interface = manifest.interfaces[name]
            sizes = size_ranges(interface, latents, MAX_BATCH, _latent_frames(checkpoint))
            for gpu in gpus:
                plan = folder / f"{name}.{precision}.{gpu}.plan"
                profiles[name] = build_plan(onnx_file, plan, interface, sizes, gpu=gpu, timing_cache=timing_cache).sizes
                files = {file.name: file_sha256(file) for file in (plan, built_for_file(plan))}
                components[gpu][name] = BuiltComponent(files)
            for left in folder.glob(f"{name}.{precision}.onnx*"):
                left.unlink()
    requires = installed([library.package])
    return [Build("tensorrt", precision, built, requires, gpu, profiles) for gpu, built in components.items()]


def _onnx_in(
    precision: Precision, checkpoint: Checkpoint, component: ComponentName, folder: Path
) -> Iterator[tuple[str, Path]]:
    """Yield each program of a component with its ONNX file in a precision, which is written unless it is float32."""
    dtype = TORCH_DTYPES["fp16" if precision == "fp8" else precision]
    if component in ("encoder", "decoder"):
        dtype = checkpoint.decoder_dtype(dtype)
    if dtype == torch.float32:
        yield from ((name, folder / f"{name}.onnx") for name in program_names(checkpoint, component))
        return
    written = []
    for name, (module, interface) in load_programs(checkpoint, component).items():
        file = folder / f"{name}.{precision}.onnx"
        export_onnx(module, interface, file, title=name, dtype=dtype)
        written.append((name, file))
    del module
    gc.collect()  # free the weights, because TensorRT needs the memory next
    if precision == "fp8" and component == "denoiser":
        write_fp8_onnx(file, file, record_calls(checkpoint, CALIBRATION))
    yield from written


def _latent_frames(checkpoint: Checkpoint) -> SizeRange:
    """Return the latent frames of clips: of one frame, of the default number and of the most; 1 for pictures."""
    if (frames := checkpoint.recipe.frames) is None:
        return (1, 1, 1)
    size = checkpoint.recipe.native_sizes[0]
    default, most = (checkpoint.geometry.latent_shape(*size, n)[1] for n in (frames.default, frames.max_frames))
    return (1, default, most)


def _latent_sizes(checkpoint: Checkpoint, name: ComponentName) -> list[tuple[int, int]]:
    """Return (height, width) of every call, in latents; decoders of tiled pictures get the size of a tile."""
    geometry = checkpoint.geometry
    shapes = (geometry.latent_shape(width, height) for width, height in checkpoint.recipe.native_sizes)
    sizes = [(shape[-2], shape[-1]) for shape in shapes]
    if not name.endswith("decoder"):
        return sizes
    side = math.isqrt(MAX_CALL_PIXELS // geometry.spatial_compression**2)
    return [(h, w) if h * w <= side**2 else (min(h, side), min(w, side)) for h, w in sizes]


def size_ranges(
    interface: Interface, latent_sizes: Iterable[tuple[int, int]], max_batch: int, frames: SizeRange = (1, 1, 1)
) -> Mapping[str, SizeRange]:
    """Return the range that a plan accepts, for each size that the interface names.

    Args:
        latent_sizes: (height, width) of pictures in latents; the plan is tuned for the first.
        max_batch: most samples of one call; the plan is tuned for this number.
        frames: latent frames of clips.
    """
    heights, widths = zip(*latent_sizes, strict=True)
    ranges = {
        "batch": (1, max_batch, max_batch),
        "height": (min(heights), heights[0], max(heights)),
        "width": (min(widths), widths[0], max(widths)),
        "frames": frames,
        "tokens": TOKENS,
    }
    return {name: ranges[name] for name in interface.size_names}


def build_plan(
    onnx_file: Path,
    plan: Path,
    interface: Interface,
    sizes: Mapping[str, SizeRange],
    *,
    gpu: str | None = None,
    timing_cache: Path | None = None,
    on_parsed: Callable[[], None] = lambda: None,
) -> BuiltFor:
    """Build `plan`, and write its GPU, version and sizes beside it.

    Args:
        sizes: size name -> (least, best, greatest), for every size of the interface. The batch is made smaller where a
            tensor would have more than `MAX_ELEMENTS`.
        gpu: compute capability to build for, as "sm_86"; by default this machine's.
        timing_cache: file with kernel times of earlier builds; it is read if it exists, and updated. A second build
            takes a fraction of the first one's minutes.
        on_parsed: called when the file has been read, before the plan is built.

    Raises:
        BackendError: TensorRT or the GPU is missing, or the GPU does not support the file's precision.
        ExportError: TensorRT cannot read the file or finds no plan for it.
    """
    library = import_tensorrt()
    trt, precision = library.module, precision_of(onnx_file)
    (gpu,) = require_gpus(precision, (gpu,) if gpu else ())
    sizes = bounded_batch(onnx_file, sizes)
    log = library.log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, onnx_file, log)
    on_parsed()
    config = builder.create_builder_config()
    if library.can_refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    config.add_optimization_profile(_profile(builder, interface, sizes))
    library.set_target(config, gpu, timing_cache)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ExportError(f"TensorRT finds no plan for {onnx_file}: {log.last}")
    write_whole(plan, serialized)
    library.keep_timing(config, timing_cache)
    built_for = BuiltFor(library.package, library.version, gpu, precision, sizes)
    built_for.save(plan)
    return built_for


def bounded_batch(onnx_file: Path, sizes: Mapping[str, SizeRange]) -> Mapping[str, SizeRange]:
    """Return the sizes with the largest batch, up to theirs, at which no tensor has more than `MAX_ELEMENTS`.

    Raises:
        ExportError: even one sample is too large; the message names the tensor.
    """
    greatest = {name: range_[2] for name, range_ in sizes.items()}
    batch, largest = greatest.get("batch", 1), ""
    for name, shape in tensor_shapes(onnx_file):
        while batch and elements(shape, greatest | {"batch": batch}) > MAX_ELEMENTS:
            batch, largest = batch - 1, name
    if not batch:
        raise ExportError(
            f"{onnx_file}: {largest} has more than {MAX_ELEMENTS} elements at {greatest}; export smaller sizes, or let "
            "the decoder make it in tiles"
        )
    if "batch" not in sizes:
        return sizes
    least, best, _ = sizes["batch"]
    return {**sizes, "batch": (least, min(best, batch), batch)}


def tensor_shapes(onnx_file: Path) -> Iterator[tuple[str, tuple[int | str, ...]]]:
    """Yield name and shape of every tensor that a graph computes; a size may be an expression, as "8*height"."""
    import onnx

    graph = onnx.load(onnx_file, load_external_data=False).graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        yield value.name, tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def elements(shape: Sequence[int | str], sizes: Mapping[str, int]) -> int:
    """Return the number of elements of a shape, given the values of the names in its expressions.

    A name without a value, which torch.export gives to what an input has a multiple of, counts as the largest side.
    """
    largest = max((value for name, value in sizes.items() if name != "batch"), default=1)

    def value(size: int | str) -> int:
        if isinstance(size, int):
            return size
        found = _expression(size).subs(sizes)
        return int(found.subs(dict.fromkeys(found.free_symbols, largest)))

    return math.prod(map(value, shape))


@cache
def _expression(size: str) -> Any:
    from sympy import Symbol, sympify  # type: ignore[import-untyped]

    expression = sympify(size)
    named = {symbol: name_and_factor(symbol.name) for symbol in expression.free_symbols}
    return expression.subs({symbol: factor * Symbol(name) for symbol, (name, factor) in named.items()})


def precision_of(onnx_file: Path) -> Precision:
    """Return the least precise type that an ONNX file computes in."""
    import onnx

    graph = onnx.load(onnx_file, load_external_data=False).graph
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {
        attribute.i
        for node in graph.node
        for attribute in node.attribute
        if attribute.name in ("to", "output_dtype")  # of Cast and QuantizeLinear
    }
    kinds = onnx.TensorProto
    by_precision: Mapping[Precision, set[int]] = {
        "fp8": {kinds.FLOAT8E4M3FN, kinds.FLOAT8E5M2},
        "int8": {kinds.INT8},
        "fp16": {kinds.FLOAT16},
        "bf16": {kinds.BFLOAT16},
    }
    return next((precision for precision, found in by_precision.items() if found & types), "fp32")


def require_gpus(precision: Precision, named: Sequence[str]) -> tuple[str, ...]:
    """Return the GPUs to build for: those named, or this machine's.

    Args:
        named: compute capabilities, as "sm_90".

    Raises:
        BackendError: TensorRT is missing or cannot build for one of them, or one does not support the precision.
    """
    gpus, least = import_tensorrt().gpus(named), LEAST_CAPABILITY.get(precision, (0, 0))
    for gpu in gpus:
        capability = int(gpu[3:-1]), int(gpu[-1])
        if capability < least:
            raise BackendError(
                f"the GPU is {gpu}; {precision} needs sm_{least[0]}{least[1]} or later: choose "
                f"{'bf16 or fp16' if capability >= LEAST_CAPABILITY['bf16'] else 'fp16'}"
            )
    return gpus


def _parse(trt: Any, network: Any, onnx_file: Path, log: Any) -> None:
    """Read an ONNX file into a network.

    The cast to uint8 is moved to the end, because TensorRT supports it only at an output.
    """
    import onnx

    model = onnx.load(onnx_file, load_external_data=False)
    cast_last(model)
    prepared = onnx_file.with_name(f"{onnx_file.stem}.{os.getpid()}.onnx")  # in the folder of its weights
    onnx.save(model, prepared)
    parser = trt.OnnxParser(network, log)
    try:
        is_read = parser.parse_from_file(str(prepared))
    finally:
        prepared.unlink()
    if not is_read:
        raise ExportError(f"TensorRT cannot read {onnx_file}: {parser_errors(parser) or log.last}")


def cast_last(model: Any) -> None:
    """Swap the last two nodes of a model that ends in Cast, Transpose. The result is the same."""
    nodes = model.graph.node
    if [node.op_type for node in nodes[-2:]] != ["Cast", "Transpose"] or nodes[-1].input[0] != nodes[-2].output[0]:
        return
    cast, transpose = nodes[-2], nodes[-1]
    between, transpose.input[0] = cast.output[0], cast.input[0]
    cast.input[0], cast.output[0], transpose.output[0] = between, transpose.output[0], between
    last = type(cast)()
    last.CopyFrom(cast)
    del nodes[-2]
    nodes.append(last)
    del model.graph.value_info[:]  # the type of the value between them has changed


def _profile(builder: Any, interface: Interface, sizes: Mapping[str, SizeRange]) -> Any:
    profile = builder.create_optimization_profile()
    for spec in interface.inputs:
        shapes = [spec.resolve({name: of[which] for name, of in sizes.items()}) for which in range(3)]
        profile.set_shape(spec.name, *shapes)
    return profile
