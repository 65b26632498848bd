"""Measure how close each build is to torch float32, by component and by picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from export.prompts import VERIFICATION
from tdm_runtime.backends import Backend
from tdm_runtime.backends.interface import ComponentName
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.checkpoint.manifest import ComponentParity, Manifest, PictureParity
from tdm_runtime.media.psnr import psnr_db
from tdm_runtime.model.components import load_component
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.load import component_backend, load_build, load_with_torch
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

BATCH = 3
"""Batch size of a component's comparison. It is not a power of two, so that padding and splitting are compared too."""


@dataclass(frozen=True)
class VerifyConfig:
    """Amount of comparison."""

    prompts: tuple[str, ...] = VERIFICATION
    """Prompts; each gives one picture at every step count."""
    budget_s: float = 120.0
    """No prompt starts after this time, except the first."""


def verify(
    checkpoint: Checkpoint,
    manifest: Manifest,
    folder: Path,
    config: VerifyConfig = VerifyConfig(),
    announce: Callable[[str], None] = lambda what: None,
) -> Manifest:
    """Measure every build against torch float32. Returns the manifest with the parities.

    Raises:
        ArtifactError, BackendError: a build cannot run here.
    """
    announce("pictures: torch fp32, the reference")
    reference = _pictures(
        load_with_torch(checkpoint, device=torch.device("cpu")), _requests(checkpoint, config), config
    )
    builds = []
    for build in manifest.builds:
        announce(f"pictures: {build.name}")
        made = _pictures(load_build(checkpoint, manifest, build, folder), list(reference), None)
        builds.append(replace(build, pictures=_by_steps(reference, made)))
    manifest = replace(manifest, builds=tuple(builds))
    for name in manifest.interfaces:
        announce(f"{name}: outputs")
        manifest = _with_component_parity(checkpoint, manifest, folder, name)  # type: ignore[arg-type]
    return manifest


def _requests(checkpoint: Checkpoint, config: VerifyConfig) -> list[SamplingParams]:
    """Return the requests ordered by prompt, so that the time budget cuts prompts and not step counts."""
    recipe = checkpoint.recipe
    width, height = recipe.native_sizes[0]
    return [
        SamplingParams(prompt, seed, steps, width, height)
        for seed, prompt in enumerate(config.prompts)
        for steps in recipe.step_counts
    ]


def _pictures(
    model: LoadedModel, requests: Sequence[SamplingParams], config: VerifyConfig | None
) -> dict[SamplingParams, Pixels]:
    pictures: dict[SamplingParams, Pixels] = {}
    started_s = time.monotonic()
    for request in requests:
        is_over = config is not None and time.monotonic() - started_s > config.budget_s
        if is_over and pictures and request.prompt not in {done.prompt for done in pictures}:
            break
        pictures[request] = generate(model, request)
    return pictures


def _by_steps(
    reference: Mapping[SamplingParams, Pixels], made: Mapping[SamplingParams, Pixels]
) -> dict[int, PictureParity]:
    found = {}
    for steps in sorted({request.num_inference_steps for request in reference}):
        pairs = [(reference[r], made[r]) for r in reference if r.num_inference_steps == steps]
        psnrs = [psnr_db(a, b) for a, b in pairs]
        similarity = float(np.mean([ssim(a, b) for a, b in pairs]))
        found[steps] = PictureParity(float(np.mean(psnrs)), min(psnrs), similarity)
    return found


@torch.inference_mode()
def _with_component_parity(checkpoint: Checkpoint, manifest: Manifest, folder: Path, name: ComponentName) -> Manifest:
    """Measure one component of every build on the same inputs. Returns the manifest with its parities."""
    module, interface = load_component(checkpoint, name)
    width, height = checkpoint.recipe.native_sizes[0]
    sizes = {"batch": BATCH, "height": height // checkpoint.downscale, "width": width // checkpoint.downscale}
    inputs = interface.random_inputs(sizes, torch.Generator().manual_seed(1))
    expected = module(*inputs)
    builds = []
    for build in manifest.builds:
        backend = component_backend(manifest, build, folder, name)
        parity = component_parity(expected, _called(backend, inputs))
        components = build.components | {name: replace(build.components[name], parity=parity)}  # type: ignore[operator]
        builds.append(replace(build, components=components))
    return replace(manifest, builds=tuple(builds))


def _called(backend: Backend, inputs: Iterable[Tensor]) -> Tensor:
    return backend(*(tensor.to(backend.device) for tensor in inputs)).cpu()


def component_parity(expected: Tensor, actual: Tensor) -> ComponentParity:
    """Compare two outputs of the same shape. Pixels are compared in levels of 255."""
    difference = actual.double() - expected.double()
    relative = float(difference.norm() / expected.double().norm())
    return ComponentParity(relative, float(difference.abs().max()))


def ssim(a: Pixels, b: Pixels) -> float:
    """Mean structural similarity of two pictures, uint8 [H, W, 3] (Wang et al. 2004, sec. III-C, on each channel)."""
    x, y = (torch.from_numpy(p.astype(np.float64)).permute(2, 0, 1)[:, None] for p in (a, b))
    offsets = torch.arange(11, dtype=torch.float64) - 5
    gaussian = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(gaussian, gaussian)[None, None] / gaussian.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        return functional.conv2d(values, window)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean())


def parity_table(manifest: Manifest) -> str:
    """Return the parities as Markdown tables: first components, then pictures."""
    lines = ["| backend | component | relative L2 | max abs |", "|---|---|---|---|"]
    for build in manifest.builds:
        for name, component in build.components.items():
            if component.parity is not None:
                unit = " levels" if name.endswith("decoder") else ""
                parity = component.parity
                lines.append(f"| {build.name} | {name} | {parity.relative_l2:.1e} | {parity.max_abs:.2g}{unit} |")
    lines += ["", "| backend | K | PSNR, dB | lowest, dB | SSIM |", "|---|---|---|---|---|"]
    for build in manifest.builds:
        for steps, found in build.pictures.items():
            numbers = f"{found.psnr_db:.1f} | {found.min_psnr_db:.1f} | {found.ssim:.4f}"
            lines.append(f"| {build.name} | {steps} | {numbers} |")
    return "\n".join(lines)
