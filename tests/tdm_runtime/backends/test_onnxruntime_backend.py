"""ONNX Runtime on the CPU: torch's results at any shape, and no silent change of provider."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from export.onnx_export import export_onnx
from tdm_runtime.backends import Provider
from tdm_runtime.backends.interface import Interface
from tdm_runtime.backends.onnxruntime import (
    PROVIDERS,
    OnnxRuntimeBackend,
    require_provider,
    require_used,
    used_providers,
)
from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.errors import ArtifactError, BackendError
from tdm_runtime.families import DecoderModule
from tests.gpu.tiny_denoiser import relative_l2, tiny_denoiser, tiny_inputs
from tests.tiny_pipelines import build_vae

onnxruntime = pytest.importorskip("onnxruntime")
CPU = torch.device("cpu")
TOLERANCE = 1e-4
"""Largest relative L2 error between two float32 implementations."""


@pytest.fixture(scope="module")
def decoder() -> DecoderModule:
    return DecoderModule(build_vae("stable_diffusion"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, decoder: DecoderModule) -> Path:
    """A tiny denoiser and a tiny decoder as ONNX files."""
    folder = tmp_path_factory.mktemp("onnx")
    denoiser, interface = tiny_denoiser("stable_diffusion")
    export_onnx(denoiser, interface, folder / "denoiser.onnx", title="denoiser")
    export_onnx(decoder, decoder.interface(), folder / "decoder.onnx", title="decoder")
    return folder


@pytest.fixture(scope="module")
def interface() -> Interface:
    return tiny_denoiser("stable_diffusion")[1]


@pytest.fixture(scope="module")
def backend(folder: Path, interface: Interface) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(folder / "denoiser.onnx", interface, CPU, threads=1)


def test_any_batch_and_size_equals_torch(backend: OnnxRuntimeBackend) -> None:
    """Shapes repeat: the first call of a shape learns the output's shape, later ones bind it."""
    torch_backend = TorchBackend(tiny_denoiser("stable_diffusion")[0], CPU)
    for batch, scale in [(1, 1), (3, 1), (2, 2), (1, 1), (7, 1), (3, 1), (2, 2)]:
        inputs = tiny_inputs("stable_diffusion", batch, seed=batch, scale=scale)
        output = backend(*inputs)
        assert output.dtype == torch.float32 and output.shape == inputs[0].shape
        assert relative_l2(output, torch_backend(*inputs)) < TOLERANCE


def test_a_batch_with_mixed_steps_equals_its_samples_alone(backend: OnnxRuntimeBackend) -> None:
    inputs = tiny_inputs("stable_diffusion", 4)
    together = backend(*inputs)
    for n in range(4):
        alone = backend(*(tensor[n : n + 1] for tensor in inputs))
        assert relative_l2(together[n : n + 1], alone) < TOLERANCE


def test_later_calls_do_not_overwrite_outputs(backend: OnnxRuntimeBackend) -> None:
    inputs = tiny_inputs("stable_diffusion", 2)
    for _ in range(2):  # first in memory of ONNX Runtime, then in memory of torch
        first = backend(*inputs)
        kept = first.clone()
        first_again = backend(*inputs)
        backend(*tiny_inputs("stable_diffusion", 2, seed=1))
        assert torch.equal(first, kept) and torch.equal(first_again, kept)
        assert first.data_ptr() != first_again.data_ptr()


def test_inputs_may_have_any_memory_format(backend: OnnxRuntimeBackend) -> None:
    latents, *rest = tiny_inputs("stable_diffusion", 3)
    strided = latents.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    assert torch.equal(backend(strided, *rest), backend(latents, *rest))


def test_pixels_are_uint8(folder: Path, decoder: DecoderModule) -> None:
    backend = OnnxRuntimeBackend(folder / "decoder.onnx", decoder.interface(), CPU, threads=1)
    for height, width in [(4, 6), (8, 4), (4, 6)]:
        latents = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(height))
        pixels = backend(latents)
        assert pixels.dtype == torch.uint8 and pixels.shape == (2, 8 * height, 8 * width, 3)
        assert (pixels.int() - TorchBackend(decoder, CPU)(latents).int()).abs().max() <= 1


