"""TensorRT without a GPU: files are prepared and plans are built with tensorrt-rtx; running them ends in a sentence."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from export.cli import main as tdm_export
from export.errors import ExportError
from export.fp8_onnx import record_calls, write_fp8_onnx
from export.onnx_export import export_onnx
from export.tensorrt_build import (
    MAX_BATCH,
    MAX_ELEMENTS,
    bounded_batch,
    build_plan,
    cast_last,
    elements,
    precision_of,
    require_gpus,
    size_ranges,
    tensor_shapes,
)
from tdm_runtime.backends import TORCH_DTYPES, Precision
from tdm_runtime.backends.interface import Interface, TensorSpec
from tdm_runtime.backends.machine import gpu_architecture
from tdm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.backends.tensorrt import BuiltFor, TensorRTBackend, built_for_file, sizes_of
from tdm_runtime.backends.tensorrt_library import TensorRT, import_tensorrt, loaded_plan
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.checkpoint.manifest import load_manifest
from tdm_runtime.cli import main as tdm_generate
from tdm_runtime.errors import ArtifactError, BackendError
from tdm_runtime.families import FAMILIES, DecoderModule
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.components import load_component
from tests.gpu.tiny_denoiser import relative_l2, tiny_denoiser
from tests.stock_checkpoints import CASES, save_checkpoint
from tests.tiny_pipelines import build_vae

CPU = torch.device("cpu")
GPU = "sm_89"
SIZES = {"batch": (1, 2, 4), "height": (8, 8, 16), "width": (8, 8, 16)}
BUILT_FOR = BuiltFor("tensorrt", "11.4.0", "sm_90", "bf16", SIZES)

without_gpu = pytest.mark.skipif(gpu_architecture() is not None, reason="states what happens without a GPU")


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 1)

    def forward(self, latents: Tensor) -> Tensor:
        output: Tensor = self.convolution(latents)
        return output


CONVOLUTION = Interface(
    (TensorSpec("latents", "float32", ("batch", 4, "height", "width")),),
    TensorSpec("output", "float32", ("batch", 4, "height", "width")),
)


# -- plans ---------------------------------------------------------------------------------------


def test_every_component_of_the_embedded_checkpoint_is_built(artifacts: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(DEFAULT_CHECKPOINT)
    interfaces = load_manifest(artifacts, checkpoint).interfaces
    assert list(interfaces) == ["text_encoder", "encoder", "denoiser", "decoder", "tiny_decoder"]
    for name, interface in interfaces.items():
        plan = tmp_path / f"{name}.plan"
        sizes = size_ranges(interface, [(16, 16)], MAX_BATCH)
        built_for = build_plan(artifacts / f"{name}.onnx", plan, interface, sizes, gpu=GPU)
        assert plan.stat().st_size > (artifacts / f"{name}.onnx").stat().st_size / 4
        assert BuiltFor.load(plan) == built_for == BuiltFor("tensorrt-rtx", built_for.version, GPU, "fp32", sizes)


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tiny_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of the tiny checkpoint, also for GPUs that are not here."""
    folder = Path(shutil.copytree(tiny_artifacts, tmp_path_factory.mktemp("tensorrt") / "artifacts"))
    arguments = ["--output", str(folder), "--backend", "tensorrt", "--precision", "fp32", "--gpu", f"{GPU},sm_120"]
    assert tdm_export([str(tiny_checkpoint), *arguments]) == 0
    return folder


