"""Artifacts for another checkpoint or machine are refused, with what they need, what is here and what to run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openvino
import pytest
from safetensors.torch import load_file, save_file

from tdm_runtime.backends.interface import Interface, TensorSpec
from tdm_runtime.backends.machine import gpu_architecture, installed
from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, Checkpoint, open_checkpoint
from tdm_runtime.checkpoint.folder_files import DIFFUSION_WEIGHTS, TINY_VAE, other_files
from tdm_runtime.checkpoint.manifest import (
    MANIFEST_FILE,
    MANIFEST_FORMAT,
    Build,
    BuiltComponent,
    ComponentParity,
    Manifest,
    PictureParity,
    check_build,
    default_artifacts,
    export_command,
    load_manifest,
)
from tdm_runtime.checkpoint.recipe import RECIPE_FILE
from tdm_runtime.errors import ArtifactError
from tdm_runtime.families import FAMILIES

INTERFACE = Interface(
    (TensorSpec("latents", "float32", ("batch", 4, "height", "width")), TensorSpec("timesteps", "float32", ("batch",))),
    TensorSpec("model_output", "float32", ("batch", 4, "height", "width")),
)
OPENVINO = openvino.get_version().split("-")[0]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two files of a build."""
    (tmp_path / "denoiser.xml").write_text("<net/>")
    (tmp_path / "denoiser.bin").write_bytes(bytes(range(256)))
    return tmp_path


@pytest.fixture
def build(folder: Path) -> Build:
    files = {name: file_sha256(folder / name) for name in ("denoiser.xml", "denoiser.bin")}
    component = BuiltComponent(files, ComponentParity(0.01, 0.5))
    return Build("openvino", "bf16", {"denoiser": component}, installed(["openvino"]))


def manifest_of(checkpoint: Checkpoint, *builds: Build) -> Manifest:
    return Manifest(
        checkpoint=checkpoint.recipe.name,
        fingerprint=checkpoint.fingerprint,
        weights=checkpoint.recipe.files,
        tools=installed(["torch", "openvino"]),
        opset=20,
        interfaces={"denoiser": INTERFACE},
        onnx={"denoiser": {"denoiser.onnx": "0" * 64}},
        builds=builds,
    )


def refusal(refused: Callable[[], object]) -> str:
    with pytest.raises(ArtifactError) as caught:
        refused()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- reading and writing ---------------------------------------------------------------------------


def test_a_manifest_is_read_as_it_was_written(checkpoint: Checkpoint, folder: Path, build: Build) -> None:
    everything = replace(
        build,
        gpu="sm_90",
        profiles={"denoiser": {"batch": (1, 4, 16), "height": (8, 16, 32)}},
        pictures={1: PictureParity(41.25, 38.5, 0.987), 4: PictureParity(99.0, 99.0, 1.0)},
        measured_on=("x86_64", "avx2", "amx_int8"),
    )
    unverified = replace(build, precision="fp32", components={"denoiser": BuiltComponent({"denoiser.xml": "0" * 64})})
    manifest = manifest_of(checkpoint, everything, unverified)
    manifest.save(folder)
    assert load_manifest(folder, checkpoint) == manifest
    assert {file.name for file in folder.iterdir()} == {"denoiser.xml", "denoiser.bin", MANIFEST_FILE}


def test_an_older_manifest_without_cpu_features_is_read(checkpoint: Checkpoint, folder: Path, build: Build) -> None:
    manifest_of(checkpoint, build).save(folder)
    content = json.loads((folder / MANIFEST_FILE).read_text())
    del content["builds"][0]["measured_on"]
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    assert load_manifest(folder, checkpoint).builds[0].measured_on == ()


def test_a_backend_opens_the_first_file(checkpoint: Checkpoint, folder: Path, build: Build) -> None:
    manifest_of(checkpoint, build).save(folder)
    (loaded,) = load_manifest(folder, checkpoint).builds
    assert loaded.components["denoiser"].file == "denoiser.xml"


