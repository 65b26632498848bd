"""Measure how close each build is to torch float32, by component and by picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tdm_runtime.backends import Backend
from tdm_runtime.backends.interface import Interface
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.checkpoint.manifest import ComponentParity, Manifest, kernel_choice
from tdm_runtime.model.components import component_names, load_programs, program_names
from tdm_runtime.model.load import component_backend, load_build
from tdm_runtime.model.parity import ParityConfig, compared_frames, picture_parity, reference_pictures

BATCH = 3
"""Batch size of a component's comparison. It is not a power of two, so that padding and splitting are compared too.
Clips are decoded one by one."""
TOKENS = 77
"""Tokens of a prompt in that comparison, where a denoiser takes any number."""


def verify(
    checkpoint: Checkpoint,
    manifest: Manifest,
    folder: Path,
    config: ParityConfig = ParityConfig(),
    announce: Callable[[str], None] = lambda what: None,
) -> Manifest:
    """Measure every build that runs here against torch float32. Returns the manifest with the parities.

    Builds for other GPUs stay without figures; the machine that runs them measures them at its first start.

    Raises:
        ArtifactError, BackendError: a build cannot run here.
    """
    if all(build.elsewhere for build in manifest.builds):
        return manifest
    announce("pictures: torch fp32, the reference")
    reference = reference_pictures(checkpoint, config)
    builds = []
    for build in manifest.builds:
        if build.elsewhere:
            builds.append(build)
            continue
        announce(f"pictures: {build.name}")
        pictures = picture_parity(reference, load_build(checkpoint, manifest, build, folder))
        builds.append(replace(build, pictures=pictures, measured_on=kernel_choice(build)))
    manifest = replace(manifest, builds=tuple(builds))
    for component in component_names(checkpoint):
        names = [name for name in program_names(checkpoint, component) if name in manifest.interfaces]
        programs = dict(load_programs(checkpoint, component)) if names else {}
        for name in names:
            announce(f"{name}: outputs")
            module, interface = programs.pop(name)
            inputs = _inputs(checkpoint, interface, batch=BATCH if name == component else 1)
            expected = _first_output(module, inputs)
            del module  # a build of the same size comes next
            manifest = _with_parity(manifest, folder, name, inputs, expected)
    return manifest


@torch.inference_mode()
def _first_output(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the output of a program; of several the pixels, which a decoder of clips makes beside its cache."""
    output: Tensor | tuple[Tensor, ...] = module(**inputs)
    return output if isinstance(output, Tensor) else output[0]


@torch.inference_mode()
def _with_parity(
    manifest: Manifest, folder: Path, name: str, inputs: Mapping[str, Tensor], expected: Tensor
) -> Manifest:
    """Measure one program of every build on the same inputs. Returns the manifest with its parities."""
    builds = []
    for build in manifest.builds:
        if build.elsewhere:
            builds.append(build)
            continue
        backend = component_backend(manifest, build, folder, name)
        parity = component_parity(expected, _called(backend, inputs.values()))
        components = build.components | {name: replace(build.components[name], parity=parity)}  # type: ignore[operator]
        builds.append(replace(build, components=components))
    return replace(manifest, builds=tuple(builds))


def _inputs(checkpoint: Checkpoint, interface: Interface, batch: int) -> dict[str, Tensor]:
    """Return random inputs of the native size, by name."""
    recipe = checkpoint.recipe
    width, height = recipe.native_sizes[0]
    _, *axes = checkpoint.geometry.latent_shape(width, height, compared_frames(recipe) or 1)
    sizes = {"batch": batch, "height": axes[-2], "width": axes[-1], "frames": axes[0], "tokens": TOKENS}
    drawn = interface.random_inputs(sizes, torch.Generator().manual_seed(1))
    inputs = {spec.name: tensor for spec, tensor in zip(interface.inputs, drawn, strict=True)}
    if "timesteps" in inputs:
        inputs["timesteps"] = _timesteps(checkpoint)
    return inputs


def _timesteps(checkpoint: Checkpoint) -> Tensor:
    """Return a batch of the recipe's timesteps, because other numbers are no angles of a TrigFlow model."""
    recipe = checkpoint.recipe
    timesteps = recipe.step_table(recipe.default_steps, *recipe.native_sizes[0]).timesteps
    return torch.tensor([timesteps[n % len(timesteps)] for n in range(BATCH)], dtype=torch.float32)


def _called(backend: Backend, inputs: Iterable[Tensor]) -> Tensor:
    return backend(*(tensor.to(backend.device) for tensor in inputs)).cpu()


def component_parity(expected: Tensor, actual: Tensor) -> ComponentParity:
    """Compare two outputs of the same shape. Pixels are compared in levels of 255."""
    difference = actual.double() - expected.double()
    relative = float(difference.norm() / expected.double().norm())
    return ComponentParity(relative, float(difference.abs().max()))


def parity_table(manifest: Manifest) -> str:
    """Return the parities as Markdown tables: first components, then pictures."""
    lines = ["| backend | component | relative L2 | max abs |", "|---|---|---|---|"]
    for build in manifest.builds:
        for name, component in build.components.items():
            if component.parity is not None:
                unit = " levels" if "decoder" in name else ""
                parity = component.parity
                lines.append(f"| {build.name} | {name} | {parity.relative_l2:.1e} | {parity.max_abs:.2g}{unit} |")
    lines += ["", "| backend | K | PSNR, dB | lowest, dB | SSIM |", "|---|---|---|---|---|"]
    for build in manifest.builds:
        for steps, found in build.pictures.items():
            numbers = f"{found.psnr_db:.1f} | {found.min_psnr_db:.1f} | {found.ssim:.4f}"
            lines.append(f"| {build.name} | {steps} | {numbers} |")
    not_run = [
        f"{build.name} was built for {build.elsewhere} and not run" for build in manifest.builds if build.elsewhere
    ]
    return "\n".join([*lines, *([""] if not_run else []), *not_run])
