"""The requested backend runs a checkpoint, or the fastest one with good pictures; the model says which and why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tdm_runtime.backends import BackendName, Precision
from tdm_runtime.backends.cpu import ISA_LIMIT
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.manifest import MANIFEST_FILE, PictureParity, default_artifacts, load_manifest
from tdm_runtime.errors import ArtifactError, BackendError
from tdm_runtime.model.artifacts import Artifacts, BackendConfig
from tdm_runtime.model.choice import CHOICE_FILE, MIN_PSNR_DB, ThreadCheck, load_model
from tdm_runtime.model.local_parity import LocalParity
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

PARAMS = SamplingParams("a red apple", 3, 2, 24, 16)
ON_CPU = ("torch fp32", "openvino fp32", "onnxruntime fp32")
"""Candidates of the copies below. Those of a GPU are left out."""


def parity(psnr_db: float) -> Mapping[int, PictureParity]:
    """Return this PSNR at K = 4 and better ones at fewer steps."""
    return {steps: PictureParity(psnr_db + 4 - steps, 20.0, 0.99) for steps in (1, 2, 3, 4)}


def write_builds(folder: Path, checkpoint: Path, **pictures: Mapping[int, PictureParity]) -> None:
    """Keep only these builds of a folder and set their parities; `openvino_fp32` names a build."""
    manifest = load_manifest(folder, open_checkpoint(checkpoint))
    kept = {name.replace("_", " "): found for name, found in pictures.items()}
    builds = tuple(replace(b, pictures=kept[b.name]) for b in manifest.builds if b.name in kept)
    assert len(builds) == len(kept)
    replace(manifest, builds=builds).save(folder)


@pytest.fixture
def folder(tiny_artifacts: Path, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint's artifacts to change, with two builds that are quick to measure."""
    copy = Path(shutil.copytree(tiny_artifacts, tmp_path / "artifacts"))
    write_builds(copy, tiny_checkpoint, openvino_fp32=parity(60), onnxruntime_fp32=parity(60))
    return copy


@pytest.fixture
def one_build(folder: Path, tiny_checkpoint: Path) -> Path:
    """The copy with the one build that loads fastest."""
    write_builds(folder, tiny_checkpoint, onnxruntime_fp32=parity(60))
    return folder


@pytest.fixture
def no_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, so that there are thread counts to choose from."""
    monkeypatch.setattr("tdm_runtime.model.choice.cores", lambda: 2)


def auto(folder: Path | None, precision: Precision | None = None, threads: int = 1) -> BackendConfig:
    return BackendConfig("auto", precision, threads, folder, device="cpu")


def refusal(checkpoint: Path, config: BackendConfig) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_model(checkpoint, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def milliseconds(choice: str, name: str) -> float:
    """Return the milliseconds that a choice gives for a candidate."""
    found = re.search(rf"{name}(?: with \d+ threads?,)? (\S+) ms", choice)
    assert found is not None, choice
    return float(found[1])


# -- auto ------------------------------------------------------------------------------------------


def test_auto_takes_the_fastest_and_names_every_measured_candidate(tiny_checkpoint: Path, folder: Path) -> None:
    model = load_model(tiny_checkpoint, auto(folder))
    assert model.choice.startswith(f"{model.backend} with 1 thread, ")
    times_ms = {name: milliseconds(model.choice, name) for name in ON_CPU}
    assert times_ms[model.backend] == min(times_ms.values()) > 0
    assert generate(model, PARAMS).shape == (16, 24, 3)


def test_a_choice_is_remembered(tiny_checkpoint: Path, one_build: Path) -> None:
    """After an edit of the kept file the model follows the edit, so nothing was measured."""
    load_model(tiny_checkpoint, auto(one_build))
    kept = json.loads((one_build / CHOICE_FILE).read_text())
    for backend in ("onnxruntime", "torch"):
        kept["chosen"]["backend"] = backend
        kept["picture_ms"] = {f"{backend} fp32": 4321.0}
        (one_build / CHOICE_FILE).write_text(json.dumps(kept))
        model = load_model(tiny_checkpoint, auto(one_build))
        assert model.backend == f"{backend} fp32"
        assert model.choice == f"{backend} fp32 with 1 thread, 4.32e+03 ms a picture"
    assert json.loads((one_build / CHOICE_FILE).read_text()) == kept


@pytest.mark.parametrize(("kept_ms", "is_measured"), [(2.1, False), (2.8, False), (2.9, True), (501.0, False)])
def test_a_choice_of_a_busy_moment_is_measured_again(
    kept_ms: float, is_measured: bool, tiny_checkpoint: Path, one_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture takes 2 ms now. Above half a second models are not checked."""
    load_model(tiny_checkpoint, auto(one_build))
    kept = json.loads((one_build / CHOICE_FILE).read_text())
    kept["picture_ms"] = dict.fromkeys(kept["picture_ms"], kept_ms)
    (one_build / CHOICE_FILE).write_text(json.dumps(kept))
    monkeypatch.setattr("tdm_runtime.model.choice.picture_seconds", lambda model, rounds=1: 2e-3)
    model = load_model(tiny_checkpoint, auto(one_build))
    assert milliseconds(model.choice, model.backend) == pytest.approx(2.0 if is_measured else kept_ms, rel=0.01)