def test_the_first_build_of_a_backend_is_its_best(
    checkpoint: Checkpoint, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdm_runtime.checkpoint.manifest.has_bf16", lambda: True)
    half, whole = build, replace(build, precision="fp32")
    other = replace(build, backend="onnxruntime", precision="fp32")
    manifest = manifest_of(checkpoint, other, half, whole)
    assert manifest.find("openvino", None) is half
    assert manifest.find("openvino", "fp32") is whole
    assert manifest.find("onnxruntime", None) is other
    assert manifest.find("openvino", "int8") is None
    assert manifest.find("tensorrt", None) is None


def test_an_intact_build_for_this_machine_passes(checkpoint: Checkpoint, folder: Path, build: Build) -> None:
    check_build(manifest_of(checkpoint, build), build, folder, checkpoint)


# -- manifests that are refused --------------------------------------------------------------------


def test_a_missing_manifest_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    message = refusal(lambda: load_manifest(tmp_path / "absent", checkpoint))
    assert f"{tmp_path / 'absent' / MANIFEST_FILE} cannot be read (No such file or directory)" in message
    assert f"run `tdm-export {checkpoint.folder} --output {tmp_path / 'absent'}`" in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file: Invalid JSON"),
        (b"{", "the file: Invalid JSON"),
        (b"\xff\xfe", "the file: Invalid JSON"),
        (b"[" * 100_000, "the file: Invalid JSON"),
        (b"[]", "the file: "),
        (b"null", "the file: "),
        (b"{}", "checkpoint: Field required"),
    ],
    ids=["empty", "cut short", "not UTF-8", "too deep", "list", "null", "empty object"],
)
def test_an_unreadable_manifest_is_refused(checkpoint: Checkpoint, folder: Path, content: bytes, says: str) -> None:
    (folder / MANIFEST_FILE).write_bytes(content)
    message = refusal(lambda: load_manifest(folder, checkpoint))
    assert message.startswith(f"{folder / MANIFEST_FILE}: {says}")
    assert f"run `{export_command(checkpoint, folder)}`" in message


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("opset",), "twenty", "opset: "),
        (("builds", 0, "backend"), "abacus", "builds.0.backend: "),
        (("builds", 0, "components", "denoiser", "parity", "max_abs"), "low", "builds.0.components.denoiser.parity."),
        (("builds", 0, "pictures"), {"first": {"psnr_db": 1, "min_psnr_db": 1, "ssim": 1}}, "builds.0.pictures.first"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(
    checkpoint: Checkpoint, folder: Path, build: Build, path: tuple[str | int, ...], value: object, says: str
) -> None:
    manifest_of(checkpoint, build).save(folder)
    whole = part = json.loads((folder / MANIFEST_FILE).read_text())
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (folder / MANIFEST_FILE).write_text(json.dumps(whole))
    assert refusal(lambda: load_manifest(folder, checkpoint)).startswith(f"{folder / MANIFEST_FILE}: {says}")


def test_another_format_is_refused(checkpoint: Checkpoint, folder: Path, build: Build) -> None:
    replace(manifest_of(checkpoint, build), format=MANIFEST_FORMAT + 1).save(folder)
    message = refusal(lambda: load_manifest(folder, checkpoint))
    assert f"has format {MANIFEST_FORMAT + 1}, but this version reads {MANIFEST_FORMAT}" in message
    assert export_command(checkpoint, folder) in message


def test_another_checkpoint_is_refused(checkpoint: Checkpoint, folder: Path, build: Build) -> None:
    other = replace(manifest_of(checkpoint, build), checkpoint="other-model", fingerprint="f" * 64)
    other.save(folder)
    message = refusal(lambda: load_manifest(folder, checkpoint))
    assert f"built from other-model {'f' * 12}, but this checkpoint is {checkpoint.recipe.name}" in message
    assert checkpoint.fingerprint[:12] in message
    assert export_command(checkpoint, folder) in message


# -- builds that are refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requires", "wanted", "found"),
    [
        ({"openvino": "2020.1"}, "openvino 2020.1", f"openvino {OPENVINO}"),
        ({"abacus": "3.0"}, "abacus 3.0", "abacus not installed"),
    ],
)
def test_another_version_is_refused(
    checkpoint: Checkpoint, folder: Path, build: Build, requires: dict[str, str], wanted: str, found: str
) -> None:
    other = replace(build, requires=requires)
    message = refusal(lambda: check_build(manifest_of(checkpoint, other), other, folder, checkpoint))
    assert f"openvino bf16 in {folder} was built for {wanted}; this machine has {found}" in message
    assert export_command(checkpoint, folder) in message


def test_another_gpu_is_refused(checkpoint: Checkpoint, folder: Path, build: Build) -> None:
    other = replace(build, gpu="sm_10")
    message = refusal(lambda: check_build(manifest_of(checkpoint, other), other, folder, checkpoint))
    assert f"was built for sm_10 with openvino {OPENVINO}" in message
    assert f"this machine has {gpu_architecture() or 'no CUDA device'}" in message
    assert export_command(checkpoint, folder) in message


