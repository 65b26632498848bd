"""Artifacts from another CPU serve only after their pictures were compared on this CPU.

"Another CPU" is a manifest with edited features, or this CPU with a limit on oneDNN's kernels.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tdm_runtime.backends import BackendName, Precision
from tdm_runtime.backends.cpu import ISA_LIMIT, cpu_features
from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from tdm_runtime.checkpoint.manifest import MANIFEST_FILE, Build, PictureParity, kernel_choice, load_manifest
from tdm_runtime.errors import ArtifactError
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.parity import ParityConfig
from tests.conftest import TINY_PROMPTS

OTHER_CPU = ("x86_64", "avx", "avx2", "fma3")
WRONG = {steps: PictureParity(77.0, 77.0, 1.0) for steps in (1, 2, 3, 4)}
"""Parity that the other CPU is said to have measured. No build has it here."""
FP32: tuple[BackendName, Precision] = ("openvino", "fp32")


@pytest.fixture(autouse=True)
def quick_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the prompts that the tiny artifacts were verified with; by default there are four times as many."""
    monkeypatch.setattr("tdm_runtime.model.local_parity.ParityConfig", partial(ParityConfig, TINY_PROMPTS))


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tdm-serve" / "parity"


@pytest.fixture
def exported(tiny_artifacts: Path, checkpoint: Checkpoint) -> Mapping[str, Build]:
    """The builds, measured on this CPU."""
    return {build.name: build for build in load_manifest(tiny_artifacts, checkpoint).builds}


@pytest.fixture
def folder(tiny_artifacts: Path, checkpoint: Checkpoint, tmp_path: Path, cache: Path) -> Path:
    """A copy of the artifacts, as if measured on another CPU."""
    copy = Path(shutil.copytree(tiny_artifacts, tmp_path / "artifacts"))
    manifest = load_manifest(copy, checkpoint)
    builds = tuple(replace(build, pictures=WRONG, measured_on=OTHER_CPU) for build in manifest.builds)
    replace(manifest, builds=builds).save(copy)
    return copy


def load(checkpoint: Checkpoint, folder: Path, target: tuple[BackendName, Precision] = FP32) -> LoadedModel:
    return load_model(checkpoint.folder, BackendConfig(*target, threads=1, artifacts=folder))


def kept_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("parity-*"))


def write_poor_weights(folder: Path, checkpoint: Checkpoint) -> None:
    """Flip the signs in the OpenVINO denoiser's convolutions, and put the new hash into the manifest."""
    file = folder / "denoiser.bin"
    content = np.fromfile(file, dtype=np.uint8)
    constants = [layer.attrib for layer in ElementTree.parse(folder / "denoiser.xml").iterfind(".//data[@offset]")]
    for start, size in (
        (int(found["offset"]), int(found["size"])) for found in constants if found["shape"].count(",") == 3
    ):
        content[start + 1 : start + size : 2] ^= 0x80
    content.tofile(file)
    old = load_manifest(folder, checkpoint).builds[0].components["denoiser"].files[file.name]
    text = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(text.replace(old, file_sha256(file)))


# -- measured again, once ----------------------------------------------------------------------------


def test_artifacts_of_another_cpu_are_measured_and_get_the_parity_of_this_cpu(
    checkpoint: Checkpoint, folder: Path, exported: Mapping[str, Build], cache: Path
) -> None:
    model = load(checkpoint, folder)
    assert model.parity == exported["openvino fp32"].pictures != WRONG
    assert model.backend == "openvino fp32"
    (kept,) = kept_in(folder)
    assert json.loads(kept.read_text())["measured_on"] == list(kernel_choice(exported["openvino fp32"]))
    assert not cache.exists()


