"""Build the artifacts folder of a checkpoint: ONNX files, the programs of each backend, then the manifest."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from export.earlier import Earlier
from export.errors import ExportError
from export.onnx_export import OPSET, export_onnx
from export.openvino_build import write_int8_ir, write_ir
from export.prompts import CALIBRATION
from export.recorder import Call, Recorder, make_each
from tdm_runtime.backends import BackendName, Precision
from tdm_runtime.backends.interface import Interface
from tdm_runtime.backends.machine import TOOLS, installed
from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.checkpoint.manifest import MANIFEST_FILE, Build, BuiltComponent, Manifest
from tdm_runtime.families import Denoiser
from tdm_runtime.model.components import component_names, load_programs, program_names
from tdm_runtime.model.decoder import Decoder
from tdm_runtime.model.load import component_backend, load_build

Target = tuple[BackendName, Precision]
Announce = Callable[[str], None]
"""Callback that receives a description of the next piece of work."""


@dataclass(frozen=True)
class BuildPlan:
    """Builds to make from a checkpoint."""

    targets: tuple[Target, ...]
    """(backend, precision) pairs, with the best precision of each backend first."""
    calibration: tuple[str, ...] = CALIBRATION
    """Prompts whose pictures calibrate the ranges of int8 activations."""
    gpus: tuple[str, ...] = ()
    """Compute capabilities that TensorRT builds for, as "sm_86"; empty: this machine's."""

    def steps(self, checkpoint: Checkpoint) -> int:
        """Return the number of announcements that `build_artifacts` makes."""
        backends = [backend for backend, _ in self.targets]
        # Each component goes to ONNX, to OpenVINO once for all precisions, and to TensorRT once per precision.
        rounds = 1 + ("openvino" in backends) + backends.count("tensorrt")
        programs = sum(len(program_names(checkpoint, name)) for name in component_names(checkpoint))
        int8 = 1 + len(_quantised(checkpoint)) if ("openvino", "int8") in self.targets else 0
        return rounds * programs + int8


def build_artifacts(
    checkpoint: Checkpoint, plan: BuildPlan, folder: Path, announce: Announce, *, anew: bool = False
) -> Manifest:
    """Build everything into `folder`. The folder is replaced only after every build succeeded.

    Args:
        anew: whether intact files that are there already are built again.

    Raises:
        ExportError: a component cannot be built, or the folder cannot be replaced.
    """
    _check_replaceable(folder)
    for backend, precision in plan.targets:
        if backend == "tensorrt":  # before the first minutes of work
            from export.tensorrt_build import require_gpus

            require_gpus(precision, plan.gpus)
    earlier = None if anew else Earlier.found(folder, checkpoint)
    with _replacing(folder) as partial:
        interfaces: dict[str, Interface] = {}
        onnx: dict[str, Mapping[str, str]] = {}
        for component in component_names(checkpoint):
            programs = load_programs(checkpoint, component)
            for name, (module, interface) in programs.items():
                _check_one_model(checkpoint, module)
                announce(f"{name}: PyTorch to ONNX")
                if earlier is None or not earlier.onnx(name, interface, partial):
                    export_onnx(module, interface, partial / f"{name}.onnx", title=name)
                interfaces[name] = interface
                onnx[name] = _hashed(partial, f"{name}.onnx", f"{name}.onnx.data")
            del programs, module
            gc.collect()  # only one component's weights are in memory at a time
        manifest = Manifest(
            checkpoint=checkpoint.recipe.name,
            fingerprint=checkpoint.fingerprint,
            weights=checkpoint.recipe.files,
            tools=installed(TOOLS),
            opset=OPSET,
            interfaces=interfaces,
            onnx=onnx,
            builds=(),
        )
        for target in plan.targets:
            builds = _builds(checkpoint, manifest, target, plan, partial, announce, earlier)
            manifest = replace(manifest, builds=(*manifest.builds, *builds))
        manifest.save(partial)
    return manifest