def test_a_cpu_without_bf16_takes_another_build(
    checkpoint: Checkpoint, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = replace(manifest_of(checkpoint, build), builds=(build, replace(build, precision="fp32")))
    for has_bf16, elsewhere, best in ((True, None, "bf16"), (False, "a CPU with bf16", "fp32")):
        monkeypatch.setattr("tdm_runtime.checkpoint.manifest.has_bf16", lambda has_bf16=has_bf16: has_bf16)
        found = manifest.find("openvino", None)
        assert build.elsewhere == elsewhere and found is not None and found.precision == best


@pytest.mark.parametrize("name", ["denoiser.xml", "denoiser.bin"])
@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "missing", "a folder"])
def test_a_damaged_file_is_named(checkpoint: Checkpoint, folder: Path, build: Build, name: str, damage: str) -> None:
    content = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    if damage == "a flipped bit":
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    elif damage == "cut short":
        (folder / name).write_bytes(content[:-1])
    elif damage == "a folder":
        (folder / name).mkdir()
    message = refusal(lambda: check_build(manifest_of(checkpoint, build), build, folder, checkpoint))
    assert message == f"{folder / name} is damaged or missing; run `{export_command(checkpoint, folder)}`"


# -- fingerprints and folders ----------------------------------------------------------------------


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint to change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def change_weights(folder: Path, name: str) -> None:
    """Change weights and their hash in the recipe, as a newly published checkpoint does."""
    tensors = load_file(folder / name)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})
    files = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))["files"]
    edit_json(folder / RECIPE_FILE, files={**files, name: file_sha256(folder / name)})


def test_a_moved_checkpoint_keeps_its_artifacts(checkpoint: Checkpoint, copy: Path) -> None:
    moved = open_checkpoint(copy)
    assert moved.fingerprint == checkpoint.fingerprint
    assert default_artifacts(moved) == default_artifacts(checkpoint)


def test_files_that_no_program_depends_on_may_change(checkpoint: Checkpoint, copy: Path) -> None:
    (copy / "README.md").write_text("a checkpoint", encoding="utf-8")
    shutil.rmtree(copy / "scheduler")
    assert open_checkpoint(copy).fingerprint == checkpoint.fingerprint


def assert_other_artifacts(copy: Path, checkpoint: Checkpoint) -> None:
    assert open_checkpoint(copy).fingerprint != checkpoint.fingerprint
    assert default_artifacts(open_checkpoint(copy)) != default_artifacts(checkpoint)


@pytest.mark.parametrize("name", other_files(DEFAULT_CHECKPOINT, FAMILIES["stable_diffusion"]))
def test_another_config_or_tokenizer_needs_other_artifacts(checkpoint: Checkpoint, copy: Path, name: str) -> None:
    edit_json(copy / name, note="changed")
    assert_other_artifacts(copy, checkpoint)


def test_another_recipe_needs_other_artifacts(checkpoint: Checkpoint, copy: Path) -> None:
    edit_json(copy / RECIPE_FILE, default_steps=1)
    assert_other_artifacts(copy, checkpoint)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", f"{TINY_VAE}/{DIFFUSION_WEIGHTS}"])
def test_other_weights_need_other_artifacts(checkpoint: Checkpoint, copy: Path, name: str) -> None:
    change_weights(copy, name)
    assert_other_artifacts(copy, checkpoint)


def test_a_checkpoint_without_its_tiny_autoencoder_needs_other_artifacts(checkpoint: Checkpoint, copy: Path) -> None:
    shutil.rmtree(copy / "tiny_vae")
    files = json.loads((copy / RECIPE_FILE).read_text(encoding="utf-8"))["files"]
    del files[f"{TINY_VAE}/{DIFFUSION_WEIGHTS}"]
    edit_json(copy / RECIPE_FILE, files=files)
    assert_other_artifacts(copy, checkpoint)


def test_the_default_folder_is_in_the_user_cache(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_artifacts(checkpoint).parent == tmp_path / "xdg" / "tdm-serve"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_artifacts(checkpoint).parent == tmp_path / "home" / ".cache" / "tdm-serve"
    assert default_artifacts(checkpoint).name.startswith(f"{checkpoint.recipe.name}-")


def test_the_remedy_names_a_folder_only_if_it_is_not_the_default(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert export_command(checkpoint, default_artifacts(checkpoint)) == f"tdm-export {checkpoint.folder}"
    assert export_command(checkpoint, tmp_path) == f"tdm-export {checkpoint.folder} --output {tmp_path}"
