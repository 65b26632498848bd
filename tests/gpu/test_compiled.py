"""On a CUDA device, compiled programs compute the same as the module, with one program per bucket."""

from __future__ import annotations

import copy

import pytest
import torch

from tdm_runtime.backends.pytorch import CompiledTorchBackend, TorchBackend
from tests.gpu.tiny_denoiser import relative_l2, tiny_denoiser, tiny_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_compiled_equals_eager(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """Batches of 3 and 4 share a program, and so do the two batches of 1."""
    import torch._dynamo

    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    denoiser, interface = tiny_denoiser(family)
    compiled = CompiledTorchBackend(copy.deepcopy(denoiser), CUDA, dtype, interface=interface)
    eager = TorchBackend(denoiser, CUDA, dtype, interface=interface)
    for batch, scale in [(1, 1), (3, 1), (4, 1), (2, 2), (1, 1)]:
        inputs = [tensor.to(CUDA) for tensor in tiny_inputs(family, batch, seed=batch, scale=scale)]
        assert relative_l2(compiled(*inputs), eager(*inputs)) < tolerance
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 3
