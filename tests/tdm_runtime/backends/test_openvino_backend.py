"""OpenVINO on the embedded checkpoint: samples are bit-equal in a batch and alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tdm_runtime.backends import BackendName, Precision
from tdm_runtime.backends import openvino as openvino_backend
from tdm_runtime.backends.openvino import OpenVINOBackend, has_bf16, parts_of, precision_hint
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
from tdm_runtime.errors import BackendError
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.components import load_component
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

PROMPTS = ("a red apple", "two green trees on blue", "a fox")
BATCH_SIZES = (2, 3, 5, 7, 9)
THREADS = 2
TIMEOUT_S = 120.0
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32", "int8")


@pytest.fixture(scope="module", params=PRECISIONS)
def built(request: pytest.FixtureRequest, artifacts: Path, checkpoint_folder: Path) -> LoadedModel:
    """The embedded model on OpenVINO, at each precision."""
    if request.param == "bf16" and not has_bf16():
        pytest.skip("this CPU has no bfloat16 arithmetic")
    return load_model(checkpoint_folder, BackendConfig("openvino", request.param, THREADS, artifacts))


def denoiser_calls(model: LoadedModel) -> list[tuple[Tensor, ...]]:
    """Return a call of one sample for every step of every step count, each with its own noise and prompt."""
    recipe = model.recipe
    steps = [
        (count, timestep) for count in recipe.step_counts for timestep in recipe.step_table(count, 64, 64).timesteps
    ]
    draw = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(1, *model.latent_shape(SamplingParams(PROMPTS[0], 0, 1, 64, 64)), generator=draw),
            torch.tensor([timestep], dtype=torch.float32),
            torch.tensor([count]),
            model.text_encoder.encode(PROMPTS[n % len(PROMPTS)]).conditioning.prompt_embeds,
        )
        for n, (count, timestep) in enumerate(steps)
    ]


def joined(calls: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(tensors) for tensors in zip(*calls, strict=True)]


def test_a_sample_is_bit_equal_in_a_batch_and_alone(built: LoadedModel) -> None:
    """A batch of 7 is padded, those of 5 and 9 are split. K and step are mixed."""
    calls = denoiser_calls(built)
    alone = [built.denoiser(*call)[0] for call in calls]
    assert not torch.equal(alone[0], alone[1])
    for size in BATCH_SIZES:
        first = size % 2  # not always the same neighbours
        together = built.denoiser(*joined(calls[first : first + size]))
        assert torch.equal(together, torch.stack(alone[first : first + size]))


def test_a_decoded_picture_is_bit_equal_in_a_batch_and_alone(built: LoadedModel) -> None:
    latents = joined(denoiser_calls(built))[0]
    for name, decoder in built.decoders.items():
        alone = [decoder.decode(sample[None])[0] for sample in latents]
        for size in BATCH_SIZES:
            np.testing.assert_array_equal(decoder.decode(latents[:size]), alone[:size], err_msg=name)


def test_the_engine_equals_the_pipeline_bit_for_bit(built: LoadedModel) -> None:
    """Several buckets are in flight, with mixed K, prompts and seeds; samples leave and join between steps."""
    requests = [
        SamplingParams(PROMPTS[n % len(PROMPTS)], n, 1 + n % 4, 64, 64, decoder)
        for n, decoder in enumerate([*built.decoders, "full", "full"] * 3)
    ]
    with DiffusionEngine(built, EngineConfig(max_batch_size=5)) as engine:
        pictures = [future.result(TIMEOUT_S).pixels for future in engine.submit_all(requests)]
    for params, picture in zip(requests, pictures, strict=True):
        np.testing.assert_array_equal(picture, generate(built, params))


def test_every_native_size_equals_torch(tiny_checkpoint: Path, tiny_artifacts: Path) -> None:
    """Each shape has a program, and the first is used again at the end."""
    reference = load_model(tiny_checkpoint, device="cpu")
    built = load_model(tiny_checkpoint, BackendConfig("openvino", "fp32", artifacts=tiny_artifacts))
    for width, height in (*reference.recipe.native_sizes, reference.recipe.native_sizes[0]):
        params = SamplingParams(PROMPTS[0], 3, 2, width, height)
        expected = generate(reference, params)
        assert expected.shape == (height, width, 3)
        assert np.abs(generate(built, params).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_weighted_words_on_a_compiled_text_encoder_equal_torch(
    backend: BackendName, tiny_checkpoint: Path, tiny_artifacts: Path
) -> None:
    width, height = open_checkpoint(tiny_checkpoint).recipe.native_sizes[0]
    params = SamplingParams("a (red:1.5) [apple]", 3, 2, width, height, prompt_syntax="a1111")
    torch_model = load_model(tiny_checkpoint, device="cpu")
    built = load_model(tiny_checkpoint, BackendConfig(backend, "fp32", artifacts=tiny_artifacts))
    found, expected = (model.embedding(params).conditioning.prompt_embeds for model in (built, torch_model))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(generate(built, params).astype(int) - generate(torch_model, params)).max() <= 1


def test_later_calls_do_not_overwrite_outputs_or_inputs(tiny_checkpoint: Path, tiny_artifacts: Path) -> None:
    """A caller may keep what a call returned, and its own tensors stay unchanged."""
    backend = OpenVINOBackend(tiny_artifacts / "denoiser.xml", "fp32")
    _, interface = load_component(open_checkpoint(tiny_checkpoint), "denoiser")
    one, other = (
        interface.random_inputs({"batch": 2, "height": 8, "width": 8}, torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    given = [tensor.clone() for tensor in one]
    first = backend(*one)
    kept = first.clone()
    assert not torch.equal(backend(*other), kept)
    assert torch.equal(first, kept)
    assert all(torch.equal(*pair) for pair in zip(one, given, strict=True))
    assert torch.equal(backend(*one), kept)


@pytest.mark.parametrize(
    ("batch_size", "threads", "parts"),
    [(1, 2, 1), (2, 2, 2), (8, 2, 2), (8, 1, 1), (2, 16, 2), (8, 16, 4), (8, 6, 2), (8, 3, 1)],
)
def test_parts_of_a_batch_share_the_threads_evenly(batch_size: int, threads: int, parts: int) -> None:
    assert parts_of(batch_size, threads) == parts


def test_each_part_of_a_batch_has_a_stream_of_threads(tiny_artifacts: Path) -> None:
    backend = OpenVINOBackend(tiny_artifacts / "decoder.xml", "fp32", threads=2)
    for batch_size, parts in ((1, 1), (4, 2)):
        backend(torch.zeros(batch_size, 4, 2, 3))
        *_, program = backend._programs.values()
        compiled = program._requests[0].get_compiled_model()
        assert len(program._requests) == parts == compiled.get_property("NUM_STREAMS")
        assert compiled.inputs[0].shape[0] == batch_size // parts


# -- precision of layers that are not quantised -----------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "has_bf16", "has_amx_int8", "hint"),
    [
        ("fp32", True, True, "f32"),
        ("bf16", True, False, "bf16"),
        ("bf16", True, True, "bf16"),
        ("int8", False, False, "f32"),
        ("int8", True, False, "bf16"),
        ("int8", True, True, "f32"),
    ],
)
def test_int8_builds_use_float32_on_amx_and_bf16_elsewhere(
    precision: Precision, has_bf16: bool, has_amx_int8: bool, hint: str
) -> None:
    assert precision_hint(precision, has_bf16, has_amx_int8) == hint


def test_bf16_is_refused_on_a_cpu_without_it() -> None:
    with pytest.raises(BackendError, match="this CPU has no bfloat16 arithmetic; choose fp32 or int8"):
        precision_hint("bf16", has_bf16=False, has_amx_int8=False)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_precision_that_openvino_does_not_run_on_cpus_is_refused(tiny_artifacts: Path, precision: Precision) -> None:
    with pytest.raises(BackendError, match=f"openvino does not run {precision} on a CPU; choose fp32, bf16 or int8"):
        OpenVINOBackend(tiny_artifacts / "denoiser.xml", precision)


@pytest.mark.parametrize(("threads", "is_pinned"), [(1, False), (2, True), (None, True)])
def test_threads_are_pinned_only_if_a_call_takes_all_cores(
    tiny_artifacts: Path, threads: int | None, is_pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of one thread each would otherwise share the first core."""
    monkeypatch.setattr(openvino_backend, "cores", lambda: 2)
    backend = OpenVINOBackend(tiny_artifacts / "decoder.xml", "fp32", threads)
    backend(torch.zeros(1, 4, 2, 3))
    (program,) = backend._programs.values()
    assert program._requests[0].get_compiled_model().get_property("ENABLE_CPU_PINNING") == is_pinned


def test_an_unreadable_model_file_is_refused(tiny_artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "garbage.xml").write_text("<net")
    shutil.copy(tiny_artifacts / "denoiser.xml", tmp_path / "weightless.xml")
    for name in ("garbage.xml", "weightless.xml", "absent.xml"):
        with pytest.raises(BackendError, match="OpenVINO cannot read") as caught:
            OpenVINOBackend(tmp_path / name, "fp32")
        assert str(tmp_path / name) in str(caught.value)
        assert str(caught.value).endswith("run `tdm-export` again") and "\n" not in str(caught.value)


def test_openvino_and_nncf_send_no_telemetry(tiny_artifacts: Path, tmp_path: Path) -> None:
    """Before openvino and nncf send telemetry, they write a client id to the home directory."""
    code = "import sys, pathlib, tdm_runtime.backends.openvino as b; b.has_bf16(); import nncf"
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment | {"HOME": str(tmp_path)}, timeout=120)
    assert not (tmp_path / "intel").exists()