@pytest.mark.parametrize("change", ["machine", "features", "garbage", "request", "parity"])
def test_a_change_of_machine_request_or_parity_measures_again(
    tiny_checkpoint: Path, one_build: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model(tiny_checkpoint, auto(one_build))
    kept = json.loads((one_build / CHOICE_FILE).read_text())
    kept["picture_ms"] = {name: 4321.0 for name in kept["picture_ms"]}
    kept["machine"] += " of yesterday" if change == "machine" else ""
    (one_build / CHOICE_FILE).write_text("{" if change == "garbage" else json.dumps(kept))
    if change == "features":
        monkeypatch.setenv(ISA_LIMIT, "AVX2")  # like a CPU with other kernels
    if change == "parity":
        write_builds(one_build, tiny_checkpoint, onnxruntime_fp32=parity(30))
    model = load_model(tiny_checkpoint, auto(one_build, "fp32" if change == "request" else None))
    assert "4.32e+03" not in model.choice
    measured = json.loads((one_build / CHOICE_FILE).read_text())
    assert measured["chosen"]["backend"] == model.backend.split()[0]
    assert ("onnxruntime fp32" in measured["excluded"]) == (change == "parity")


def test_a_choice_that_cannot_be_kept_still_loads(tiny_checkpoint: Path, one_build: Path) -> None:
    (one_build / CHOICE_FILE).mkdir()
    assert load_model(tiny_checkpoint, auto(one_build)).choice


@pytest.mark.usefixtures("two_cores")
def test_auto_never_chooses_a_build_with_poor_pictures(tiny_checkpoint: Path, folder: Path) -> None:
    """The choice says why. The build still runs if it is requested by name."""
    write_builds(folder, tiny_checkpoint, openvino_fp32=parity(MIN_PSNR_DB - 0.1), onnxruntime_fp32=parity(20))
    model = load_model(tiny_checkpoint, auto(folder))
    assert model.backend == "torch fp32"
    assert "openvino fp32 not considered: its pictures reach 34.9 dB here, below 35 dB" in model.choice
    assert "onnxruntime fp32 not considered: its pictures reach 20.0 dB here, below 35 dB" in model.choice
    backends: tuple[BackendName, ...] = ("openvino", "onnxruntime")
    for backend in backends:
        for threads in (1, 0):
            named = load_model(tiny_checkpoint, BackendConfig(backend, threads=threads, artifacts=folder))
            assert named.backend == f"{backend} fp32"
            assert bool(named.choice) == (threads == 0)


def test_auto_may_choose_a_build_at_exactly_the_lowest_psnr(tiny_checkpoint: Path, folder: Path) -> None:
    write_builds(folder, tiny_checkpoint, openvino_fp32=parity(MIN_PSNR_DB))
    assert milliseconds(load_model(tiny_checkpoint, auto(folder)).choice, "openvino fp32") > 0


def test_auto_chooses_only_builds_of_the_requested_precision(
    tiny_checkpoint: Path, tiny_artifacts: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_artifacts, tmp_path / "artifacts"))
    write_builds(copy, tiny_checkpoint, openvino_fp32=parity(60), openvino_int8=parity(60))
    assert load_model(tiny_checkpoint, auto(copy, "int8")).backend == "openvino int8"
    message = refusal(tiny_checkpoint, auto(copy, "fp8"))
    assert f"was not built at fp8; run `tdm-export {tiny_checkpoint} --output {copy} --precision fp8`" in message


