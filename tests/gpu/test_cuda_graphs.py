"""CUDA graphs compute the same as the module for every shape, and the number of recordings is bounded."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tdm_runtime.backends.cuda_graphs import CudaGraphBackend
from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.families import DecoderModule
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.gpu.tiny_denoiser import relative_l2, tiny_denoiser, tiny_inputs
from tests.tiny_pipelines import build_vae

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
KERNEL_TOLERANCE = 1e-3
"""Allowed relative L2: other batch sizes use other kernels, and convolutions compute in TF32."""
DEVICE_TOLERANCE = 3
"""Allowed difference in levels of 255 between the kernels of two devices."""


def on_cuda(family: str, batch: int, seed: int = 0, scale: int = 1) -> list[torch.Tensor]:
    return [tensor.to(CUDA) for tensor in tiny_inputs(family, batch, seed=seed, scale=scale)]


def pair(
    family: str = "stable_diffusion", dtype: torch.dtype = torch.float32, max_graphs: int = 8
) -> tuple[CudaGraphBackend, TorchBackend]:
    """Return a replaying and an eager backend with the same weights."""
    denoiser, interface = tiny_denoiser(family)
    graphs = CudaGraphBackend(copy.deepcopy(denoiser), CUDA, dtype, interface, max_graphs)
    return graphs, TorchBackend(denoiser, CUDA, dtype, interface=interface)


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_equals_the_eager_call(family: str, dtype: torch.dtype) -> None:
    """Shapes are recorded and replayed in turn, because they share memory."""
    graphs, eager = pair(family, dtype)
    for batch, scale in [(1, 1), (3, 1), (2, 2), (1, 1), (8, 1), (3, 1), (2, 2), (1, 1)]:
        inputs = on_cuda(family, batch, seed=batch, scale=scale)
        output = graphs(*inputs)
        assert output.shape == inputs[0].shape and output.dtype == torch.float32
        tolerance = KERNEL_TOLERANCE if dtype == torch.float32 else 0.03
        assert relative_l2(output, eager(*inputs)) < tolerance


def test_a_replay_uses_the_inputs_of_its_call() -> None:
    graphs, eager = pair()
    for seed in range(4):
        inputs = on_cuda("stable_diffusion", 2, seed=seed)
        assert relative_l2(graphs(*inputs), eager(*inputs)) < KERNEL_TOLERANCE


def test_later_calls_do_not_change_an_earlier_output() -> None:
    graphs, _ = pair()
    first = graphs(*on_cuda("stable_diffusion", 2))
    kept = first.clone()
    graphs(*on_cuda("stable_diffusion", 2, seed=1))
    graphs(*on_cuda("stable_diffusion", 8, seed=2))
    assert torch.equal(first, kept)


def test_batches_of_a_bucket_share_a_recording() -> None:
    graphs, _ = pair()
    for batch in (5, 6, 7, 8):
        graphs(*on_cuda("stable_diffusion", batch))
    assert len(graphs._graphs) == 1


def test_the_least_recently_used_recording_is_dropped() -> None:
    graphs, eager = pair(max_graphs=2)
    for batch in (1, 2, 1, 4, 1, 2, 4):
        inputs = on_cuda("stable_diffusion", batch)
        assert relative_l2(graphs(*inputs), eager(*inputs)) < KERNEL_TOLERANCE
        assert len(graphs._graphs) <= 2


def test_another_thread_may_work_while_a_graph_is_recorded() -> None:
    """The decoder does this during denoiser calls: it allocates memory and records its own graphs."""
    torch.manual_seed(0)
    decoder = DecoderModule(build_vae("stable_diffusion"))
    decoding = CudaGraphBackend(copy.deepcopy(decoder), CUDA)
    eager = TorchBackend(decoder, CUDA)
    failures: list[BaseException] = []

    def decode() -> None:
        try:
            for side in range(2, 12):
                latents = torch.randn(1, 4, side, side, device=CUDA)
                difference = decoding(latents).int() - eager(latents).int()
                assert difference.abs().max() <= 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=decode)
    thread.start()
    graphs, reference = pair(max_graphs=32)
    for batch in (1, 2, 4, 8, 16, 32):
        for scale in (1, 2):
            inputs = on_cuda("stable_diffusion", batch, scale=scale)
            assert relative_l2(graphs(*inputs), reference(*inputs)) < KERNEL_TOLERANCE
    thread.join()
    assert failures == []


def test_the_engine_on_cuda_graphs_makes_the_pictures_of_the_cpu(model: LoadedModel, checkpoint_folder: Path) -> None:
    cuda_model = load_model(checkpoint_folder, BackendConfig("cuda-graphs"))
    params = [SamplingParams("a red heart on a blue background", seed, 1 + seed % 4, 64, 64) for seed in range(8)]
    with DiffusionEngine(cuda_model) as engine:
        pictures = [future.result().pixels for future in engine.submit_all(params)]
    for request, picture in zip(params, pictures, strict=True):
        assert np.abs(picture.astype(int) - generate(model, request)).max() <= DEVICE_TOLERANCE