def test_idle_workers_do_not_spin(backend: OnnxRuntimeBackend) -> None:
    options = backend._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == 1


def test_prepacking_can_be_turned_off_to_save_memory(
    folder: Path, interface: Interface, backend: OnnxRuntimeBackend
) -> None:
    lean = OnnxRuntimeBackend(folder / "denoiser.onnx", interface, CPU, threads=1, prepack=False)
    assert lean._session.get_session_options().get_session_config_entry("session.disable_prepacking") == "1"
    inputs = tiny_inputs("stable_diffusion", 2)
    assert relative_l2(lean(*inputs), backend(*inputs)) < TOLERANCE


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_built_in_is_refused(folder: Path, interface: Interface, provider: Provider) -> None:
    if PROVIDERS[provider] in onnxruntime.get_available_providers():
        pytest.skip("this provider is built in")
    with pytest.raises(BackendError, match=r"was asked for \w+ and is built with .*; `pip uninstall onnxruntime`"):
        OnnxRuntimeBackend(folder / "denoiser.onnx", interface, CPU, provider=provider)


@pytest.mark.skipif(find_spec("onnxruntime_ep_nv_tensorrt_rtx") is not None, reason="the plugin is installed")
def test_a_plugin_that_is_not_installed_is_refused() -> None:
    with pytest.raises(
        BackendError, match=r"NvTensorRTRTX\w+ and its plugin is not installed; `pip install onnx.*-cu13`"
    ):
        require_provider("nv-tensorrt-rtx", torch.device("cuda"))


def test_a_plugin_that_cannot_be_loaded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a missing driver: the real plugin then fails to load for lack of libcuda.so.1."""
    (tmp_path / "onnxruntime_ep_nv_tensorrt_rtx.py").write_text("def get_library_path(): return '/absent/plugin.so'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", raising=False)
    with pytest.raises(
        BackendError, match=r"cannot load its plugin \(.*/absent/plugin.so.*\); it needs an NVIDIA driver"
    ):
        require_provider("nv-tensorrt-rtx", torch.device("cuda"))
    monkeypatch.delitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx")


def test_the_providers_that_took_operators_are_those_that_are_checked(
    folder: Path, backend: OnnxRuntimeBackend
) -> None:
    """A provider that a session lists and that took nothing is not in use. Azure's is such a one, in every build."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers = ["AzureExecutionProvider", "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(folder / "decoder.onnx", options, providers=providers)
    assert session.get_providers() == providers
    assert used_providers(session) == used_providers(backend._session) == ["CPUExecutionProvider"]
    with pytest.raises(BackendError, match=r"runs with CPUExecutionProvider: the plugin took no operator"):
        require_used("nv-tensorrt-rtx", used_providers(backend._session))


def test_a_provider_of_another_device_is_refused() -> None:
    with pytest.raises(BackendError, match="CPUExecutionProvider was asked for on the device cuda"):
        require_provider("cpu", torch.device("cuda"))


def test_a_session_that_fell_back_is_refused() -> None:
    """Without CUDA's libraries onnxruntime-gpu lists the provider and runs without it."""
    require_used("cuda", ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"asked for CUDAExecutionProvider and runs with CPUExecutionProvider: CUDA"):
        require_used("cuda", ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"asked for Tensorrt.* runs with CUDAExecutionProvider, CPU.*: TensorRT"):
        require_used("tensorrt", ["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_a_file_of_another_component_is_refused(folder: Path, interface: Interface) -> None:
    with pytest.raises(ArtifactError, match="takes latents and gives pixels, the component takes latents, timesteps"):
        OnnxRuntimeBackend(folder / "decoder.onnx", interface, CPU)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, interface: Interface) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    for name in ("broken.onnx", "missing.onnx"):
        with pytest.raises(ArtifactError, match=rf"cannot open .*{name}: .*; run `tdm-export`"):
            OnnxRuntimeBackend(tmp_path / name, interface, CPU)


def test_an_input_of_the_wrong_type_is_refused(backend: OnnxRuntimeBackend) -> None:
    latents, timesteps, *rest = tiny_inputs("stable_diffusion", 2)
    with pytest.raises(AssertionError, match=r"timesteps is torch.float64, not float32"):
        backend(latents, timesteps.double(), *rest)