def test_on_a_gpu_auto_holds_torch_to_the_lowest_psnr_too(
    tiny_checkpoint: Path, no_artifacts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is only claimed here, so what needs one is left out with its reason."""
    monkeypatch.setattr("tdm_runtime.model.choice.gpu_architecture", lambda: "sm_90")
    poor: set[str] = {"torch-compiled"}
    measured = []

    def of_torch(self: LocalParity, backend: BackendName, precision: Precision) -> Mapping[int, PictureParity]:
        measured.append(backend)
        return parity(MIN_PSNR_DB - 1 if backend in poor else MIN_PSNR_DB)

    monkeypatch.setattr(LocalParity, "of_torch", of_torch)
    choice = load_model(tiny_checkpoint, BackendConfig("auto", threads=1)).choice
    assert choice is not None and measured == ["torch", "torch-compiled", "cuda-graphs"]
    assert re.search(r"^torch (fp32|bf16) with 1 thread", choice) and "torch bf16" in choice
    assert "torch-compiled bf16 not considered: its pictures reach 34.0 dB here, below 35 dB" in choice
    assert "cuda-graphs fp32 not considered: " in choice
    poor.add("torch")
    assert "torch bf16 not considered: its pictures reach 34.0 dB" in str(
        load_model(tiny_checkpoint, BackendConfig("auto", threads=1)).choice
    )


def test_the_parity_of_torch_is_measured_once(tiny_checkpoint: Path, no_artifacts: None) -> None:
    artifacts = Artifacts.find(open_checkpoint(tiny_checkpoint), BackendConfig("auto"))
    found = artifacts.parity.of_torch("torch", "bf16")
    assert set(found) == {1, 2, 3, 4} and all(20 < one.psnr_db < 99 for one in found.values())
    kept = list(Path(artifacts.folder).glob("parity-*.json"))
    assert len(kept) == 1
    kept[0].write_text(kept[0].read_text().replace(f"{found[1].psnr_db!r}", "12.5"))
    again = Artifacts.find(open_checkpoint(tiny_checkpoint), BackendConfig("auto")).parity.of_torch("torch", "bf16")
    assert again[1].psnr_db == 12.5


def test_auto_without_artifacts_chooses_torch(tiny_checkpoint: Path, no_artifacts: None) -> None:
    model = load_model(tiny_checkpoint, auto(None))
    assert model.backend == "torch fp32"
    assert model.choice.startswith("torch fp32 with 1 thread, ")


def test_auto_refuses_a_damaged_build(tiny_checkpoint: Path, folder: Path) -> None:
    (folder / "denoiser.bin").write_bytes(b"")
    assert f"{folder / 'denoiser.bin'} is damaged or missing; run `tdm-export" in refusal(tiny_checkpoint, auto(folder))


@pytest.mark.usefixtures("two_cores")
def test_threads_0_measures_only_the_requested_backend(tiny_checkpoint: Path, folder: Path) -> None:
    """It is measured with all cores and with fewer. Other backends are not."""
    model = load_model(tiny_checkpoint, BackendConfig("openvino", threads=0, artifacts=folder))
    assert re.fullmatch(r"openvino fp32 with \d+ threads?, \S+ ms a picture", model.choice)


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(("one_thread_s", "threads"), [(0.92, 2), (0.9, 1)])
def test_fewer_threads_must_be_a_tenth_faster(
    tiny_checkpoint: Path, one_build: Path, one_thread_s: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both counts make whole batches in turns. The clock is replaced, the calls are made."""
    compared = []

    def seconds(calls: Sequence[Callable[[], object]], rounds: int, limit_s: float) -> list[float]:
        for call in calls:
            call()
        compared.append(len(calls))
        return [1.0, one_thread_s] if len(calls) == 2 else [0.01]

    monkeypatch.setattr("tdm_runtime.model.choice.least_seconds_of", seconds)
    choice = load_model(tiny_checkpoint, auto(one_build, threads=0)).choice
    assert f" with {threads} thread" in choice
    assert compared.count(2) == 1


# -- by name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "precision"), [("openvino", "fp32"), ("onnxruntime", "fp32"), ("openvino", None)])
def test_the_requested_build_runs_and_has_its_parity(
    tiny_checkpoint: Path, tiny_artifacts: Path, backend: BackendName, precision: Precision | None
) -> None:
    """Without a precision it is the first build."""
    model = load_model(tiny_checkpoint, BackendConfig(backend, precision, artifacts=tiny_artifacts))
    build = load_manifest(tiny_artifacts, open_checkpoint(tiny_checkpoint)).find(backend, precision)
    assert build is not None
    assert (model.backend, model.parity, model.choice) == (build.name, build.pictures, "")


def test_every_backend_makes_the_same_picture(tiny_checkpoint: Path, tiny_artifacts: Path) -> None:
    reference = load_model(tiny_checkpoint, device="cpu")
    for backend in ("openvino", "onnxruntime"):
        model = load_model(tiny_checkpoint, BackendConfig(backend, "fp32", artifacts=tiny_artifacts))
        assert tuple(model.decoders) == tuple(reference.decoders) == ("full", "tiny")
        for decoder in reference.decoders:
            params = replace(PARAMS, decoder=decoder)
            assert np.abs(generate(model, params).astype(int) - generate(reference, params)).max() <= 1


@pytest.mark.parametrize(
    ("backend", "precision", "named"),
    [("openvino", "int8", "openvino int8"), ("openvino", None, "openvino"), ("tensorrt", "fp8", "tensorrt fp8")],
)
def test_a_missing_build_is_refused_with_the_command_to_run(
    tiny_checkpoint: Path, no_artifacts: None, backend: BackendName, precision: Precision | None, named: str
) -> None:
    message = refusal(tiny_checkpoint, BackendConfig(backend, precision))
    options = f"--backend {backend}" + (f" --precision {precision}" if precision else "")
    assert f"was not built for {named}; run `tdm-export {tiny_checkpoint} {options}`" in message


def test_a_build_that_the_named_folder_lacks_is_refused(tiny_checkpoint: Path, folder: Path) -> None:
    message = refusal(tiny_checkpoint, BackendConfig("openvino", "int8", artifacts=folder))
    command = f"tdm-export {tiny_checkpoint} --output {folder} --backend openvino --precision int8"
    assert f"was not built for openvino int8; run `{command}`" in message


def test_a_named_folder_without_artifacts_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for config in (auto(tmp_path), BackendConfig("openvino", artifacts=tmp_path)):
        message = refusal(tiny_checkpoint, config)
        assert f"{tmp_path / MANIFEST_FILE} cannot be read" in message
        assert f"run `tdm-export {tiny_checkpoint} --output {tmp_path}`" in message


def test_artifacts_of_another_checkpoint_are_refused(checkpoint_folder: Path, tiny_artifacts: Path) -> None:
    for config in (auto(tiny_artifacts), BackendConfig("openvino", artifacts=tiny_artifacts)):
        message = refusal(checkpoint_folder, config)
        assert message.startswith(f"{tiny_artifacts} was built from ")
        assert open_checkpoint(checkpoint_folder).fingerprint[:12] in message


def test_a_damaged_file_is_refused(tiny_checkpoint: Path, folder: Path) -> None:
    content = bytearray((folder / "decoder.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "decoder.bin").write_bytes(content)
    message = refusal(tiny_checkpoint, BackendConfig("openvino", artifacts=folder))
    assert f"{folder / 'decoder.bin'} is damaged or missing" in message


def test_a_component_that_was_not_built_is_refused(tiny_checkpoint: Path, folder: Path) -> None:
    manifest = load_manifest(folder, open_checkpoint(tiny_checkpoint))
    builds = [
        replace(build, components={k: v for k, v in build.components.items() if k != "tiny_decoder"})
        for build in manifest.builds
    ]
    replace(manifest, builds=tuple(builds)).save(folder)
    message = refusal(tiny_checkpoint, BackendConfig("openvino", artifacts=folder))
    assert f"openvino fp32 in {folder} has no tiny_decoder" in message


# -- fallback --------------------------------------------------------------------------------------


def test_the_fallback_runs_torch_and_says_why(tiny_checkpoint: Path, folder: Path, no_artifacts: None) -> None:
    (folder / "denoiser.bin").unlink()
    cases: dict[str, BackendConfig] = {
        "was not built for openvino int8": BackendConfig("openvino", "int8", allow_fallback=True, device="cpu"),
        "is damaged or missing": BackendConfig("openvino", artifacts=folder, allow_fallback=True, device="cpu"),
        "was not built at int8": replace(auto(folder, "int8"), allow_fallback=True),
    }
    expected = generate(load_model(tiny_checkpoint, device="cpu"), PARAMS)
    for why, config in cases.items():
        model = load_model(tiny_checkpoint, config)
        assert model.backend == "torch fp32"
        assert model.choice.startswith(f"torch fp32 in place of {config.backend}: ")
        assert why in model.choice
        assert np.abs(generate(model, PARAMS).astype(int) - expected).max() <= 2


def test_a_usable_build_runs_even_if_fallback_is_allowed(tiny_checkpoint: Path, folder: Path) -> None:
    model = load_model(tiny_checkpoint, BackendConfig("openvino", artifacts=folder, allow_fallback=True))
    assert (model.backend, model.choice) == ("openvino fp32", "")


# -- values ----------------------------------------------------------------------------------------


def test_threads_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="threads is -1; give a number of cores, or 0"):
        BackendConfig(threads=-1)


@pytest.mark.parametrize("backend", ["torch", "torch-compiled", "cuda-graphs"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_precision_that_torch_does_not_run_is_refused(backend: BackendName, precision: Precision) -> None:
    with pytest.raises(ValueError, match=f"{backend} does not run {precision}; choose fp32, bf16, fp16"):
        BackendConfig(backend, precision)


def test_torch_runs_bf16_on_request(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, BackendConfig("torch", "bf16", device="cpu"))
    assert model.backend == "torch bf16"
    expected = generate(load_model(tiny_checkpoint, device="cpu"), PARAMS).astype(int)
    difference = np.abs(generate(model, PARAMS) - expected)
    assert 0 < difference.mean() < 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_graphs_without_a_gpu_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(BackendError, match="CUDA"):
        load_model(tiny_checkpoint, BackendConfig("cuda-graphs"))


def test_only_the_default_folder_can_miss_artifacts(
    tiny_checkpoint: Path, folder: Path, no_artifacts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tdm-serve` builds missing artifacts, but not for torch and not in a folder that the user named."""
    checkpoint = open_checkpoint(tiny_checkpoint)

    def is_missing(config: BackendConfig) -> bool:
        return Artifacts.find(checkpoint, config).is_missing(config)

    assert not is_missing(BackendConfig("torch"))
    assert is_missing(BackendConfig("openvino"))
    assert is_missing(BackendConfig("auto")) == (not torch.cuda.is_available())
    assert not is_missing(BackendConfig("openvino", "int8", artifacts=folder))
    default = default_artifacts(checkpoint)
    default.parent.mkdir(parents=True)
    folder.rename(default)
    assert not is_missing(BackendConfig("auto"))
    assert not is_missing(BackendConfig("openvino", "fp32"))
    assert is_missing(BackendConfig("openvino", "int8"))
    manifest = load_manifest(default, checkpoint)
    (build,) = (one for one in manifest.builds if one.name == "openvino fp32")
    replace(manifest, builds=(replace(build, precision="bf16"),)).save(default)
    for has_bf16 in (True, False):  # "auto" would otherwise run torch for ever on a CPU that cannot run the build
        monkeypatch.setattr("tdm_runtime.checkpoint.manifest.has_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert is_missing(BackendConfig("auto")) == (not has_bf16 and not torch.cuda.is_available())


# -- in service ------------------------------------------------------------------------------------


SECONDS_IN_SERVICE: Mapping[tuple[int, float, float], int] = {
    (1, 1.0, 2.0): 2,
    (2, 2.0, 1.0): 1,
    (1, 1.0, 0.9): 1,
    (1, 1.0, 0.95): 2,  # fewer threads must be 1.1 times as fast
    (2, 1.0, 1.0): 2,
}
"""Kept thread count, seconds of a batch on both cores and on one -> the better count."""


def test_a_thread_count_is_checked_again_in_service_and_kept_for_the_next_start(
    tiny_checkpoint: Path, one_build: Path, two_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdm_runtime.model.choice.picture_seconds", lambda model, rounds=1: 2e-3)  # at every start too
    config, file = auto(one_build, threads=0), one_build / CHOICE_FILE
    load_model(tiny_checkpoint, config)
    for (kept, both_s, one_s), better in SECONDS_IN_SERVICE.items():
        before = json.loads(file.read_text())
        before["chosen"] = {"backend": "onnxruntime", "precision": "fp32", "threads": kept}
        file.write_text(json.dumps(before))
        check = ThreadCheck.of(open_checkpoint(tiny_checkpoint), config)
        assert check is not None
        clock = iter((0.0, both_s, 10.0, 10.0 + one_s))
        with monkeypatch.context() as patch:
            patch.setattr("tdm_runtime.model.choice.time.monotonic", lambda clock=clock: next(clock))
            check.round()
        sentence, after = check.better(), json.loads(file.read_text())
        assert after["chosen"]["threads"] == better
        if better == kept:
            assert sentence is None and after == before
        else:
            assert re.search(f"fp32 with {kept} threads?, and with {better} it is", sentence or "")
    assert load_model(tiny_checkpoint, config).choice.startswith("onnxruntime fp32 with 2 threads")


def test_nothing_is_checked_where_the_threads_are_named_or_nothing_is_kept(
    tiny_checkpoint: Path, one_build: Path, two_cores: None
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    assert ThreadCheck.of(checkpoint, auto(one_build, threads=0)) is None, "nothing was chosen yet"
    load_model(tiny_checkpoint, auto(one_build, threads=1))
    assert ThreadCheck.of(checkpoint, auto(one_build, threads=1)) is None