def test_a_measured_parity_is_read_at_the_next_start(
    checkpoint: Checkpoint, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After an edit of the kept file the model has the edited value, so nothing was measured."""
    says = (
        "openvino fp32 in %s was not measured on a machine like this one; comparing its pictures with torch fp32 once"
    )
    load(checkpoint, folder)
    assert [record.getMessage() for record in caplog.records] == [says % folder]
    (kept,) = kept_in(folder)
    content = json.loads(kept.read_text())
    content["pictures"]["4"]["psnr_db"] = 43.21
    kept.write_text(json.dumps(content))
    caplog.clear()
    assert load(checkpoint, folder).parity[4].psnr_db == 43.21
    assert not caplog.records


def test_a_damaged_parity_file_is_measured_again(
    checkpoint: Checkpoint, folder: Path, exported: Mapping[str, Build]
) -> None:
    load(checkpoint, folder)
    (kept,) = kept_in(folder)
    for content in ("{", "{}", '{"build": "a", "measured_on": [], "pictures": {}}'):
        kept.write_text(content)
        assert load(checkpoint, folder).parity == exported["openvino fp32"].pictures
        assert kept.read_text() != content


def test_artifacts_of_a_cpu_like_this_one_are_not_measured(
    checkpoint: Checkpoint, tiny_artifacts: Path, exported: Mapping[str, Build], caplog: pytest.LogCaptureFixture
) -> None:
    assert load(checkpoint, tiny_artifacts).parity == exported["openvino fp32"].pictures
    assert not kept_in(tiny_artifacts) and not caplog.records


def test_builds_without_cpu_features_are_measured(
    checkpoint: Checkpoint, folder: Path, exported: Mapping[str, Build]
) -> None:
    content = json.loads((folder / MANIFEST_FILE).read_text())
    for build in content["builds"]:
        del build["measured_on"]
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    assert load(checkpoint, folder).parity == exported["openvino fp32"].pictures
    assert len(kept_in(folder)) == 1


def test_a_build_that_was_never_verified_is_measured(
    checkpoint: Checkpoint, folder: Path, exported: Mapping[str, Build]
) -> None:
    manifest = load_manifest(folder, checkpoint)
    builds = tuple(replace(build, pictures={}, measured_on=()) for build in manifest.builds)
    replace(manifest, builds=builds).save(folder)
    assert load(checkpoint, folder).parity == exported["openvino fp32"].pictures


@pytest.mark.skipif("avx2" not in cpu_features(), reason="these limits have no effect on this CPU")
def test_a_limit_on_kernels_counts_as_another_cpu(checkpoint: Checkpoint, folder: Path) -> None:
    """A limit needs a process, because oneDNN reads it once."""
    load(checkpoint, folder)
    code = (
        "import sys, json; from pathlib import Path; from tdm_runtime import BackendConfig, load_model\n"
        "config = BackendConfig('openvino', 'fp32', 1, Path(sys.argv[2]))\n"
        "model = load_model(Path(sys.argv[1]), config)\n"
        "print(json.dumps({k: p.psnr_db for k, p in model.parity.items()}))"
    )
    command = [sys.executable, "-c", code, str(checkpoint.folder), str(folder)]
    environment = os.environ | {ISA_LIMIT: "AVX2"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    kept = [json.loads(file.read_text()) for file in kept_in(folder)]
    assert len(kept) == 2
    (here,) = [found for found in kept if f"{ISA_LIMIT}=AVX2" in found["measured_on"]]
    assert json.loads(done.stdout) == {k: found["psnr_db"] for k, found in here["pictures"].items()}


# -- folders that cannot be written to ---------------------------------------------------------------


def test_parity_of_a_read_only_folder_is_kept_in_the_user_cache(
    checkpoint: Checkpoint, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parity = load(checkpoint, folder).parity
    (kept,) = kept_in(folder)
    kept.unlink()
    kept.mkdir()  # nothing can write a file here, not even root
    caplog.clear()
    assert load(checkpoint, folder).parity == parity
    assert [file.name for file in cache.iterdir()] == [kept.name]
    assert len(caplog.records) == 1
    assert load(checkpoint, folder).parity == parity
    assert len(caplog.records) == 1, "it was measured again"
    assert kept_in(folder) == [kept], "a partial file was left"


def test_parity_that_cannot_be_kept_is_measured_with_a_warning(
    checkpoint: Checkpoint, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parity = load(checkpoint, folder).parity
    (kept,) = kept_in(folder)
    kept.unlink()
    kept.mkdir()
    cache.parent.mkdir(parents=True)
    cache.write_text("a file")
    caplog.clear()
    assert load(checkpoint, folder).parity == parity
    assert f"neither {folder} nor {cache} can be written: parity is measured at every start" in caplog.text


# -- poor pictures on this CPU -----------------------------------------------------------------------


def test_poor_pictures_are_refused_with_value_limit_and_remedy(
    checkpoint: Checkpoint, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_poor_weights(folder, checkpoint)
    for threads in (1, 0, 1):  # a fixed number, measured, and with the kept parity
        with pytest.raises(ArtifactError) as caught:
            load_model(checkpoint.folder, BackendConfig(*FP32, threads=threads, artifacts=folder))
        says = str(caught.value)
        assert says.startswith(f"pictures of openvino fp32 in {folder} reach ")
        assert "dB on this CPU, below 35 dB (77.0 dB where it was exported); choose another --precision or --ba" in says
        assert "\n" not in says
    assert len([record for record in caplog.records if "once" in record.getMessage()]) == 1


def test_int8_by_name_has_a_lower_limit(checkpoint: Checkpoint, folder: Path) -> None:
    with contextlib.suppress(ArtifactError):  # what this CPU reaches does not matter
        load(checkpoint, folder, ("openvino", "int8"))
    (kept,) = kept_in(folder)
    content = json.loads(kept.read_text())
    for of_steps in content["pictures"].values():
        of_steps["psnr_db"] = 99.0
    for lowest, floor in ((30.0, None), (29.96, "reach 30.0 dB on this CPU, below 30 dB"), (12.3, "reach 12.3 dB")):
        content["pictures"]["2"]["psnr_db"] = lowest
        kept.write_text(json.dumps(content))
        if floor is None:
            assert load(checkpoint, folder, ("openvino", "int8")).parity[2].psnr_db == lowest
        else:
            with pytest.raises(ArtifactError, match=floor):
                load(checkpoint, folder, ("openvino", "int8"))


def test_the_fallback_replaces_a_build_with_poor_pictures(checkpoint: Checkpoint, folder: Path) -> None:
    write_poor_weights(folder, checkpoint)
    config = BackendConfig(*FP32, threads=1, artifacts=folder, allow_fallback=True, device="cpu")
    model = load_model(checkpoint.folder, config)
    assert model.backend == "torch fp32"
    assert model.choice.startswith(f"torch fp32 in place of openvino: pictures of openvino fp32 in {folder} reach ")


def test_auto_avoids_a_build_with_poor_pictures_and_says_why(checkpoint: Checkpoint, folder: Path) -> None:
    write_poor_weights(folder, checkpoint)
    model = load_model(checkpoint.folder, BackendConfig("auto", "fp32", 1, folder, device="cpu"))
    assert model.backend in ("onnxruntime fp32", "torch fp32")
    assert "onnxruntime fp32" in model.choice
    poor = json.loads(next(file for file in kept_in(folder) if "openvino" in file.read_text()).read_text())
    lowest = min(found["psnr_db"] for found in poor["pictures"].values())
    assert f"openvino fp32 not considered: its pictures reach {lowest:.1f} dB here, below 35 dB" in model.choice


def test_auto_measures_the_parity_of_every_build_of_another_cpu_once(
    checkpoint: Checkpoint, folder: Path, exported: Mapping[str, Build], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    config = BackendConfig("auto", "fp32", 1, folder, device="cpu")
    first = load_model(checkpoint.folder, config)
    assert len(kept_in(folder)) == len(caplog.records) == 2
    assert load_model(checkpoint.folder, config).choice == first.choice
    assert len(caplog.records) == 2
    if first.backend != "torch fp32":
        assert first.parity == exported[first.backend].pictures