def _check_one_model(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Check that every sample passes the same weights.

    Raises:
        ExportError: it is a denoiser of several experts.
    """
    if isinstance(module, Denoiser) and module.further_models:
        raise ExportError(
            f"{checkpoint.recipe.name} has a second expert, {', '.join(module.further_models)}, and each sample passes "
            "one of them, which a compiled program cannot choose; serve it on torch, with --backend torch"
        )


def _builds(
    checkpoint: Checkpoint,
    manifest: Manifest,
    target: Target,
    plan: BuildPlan,
    folder: Path,
    announce: Announce,
    earlier: Earlier | None,
) -> Sequence[Build]:
    """Build one target, or take it over; TensorRT gives a build for each GPU."""
    match target:
        case ("onnxruntime", "fp32"):
            components = {name: BuiltComponent(files) for name, files in manifest.onnx.items()}
            package = "onnxruntime-gpu" if installed(["onnxruntime-gpu"]) else "onnxruntime"
            return [Build("onnxruntime", "fp32", components, installed([package]))]
        case ("openvino", "bf16" | "fp32" as precision):
            return [Build("openvino", precision, _ir(manifest, folder, announce, earlier), installed(["openvino"]))]
        case ("openvino", "int8"):
            components = dict(_ir(manifest, folder, announce, earlier))
            if earlier and (kept := earlier.builds(*target, folder)):
                for what in ("pictures for int8 calibration", *(f"{name}: int8" for name in _quantised(checkpoint))):
                    announce(what)
                return kept
            half = Build("openvino", "fp32", components, installed(["openvino"]))
            announce("pictures for int8 calibration")
            calls = component_calls(checkpoint, manifest, half, folder, plan.calibration)
            for name, channels in _quantised(checkpoint).items():
                announce(f"{name}: int8")
                write_int8_ir(folder / f"{name}.onnx", folder / f"{name}.int8.xml", calls[name], channels)
                components[name] = BuiltComponent(_hashed(folder, f"{name}.int8.xml", f"{name}.int8.bin"))
            return [Build("openvino", "int8", components, installed(["openvino"]))]
        case ("tensorrt", precision):
            from export.tensorrt_build import build_tensorrt, require_gpus

            gpus = require_gpus(precision, plan.gpus)
            kept = [build for build in earlier.builds(*target, folder) if build.gpu in gpus] if earlier else []
            missing = tuple(gpu for gpu in gpus if gpu not in {build.gpu for build in kept})
            if missing:
                return [*kept, *build_tensorrt(checkpoint, manifest, precision, folder, announce, missing)]
            for name in manifest.onnx:
                announce(f"{name}: ONNX to TensorRT {precision}")
            return kept
    backend, precision = target
    raise ExportError(f"{backend} has no {precision} build; `tdm-export --help` lists the builds")


def _quantised(checkpoint: Checkpoint) -> Mapping[str, int]:
    """Return the programs that an int8 build quantises, with their output channels. Decoders of clips stay float16."""
    denoiser = {"denoiser": checkpoint.geometry.channels}
    return denoiser if checkpoint.family.makes_clips else denoiser | {"decoder": 3}


def _ir(manifest: Manifest, folder: Path, announce: Announce, earlier: Earlier | None) -> Mapping[str, BuiltComponent]:
    """Write the OpenVINO IR of every program, or take it over, once for all precisions except int8."""
    components = {}
    for name in manifest.onnx:
        if not (folder / f"{name}.xml").is_file():
            announce(f"{name}: ONNX to OpenVINO")
            if earlier is None or not earlier.ir(name, folder):
                write_ir(folder / f"{name}.onnx", folder / f"{name}.xml")
        components[name] = BuiltComponent(_hashed(folder, f"{name}.xml", f"{name}.bin"))
    return components


def component_calls(
    checkpoint: Checkpoint, manifest: Manifest, build: Build, folder: Path, prompts: Sequence[str]
) -> Mapping[str, list[Call]]:
    """Record the inputs of the quantised programs while they make one picture per prompt, cycling through all K."""
    model = load_build(checkpoint, manifest, build, folder)
    denoiser = Recorder(model.denoiser, model.denoiser_inputs)
    recorded, recorders = replace(model, denoiser=denoiser), {"denoiser": denoiser}
    if "decoder" in _quantised(checkpoint):
        names = [spec.name for spec in manifest.interfaces["decoder"].inputs]
        decoder = Recorder(component_backend(manifest, build, folder, "decoder"), names)
        recorders["decoder"] = decoder
        recorded = replace(recorded, decoders={"full": Decoder(decoder, checkpoint.geometry.spatial_compression)})
    make_each(recorded, prompts)
    return {name: recorder.calls for name, recorder in recorders.items()}


def _hashed(folder: Path, *names: str) -> Mapping[str, str]:
    """Return name -> sha256 of the files that exist; a small model may have no separate weights file."""
    return {name: file_sha256(folder / name) for name in names if (folder / name).is_file()}


def _check_replaceable(folder: Path) -> None:
    """Check that `folder` is missing, empty or holds artifacts, so that nothing else is ever deleted."""
    is_free = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_free and not (folder / MANIFEST_FILE).is_file():
        raise ExportError(f"{folder} holds files that are not artifacts; choose another folder with --output")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into. It replaces `folder` on success and is deleted on failure."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written ({error}); choose another folder with --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
