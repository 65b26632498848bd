"""TensorRT on a GPU: plans are built, run and refitted. What needs no GPU is in `tests/export/test_tensorrt.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from export.fp8_onnx import record_calls, write_fp8_onnx
from export.onnx_export import export_onnx
from export.tensorrt_build import build_plan
from tdm_runtime.backends.machine import installed
from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.backends.tensorrt import TensorRTBackend, built_for_file
from tdm_runtime.backends.tensorrt_library import PACKAGES, import_tensorrt
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.errors import ArtifactError, BackendError
from tdm_runtime.families import DecoderModule
from tdm_runtime.model.components import load_component
from tests.gpu.tiny_denoiser import relative_l2, tiny_denoiser, tiny_inputs
from tests.tiny_pipelines import build_vae

CUDA = torch.device("cuda")
SIZES = {"batch": (1, 2, 4), "height": (8, 8, 16), "width": (8, 8, 16)}

on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not installed(PACKAGES), reason="needs a CUDA device and TensorRT"
)


def built(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Path, Path]:
    """Build the tiny denoiser's ONNX file and plan, and return both paths."""
    denoiser, interface = tiny_denoiser("stable_diffusion", seed)
    onnx_file, plan = folder / f"{seed}-{dtype}.onnx", folder / f"{seed}-{dtype}.plan"
    export_onnx(denoiser, interface, onnx_file, title="denoiser", dtype=dtype)
    build_plan(onnx_file, plan, interface, SIZES, timing_cache=folder / "timing.cache")
    return onnx_file, plan


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_a_plan_computes_the_same_as_torch(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """Sizes vary within the ranges; batches beyond the largest are split."""
    _, plan = built(tmp_path, dtype)
    denoiser, interface = tiny_denoiser("stable_diffusion")
    backend, eager = TensorRTBackend(plan, interface, CUDA), TorchBackend(denoiser, CUDA)
    for batch, scale in [(1, 1), (3, 1), (2, 2), (7, 1), (1, 1)]:
        inputs = [tensor.to(CUDA) for tensor in tiny_inputs("stable_diffusion", batch, seed=batch, scale=scale)]
        output = backend(*inputs)
        assert output.dtype == torch.float32 and output.shape == inputs[0].shape
        assert relative_l2(output, eager(*inputs)) < tolerance
    with pytest.raises(BackendError, match=r"height is 24; .* takes 8 to 16"):
        backend(*(tensor.to(CUDA) for tensor in tiny_inputs("stable_diffusion", 1, scale=3)))


@pytest.mark.gpu
@on_a_gpu
def test_the_plan_of_a_decoder_returns_uint8_pixels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = DecoderModule(build_vae("stable_diffusion"))
    interface, plan = decoder.interface(), tmp_path / "decoder.plan"
    export_onnx(decoder, interface, tmp_path / "decoder.onnx", title="decoder")
    build_plan(tmp_path / "decoder.onnx", plan, interface, SIZES)
    latents = torch.randn(2, 4, 8, 12, device=CUDA)
    pixels = TensorRTBackend(plan, interface, CUDA)(latents)
    assert pixels.dtype == torch.uint8
    assert (pixels.int() - TorchBackend(decoder, CUDA)(latents).int()).abs().max() <= 2


@pytest.mark.gpu
@on_a_gpu
def test_refit_replaces_the_weights_and_can_restore_them(tmp_path: Path) -> None:
    first_file, plan = built(tmp_path)
    other, interface = tiny_denoiser("stable_diffusion", seed=1)
    other_file = tmp_path / "other.onnx"
    export_onnx(other, interface, other_file, title="denoiser")
    inputs = [tensor.to(CUDA) for tensor in tiny_inputs("stable_diffusion", 2)]
    backend = TensorRTBackend(plan, interface, CUDA)
    before, expected = backend(*inputs), TorchBackend(other, CUDA)(*inputs)
    assert relative_l2(before, expected) > 0.1
    backend.refit(other_file)
    assert relative_l2(backend(*inputs), expected) < 2e-3
    backend.refit(first_file)
    assert relative_l2(backend(*inputs), before) < 1e-5


@pytest.mark.gpu
@on_a_gpu
def test_refit_refuses_a_file_of_another_graph(tmp_path: Path) -> None:
    _, plan = built(tmp_path)
    decoder = DecoderModule(build_vae("stable_diffusion"))
    export_onnx(decoder, decoder.interface(), tmp_path / "decoder.onnx", title="decoder")
    with pytest.raises(ArtifactError, match=r"decoder.onnx"):
        TensorRTBackend(plan, tiny_denoiser("stable_diffusion")[1], CUDA).refit(tmp_path / "decoder.onnx")


@pytest.mark.gpu
@on_a_gpu
def test_plans_of_other_versions_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    _, plan = built(tmp_path)
    interface, beside = tiny_denoiser("stable_diffusion")[1], built_for_file(plan)
    original = beside.read_text(encoding="utf-8")
    version = import_tensorrt().version
    assert json.loads(original)["version"] == version
    beside.write_text(original.replace(version, "0.8.0"), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r" 0.8.0; this machine has sm_"):
        TensorRTBackend(plan, interface, CUDA)
    beside.write_text(original, encoding="utf-8")
    plan.write_bytes(plan.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match="cannot load"):
        TensorRTBackend(plan, interface, CUDA)


@pytest.mark.gpu
@on_a_gpu
def test_fp8_is_built_if_the_gpu_supports_it(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(DEFAULT_CHECKPOINT)
    denoiser, interface = load_component(checkpoint, "denoiser")
    half, file, plan = (tmp_path / name for name in ("half.onnx", "fp8.onnx", "fp8.plan"))
    export_onnx(denoiser, interface, half, title="denoiser", dtype=torch.float16)
    calls = record_calls(checkpoint, ["a red apple", "a cat", "a house", "a car"])
    write_fp8_onnx(half, file, calls)
    if torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(BackendError, match="fp8 needs sm_89"):
            build_plan(file, plan, interface, SIZES)
        return
    build_plan(file, plan, interface, SIZES)
    inputs = [torch.from_numpy(array).to(CUDA) for array in calls[-1].values()]
    assert relative_l2(TensorRTBackend(plan, interface, CUDA)(*inputs), TorchBackend(denoiser, CUDA)(*inputs)) < 0.1
