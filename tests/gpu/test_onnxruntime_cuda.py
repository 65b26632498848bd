"""ONNX Runtime's CUDA provider computes the same as torch, in the order of the caller's stream."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from export.onnx_export import export_onnx
from tdm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.families import DecoderModule
from tests.gpu.tiny_denoiser import relative_l2, tiny_denoiser, tiny_inputs
from tests.tiny_pipelines import build_vae


def has_cuda_provider() -> bool:
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not has_cuda_provider(), reason="needs onnxruntime-gpu"),
]
CUDA = torch.device("cuda")
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2}
"""Allowed relative L2 against torch float32, whose convolutions compute in TF32."""

Build = Callable[[torch.dtype], OnnxRuntimeBackend]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Function that builds a backend of the tiny denoiser in a precision."""
    folder = tmp_path_factory.mktemp("onnx")

    def build(dtype: torch.dtype) -> OnnxRuntimeBackend:
        denoiser, interface = tiny_denoiser("stable_diffusion")
        file = folder / f"{dtype}.onnx"
        if not file.exists():
            export_onnx(denoiser, interface, file, title="denoiser", dtype=dtype)
        return OnnxRuntimeBackend(file, interface, CUDA)

    return build


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_outputs_equal_torch_at_any_batch_and_size(build: Build, dtype: torch.dtype) -> None:
    backend, torch_backend = build(dtype), TorchBackend(tiny_denoiser("stable_diffusion")[0], CUDA)
    assert backend._session.get_providers()[0] == "CUDAExecutionProvider"
    for batch, scale in [(1, 1), (3, 1), (2, 2), (1, 1), (7, 1), (3, 1)]:
        inputs = [tensor.to(CUDA) for tensor in tiny_inputs("stable_diffusion", batch, seed=batch, scale=scale)]
        output = backend(*inputs)
        assert output.is_cuda and output.dtype == torch.float32
        assert relative_l2(output, torch_backend(*inputs)) < TOLERANCES[dtype]


@pytest.mark.parametrize("is_default", [True, False])
def test_calls_run_in_order_on_the_callers_stream(build: Build, is_default: bool) -> None:
    """Inputs are still being computed at the call, and outputs are used at once."""
    backend, torch_backend = build(torch.float32), TorchBackend(tiny_denoiser("stable_diffusion")[0], CUDA)
    latents, *rest = (tensor.to(CUDA) for tensor in tiny_inputs("stable_diffusion", 4))
    expected = torch_backend(2 * latents, *rest) + 1
    busy = torch.randn(4096, 4096, device=CUDA)
    stream = torch.cuda.default_stream() if is_default else torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            for _ in range(20):
                busy = busy @ busy / 64
            late = latents + (busy.sum() * 0).nan_to_num() + latents
            actual = backend(late, *rest) + 1
            del late
            torch.full_like(latents, torch.nan)  # would overwrite memory that was freed too early
            assert relative_l2(actual, expected) < TOLERANCES[torch.float32]


def test_later_calls_do_not_change_an_earlier_output(build: Build) -> None:
    backend = build(torch.float32)
    inputs = [tensor.to(CUDA) for tensor in tiny_inputs("stable_diffusion", 2)]
    for _ in range(2):  # first with ONNX Runtime's memory, then with torch's
        first = backend(*inputs)
        kept = first.clone()
        backend(*(tensor.to(CUDA) for tensor in tiny_inputs("stable_diffusion", 2, seed=1)))
        assert torch.equal(first, kept)


def test_the_decoder_returns_uint8_pixels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = DecoderModule(build_vae("stable_diffusion"))
    export_onnx(decoder, decoder.interface(), tmp_path / "decoder.onnx", title="decoder")
    backend = OnnxRuntimeBackend(tmp_path / "decoder.onnx", decoder.interface(), CUDA)
    for _ in range(2):
        latents = torch.randn(2, 4, 4, 6, device=CUDA)
        difference = backend(latents).int() - TorchBackend(decoder, CUDA)(latents).int()
        assert difference.abs().max() <= 1