def test_tdm_export_builds_ahead_for_the_named_gpus(
    exported: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    manifest = load_manifest(exported, checkpoint)
    built = [build for build in manifest.builds if build.backend == "tensorrt"]
    assert [(build.name, build.gpu) for build in built] == [("tensorrt fp32", GPU), ("tensorrt fp32", "sm_120")]
    for build in built:
        assert not build.pictures and list(build.requires) == ["tensorrt-rtx"]
        gpus = {name: BuiltFor.load(exported / part.file).gpu for name, part in build.components.items()}
        assert gpus == dict.fromkeys(("text_encoder", "encoder", "denoiser", "decoder", "tiny_decoder"), build.gpu)
    before = (exported / "manifest.json").stat().st_mtime_ns
    arguments = ["--output", str(exported), "--backend", "tensorrt", "--precision", "fp32", "--gpu", GPU]
    assert tdm_export([str(tiny_checkpoint), *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"{exported} is up to date" in printed and "tensorrt fp32 was built for sm_120 and not run" in printed
    assert (exported / "manifest.json").stat().st_mtime_ns == before


@without_gpu
def test_a_plan_for_a_gpu_that_is_not_here_is_refused_and_auto_passes_it_over(
    exported: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--checkpoint", str(tiny_checkpoint), "--artifacts", str(exported), "-o", str(tmp_path / "a.png")]
    assert tdm_generate(["a cat", *model, "--backend", "tensorrt"]) == 2
    assert "was built for sm_89 with tensorrt-rtx" in (message := capsys.readouterr().err)
    assert "this machine has no CUDA device" in message and "Traceback" not in message
    assert tdm_generate(["a cat", *model, "--backend", "auto"]) == 0
    assert (tmp_path / "a.png").is_file()


@without_gpu
def test_without_a_driver_a_plan_is_not_loaded_and_the_reason_is_given(exported: Path) -> None:
    (plan,) = exported.glob(f"text_encoder.*.{GPU}.plan")
    library = import_tensorrt("tensorrt-rtx")
    with pytest.raises(ArtifactError, match=r"cannot load .*plan \(.+\); check the NVIDIA driver"):
        loaded_plan(library, plan, library.log())


def test_a_graph_that_tensorrt_cannot_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.onnx"
    export_onnx(Convolution(), CONVOLUTION, file, title="convolution")
    build_plan(file, tmp_path / "whole.plan", CONVOLUTION, SIZES, gpu=GPU)
    model = onnx.load(file)
    model.graph.node[0].op_type = "NotAnOperator"
    onnx.save(model, file)
    with pytest.raises(ExportError, match=r"TensorRT cannot read .*broken\.onnx: .*NotAnOperator"):
        build_plan(file, tmp_path / "broken.plan", CONVOLUTION, SIZES, gpu=GPU)
    assert not (tmp_path / "broken.plan").exists()


# -- what a build accepts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "sm_86,hopper"], "hopper is no compute capability; write sm_86, or sm_86,sm_89"),
        (["--gpu", "sm_90"], r"--gpu names sm_90; tensorrt-rtx \S+ builds for sm_75, sm_80, sm_86, sm_89, sm_120"),
        (["--gpu", "sm_86", "--precision", "fp8"], "the GPU is sm_86; fp8 needs sm_89 or later: choose bf16 or fp16"),
        pytest.param([], "torch finds no CUDA device here: name GPUs with --gpu", marks=without_gpu),
    ],
)
def test_gpus_that_cannot_be_built_for_are_refused_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command = [str(tiny_checkpoint), "--output", str(tmp_path / "out"), "--backend", "tensorrt", *arguments]
    try:
        assert tdm_export(command) == 2
    except SystemExit as ended:
        assert ended.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "ONNX" not in error and not (tmp_path / "out").exists()


def test_a_gpu_without_a_precision_is_refused() -> None:
    assert require_gpus("fp8", ["sm_89", "sm_120"]) == ("sm_89", "sm_120")
    assert require_gpus("fp16", ["sm_75"]) == ("sm_75",)
    with pytest.raises(BackendError, match=r"the GPU is sm_86; fp8 needs sm_89 or later: choose bf16 or fp16"):
        require_gpus("fp8", ["sm_89", "sm_86"])
    with pytest.raises(BackendError, match=r"the GPU is sm_75; bf16 needs sm_80 or later: choose fp16"):
        require_gpus("bf16", ["sm_75"])


def test_the_data_centre_library_builds_only_where_the_plan_runs() -> None:
    library = TensorRT("tensorrt", SimpleNamespace(__version__="11.4.0"))
    with pytest.raises(
        BackendError, match=r"tensorrt builds a plan only on the GPU that runs it, .*install tensorrt-rtx"
    ):
        library.gpus(["sm_86"])


def test_without_either_library_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=r"tensorrt cannot be imported .*; `pip install 'tdm-serve\[tensorrt\]'`"):
        import_tensorrt()


# -- what a plan was built for -------------------------------------------------------------------


def test_a_plan_of_another_machine_is_refused_by_name() -> None:
    BUILT_FOR.check_machine(Path("denoiser.plan"), "11.4.0", "sm_90")
    expected = r"built for sm_90 with tensorrt 11.4.0; this machine has sm_89 with tensorrt 10.9.1; run `tdm-export`"
    with pytest.raises(ArtifactError, match=expected):
        BUILT_FOR.check_machine(Path("denoiser.plan"), "10.9.1", "sm_89")
    with pytest.raises(ArtifactError, match=r"this machine has no CUDA device with tensorrt 11\.4\.0"):
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


@pytest.fixture(scope="module")
def decoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder of Stable Diffusion as an ONNX file."""
    decoder, file = DecoderModule(build_vae("stable_diffusion")), tmp_path_factory.mktemp("decoder") / "decoder.onnx"
    export_onnx(decoder, decoder.interface(), file, title="decoder")
    return file


def test_the_batch_is_bounded_so_that_no_tensor_is_too_large(decoder_file: Path) -> None:
    """SDXL's decoder has 256 channels at 1024x1024: eight samples are 2^31 numbers, one more than TensorRT takes.

    The tiny decoder has 4 channels at full size, so a side 8 times as long has as many.
    """
    sides = {"height": (1024, 1024, 1024), "width": (1024, 1024, 1024)}
    bounded = bounded_batch(decoder_file, {"batch": (1, 8, 8), **sides})
    assert bounded == {"batch": (1, 7, 7), **sides}

    def most(batch: int) -> int:
        values = {"batch": batch, "height": 1024, "width": 1024}
        return max(elements(shape, values) for _, shape in tensor_shapes(decoder_file))

    assert most(7) <= MAX_ELEMENTS < most(8)
    assert bounded_batch(decoder_file, SIZES) == SIZES
    too_large = {name: (8192, 8192, 8192) for name in sides}
    with pytest.raises(ExportError, match=r"has more than 2147483647 elements at .*; export smaller sizes"):
        bounded_batch(decoder_file, {"batch": (1, 1, 1), **too_large})


def test_no_context_is_a_sentence(tmp_path: Path) -> None:
    """TensorRT returns None where memory is out."""
    library = TensorRT("tensorrt", SimpleNamespace(__version__="11.4.0"))
    plan, log = SimpleNamespace(create_execution_context=lambda: None), SimpleNamespace(last="out of memory")
    with pytest.raises(BackendError, match=r"makes no context of .*d.plan \(out of memory\); it needs GPU memory"):
        library.context(plan, tmp_path / "d.plan", log)


def test_a_plan_of_a_library_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    BUILT_FOR.save(tmp_path / "denoiser.plan")
    with pytest.raises(BackendError, match=r"tensorrt cannot be imported"):
        TensorRTBackend(tmp_path / "denoiser.plan", tiny_denoiser("stable_diffusion")[1], torch.device("cuda"))


# -- files ---------------------------------------------------------------------------------------


def test_precision_of_reads_the_precision_of_the_file(tmp_path: Path) -> None:
    for precision, dtype in [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]:
        file = tmp_path / f"{precision}.onnx"
        export_onnx(Convolution(), CONVOLUTION, file, title="convolution", dtype=dtype)
        assert precision_of(file) == precision


def test_cast_last_moves_the_cast_to_the_end_and_keeps_the_pixels(decoder_file: Path) -> None:
    """TensorRT supports uint8 only at an output."""
    interface = DecoderModule(build_vae("stable_diffusion")).interface()
    before, after = decoder_file, decoder_file.with_name("after.onnx")
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
    sizes = size_ranges(interface, [(16, 16)], MAX_BATCH)
    assert build_plan(file, tmp_path / "plan", interface, sizes, gpu=GPU).precision == "fp8"


def test_sdxls_decoder_stays_float32_in_float16_models(tmp_path: Path) -> None:
    """Its VAE gives NaN in float16, so the stock pipeline casts it up where its config says so."""
    sdxl, plain = FAMILIES["sdxl"], FAMILIES["stable_diffusion"]
    assert sdxl.decoder_dtype({"force_upcast": True}, torch.float16) == torch.float32
    assert sdxl.decoder_dtype({"force_upcast": False}, torch.float16) == torch.float16
    assert sdxl.decoder_dtype({"force_upcast": True}, torch.bfloat16) == torch.bfloat16
    assert plain.decoder_dtype({"force_upcast": True}, torch.float16) == torch.float16
    folder = save_checkpoint(CASES["SDXL-Lightning"], tmp_path / "sdxl")
    kinds: tuple[tuple[Precision, torch.dtype], ...] = (("fp16", torch.float32), ("bf16", torch.bfloat16))
    for precision, expected in kinds:
        model = load_model(folder, BackendConfig("torch", precision), device="cpu")
        decoder, denoiser = model.decoders["full"].backend, model.denoiser
        assert isinstance(decoder, TorchBackend) and isinstance(denoiser, TorchBackend)
        assert next(decoder.module.parameters()).dtype == expected
        assert next(denoiser.module.parameters()).dtype == TORCH_DTYPES[precision]
