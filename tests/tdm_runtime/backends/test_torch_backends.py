"""The torch backends: eager in float32 and 16 bits, compiled, and the needs of CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tdm_runtime.backends.cuda_graphs import CudaGraphBackend
from tdm_runtime.backends.interface import ComponentName
from tdm_runtime.backends.pytorch import CompiledTorchBackend, TorchBackend
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.errors import BackendError
from tdm_runtime.families import FAMILIES, DecoderModule
from tdm_runtime.model.components import load_component
from tests.gpu.tiny_denoiser import relative_l2, tiny_denoiser, tiny_inputs
from tests.tiny_pipelines import build_vae

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_equals_the_module(family: str) -> None:
    """The backend passes the interface's tensors by name, as some modules' forward has other arguments in between."""
    denoiser, interface = tiny_denoiser(family)
    inputs = tiny_inputs(family, 3)
    named = dict(zip((spec.name for spec in interface.inputs), inputs, strict=True))
    with torch.no_grad():
        expected = denoiser(**named)
    assert torch.equal(TorchBackend(denoiser, CPU, interface=interface)(*inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_outputs_are_close_and_converted_to_float32(dtype: torch.dtype) -> None:
    denoiser, interface = tiny_denoiser("stable_diffusion")
    inputs = tiny_inputs("stable_diffusion", 3)
    expected = TorchBackend(copy.deepcopy(denoiser), CPU, interface=interface)(*inputs)
    actual = TorchBackend(denoiser, CPU, dtype, interface=interface)(*inputs)
    assert actual.dtype == torch.float32
    assert 0 < relative_l2(actual, expected) < 0.03


class Inputs(nn.Module):
    """Returns the sum of each sample's latents plus its timestep."""

    def forward(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        return latents.flatten(1).sum(1).float() + timesteps


def test_timesteps_are_not_rounded() -> None:
    backend = TorchBackend(Inputs(), CPU, torch.bfloat16)
    assert backend(torch.zeros(2, 1, 2, 2), torch.tensor([999.0, 21.3])).tolist() == [999.0, pytest.approx(21.3)]


def test_pixels_stay_uint8() -> None:
    backend = TorchBackend(DecoderModule(build_vae("stable_diffusion")), CPU, torch.bfloat16)
    pixels = backend(torch.randn(2, 4, 4, 6))
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 32, 48, 3)


def test_threads_are_set_for_the_call() -> None:
    before = torch.get_num_threads()
    try:
        TorchBackend(Inputs(), CPU, threads=2)(torch.zeros(1, 1), torch.zeros(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_equals_eager() -> None:
    """A batch of 3 runs as 2 and 1. Later calls use the same programs."""
    denoiser, interface = tiny_denoiser("stable_diffusion")
    compiled = CompiledTorchBackend(copy.deepcopy(denoiser), CPU, threads=1, interface=interface)
    eager = TorchBackend(denoiser, CPU, interface=interface)
    for batch in (3, 1, 2, 3):
        inputs = tiny_inputs("stable_diffusion", batch, seed=batch)
        assert relative_l2(compiled(*inputs), eager(*inputs)) < 1e-5


@pytest.mark.slow
def test_many_shapes_are_all_compiled() -> None:
    """There are more shapes than torch's own limit of 8. Each backend has its own count."""
    import torch._dynamo

    torch._dynamo.reset()
    backends = [CompiledTorchBackend(Inputs(), CPU, threads=1) for _ in range(2)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for width in range(1, 7):
        for backend in backends:
            backend(torch.ones(1, width), torch.zeros(1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 12


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cuda_graphs_without_cuda_are_refused_with_an_alternative(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(BackendError, match="choose torch or torch-compiled"):
        CudaGraphBackend(Inputs(), torch.device(device))


class HostCopies(TorchDispatchMode):
    """Records the shape of every tensor that is copied from the CPU to the device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.device.type == self._device:
            self.shapes += [tuple(t.shape) for t in args if isinstance(t, Tensor) and t.device.type == "cpu" and t.ndim]
        return output


@pytest.mark.parametrize("name", ["text_encoder", "denoiser", "decoder"])
def test_a_component_copies_nothing_from_the_host(name: ComponentName) -> None:
    """Such a copy waits for the GPU at every step, and a CUDA graph cannot record it."""
    module, interface = load_component(open_checkpoint(DEFAULT_CHECKPOINT), name)
    inputs = interface.random_inputs({"batch": 2, "height": 8, "width": 8}, torch.Generator().manual_seed(0))
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    on_meta = {key: weight.to("meta") for key, weight in weights.items()}
    asked = tuple(tensor.to("meta") for tensor in inputs)
    with HostCopies("meta") as copies, torch.no_grad():
        torch.func.functional_call(module, on_meta, asked)
    assert copies.shapes == []
