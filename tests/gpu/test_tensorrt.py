"""TensorRT: tests of file preparation and of errors run anywhere; plans are built and run on a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.fp8_onnx import record_calls, write_fp8_onnx
from export.onnx_export import export_onnx
from export.tensorrt_build import build_plan, cast_last, precision_of, require_capability, size_ranges
from tdm_runtime.backends.interface import Interface, TensorSpec
from tdm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.backends.tensorrt import BuiltFor, TensorRTBackend, built_for_file, import_tensorrt, sizes_of
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.errors import ArtifactError, BackendError
from tdm_runtime.families import DecoderModule
from tdm_runtime.model.components import load_component
from tests.gpu.tiny_denoiser import relative_l2, tiny_denoiser, tiny_inputs
from tests.tiny_pipelines import build_vae

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = {"batch": (1, 2, 4), "height": (8, 8, 16), "width": (8, 8, 16)}
BUILT_FOR = BuiltFor("11.4.0", "sm_90", "bf16", SIZES)


HAS_TENSORRT = importlib.util.find_spec("tensorrt") is not None
on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not HAS_TENSORRT, reason="needs a CUDA device and tensorrt"
)


# -- anywhere ---------------------------------------------------------------------------------


def test_a_plan_of_another_machine_is_refused_by_name() -> None:
    BUILT_FOR.check_machine(Path("denoiser.plan"), "11.4.0", "sm_90")
    expected = r"built for sm_90 with TensorRT 11.4.0; this machine has sm_89 with TensorRT 10.9.1; run `tdm-export`"
    with pytest.raises(ArtifactError, match=expected):
        BUILT_FOR.check_machine(Path("denoiser.plan"), "10.9.1", "sm_89")
    with pytest.raises(ArtifactError, match=r"this machine has no CUDA device with TensorRT 11\.4\.0"):
        BUILT_FOR.check_machine(Path("denoiser.plan"), "11.4.0", None)


def test_the_machine_and_sizes_of_a_plan_are_saved_beside_it(tmp_path: Path) -> None:
    plan = tmp_path / "denoiser.plan"
    BUILT_FOR.save(plan)
    assert built_for_file(plan).name == "denoiser.plan.json"
    assert BuiltFor.load(plan) == BUILT_FOR
    built_for_file(plan).write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"denoiser.plan.json cannot be read .*; run `tdm-export`"):
        BuiltFor.load(plan)


@pytest.mark.parametrize(("name", "size"), [("batch", 5), ("height", 7), ("width", 17)])
def test_a_size_outside_the_range_of_a_plan_is_refused_by_name(name: str, size: int) -> None:
    interface = tiny_denoiser("stable_diffusion")[1]
    given = {"batch": 4, "height": 8, "width": 16} | {name: size}
    shapes = [spec.resolve(given) for spec in interface.inputs]
    sizes = sizes_of(interface, shapes)
    assert sizes == given
    least, _, greatest = SIZES[name]
    with pytest.raises(BackendError, match=f"{name} is {size}; denoiser.plan takes {least} to {greatest}"):
        BUILT_FOR.check_sizes(Path("denoiser.plan"), sizes)


def test_a_plan_is_tuned_for_the_first_size() -> None:
    denoiser, decoder = tiny_denoiser("stable_diffusion")[1], DecoderModule(build_vae("stable_diffusion")).interface()
    ranges = size_ranges(denoiser, [(64, 64), (48, 96)], 8)
    assert ranges == {"batch": (1, 8, 8), "height": (48, 64, 64), "width": (64, 64, 96)}
    assert size_ranges(decoder, [(64, 64)], 1) == {"batch": (1, 1, 1), "height": (64, 64, 64), "width": (64, 64, 64)}


def test_a_gpu_without_a_precision_is_refused() -> None:
    for precision, gpu in [("fp8", "sm_89"), ("fp8", "sm_120"), ("bf16", "sm_80"), ("fp16", "sm_75")]:
        require_capability(precision, gpu)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"this GPU is sm_86; fp8 needs sm_89 or later: choose bf16 or fp16"):
        require_capability("fp8", "sm_86")
    with pytest.raises(BackendError, match=r"this GPU is sm_75; bf16 needs sm_80 or later: choose fp16"):
        require_capability("bf16", "sm_75")
    with pytest.raises(BackendError, match="torch finds no CUDA device here"):
        require_capability("fp32", None)


@pytest.mark.skipif(HAS_TENSORRT, reason="tensorrt is installed")
def test_without_tensorrt_the_error_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"tensorrt cannot be imported .*; `pip install tensorrt`"):
        TensorRTBackend(tmp_path / "denoiser.plan", tiny_denoiser("stable_diffusion")[1], CUDA)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 1)

    def forward(self, latents: Tensor) -> Tensor:
        output: Tensor = self.convolution(latents)
        return output


def test_precision_of_reads_the_precision_of_the_file(tmp_path: Path) -> None:
    latents = TensorSpec("latents", "float32", ("batch", 4, "height", "width"))
    output = TensorSpec("output", "float32", ("batch", 4, "height", "width"))
    for precision, dtype in [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]:
        file = tmp_path / f"{precision}.onnx"
        export_onnx(Convolution(), Interface((latents,), output), file, title="convolution", dtype=dtype)
        assert precision_of(file) == precision


def test_cast_last_moves_the_cast_to_the_end_and_keeps_the_pixels(tmp_path: Path) -> None:
    """TensorRT supports uint8 only at an output."""
    onnx = pytest.importorskip("onnx")
    decoder = DecoderModule(build_vae("stable_diffusion"))
    interface = decoder.interface()
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    export_onnx(decoder, interface, before, title="decoder")
    model = onnx.load(before, load_external_data=False)
    cast_last(model)
    assert model.graph.node[-1].op_type == "Cast"
    onnx.save(model, after)
    onnx.checker.check_model(str(after), full_check=True)
    latents = torch.randn(2, 4, 4, 6)
    first, second = (OnnxRuntimeBackend(file, interface, CPU, threads=1)(latents).int() for file in (before, after))
    assert (first - second).abs().max() <= 1  # another order of operations, another rounding
    nodes = len(model.graph.node)
    cast_last(model)
    assert len(model.graph.node) == nodes and model.graph.node[-1].op_type == "Cast"


def test_fp8_rounds_products_and_stays_close_to_float32(tmp_path: Path) -> None:
    """On the CPU, ONNX Runtime computes the embedded denoiser with the rounded numbers."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    checkpoint = open_checkpoint(DEFAULT_CHECKPOINT)
    denoiser, interface = load_component(checkpoint, "denoiser")
    half, file = tmp_path / "denoiser.onnx", tmp_path / "denoiser.fp8.onnx"
    export_onnx(denoiser, interface, half, title="denoiser", dtype=torch.float16)
    calls = record_calls(checkpoint, ["a red apple", "a cat", "a house", "a car"])
    assert len(calls) == 10  # 1, 2, 3 and 4 steps
    write_fp8_onnx(half, file, calls)
    onnx.checker.check_model(str(file))
    assert (precision_of(half), precision_of(file)) == ("fp16", "fp8")
    graph = onnx.load(file, load_external_data=False).graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) > 40
    options = (
        onnxruntime.SessionOptions()
    )  # optimizations move other operators into fp8, which ONNX Runtime does not support
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    for call in (calls[0], calls[-1]):
        expected = TorchBackend(denoiser, CPU)(*(torch.from_numpy(array) for array in call.values()))
        actual = torch.from_numpy(session.run(None, dict(call))[0])
        assert 1e-3 < relative_l2(actual, expected) < 0.1


# -- on a GPU ---------------------------------------------------------------------------------


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
    assert json.loads(original)["tensorrt"] == import_tensorrt().__version__
    beside.write_text(original.replace(import_tensorrt().__version__, "8.0.0"), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"with TensorRT 8.0.0; this machine has sm_"):
        TensorRTBackend(plan, interface, CUDA)
    beside.write_text(original, encoding="utf-8")
    plan.write_bytes(plan.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match="TensorRT cannot load"):
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
