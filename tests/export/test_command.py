"""`tdm-export` builds what is missing or damaged, keeps the rest, and reports errors in one line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.cli import main
from export.errors import ExportError
from export.onnx_export import export_onnx
from tdm_runtime.backends import BackendName, Precision
from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.manifest import MANIFEST_FILE, Build, Manifest, PictureParity, load_manifest
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import CHOICE_FILE, load_model
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.conftest import TINY_PROMPTS
from tests.stock_checkpoints import CASES, save_checkpoint

Run = Callable[..., str]


@pytest.fixture
def folder(tiny_artifacts: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint's artifacts to change."""
    return Path(shutil.copytree(tiny_artifacts, tmp_path / "artifacts"))


@pytest.fixture
def run(tiny_checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Function that runs the command on that folder, with the prompts of its artifacts, and returns its output."""
    (tmp_path / "prompts.txt").write_text("\n".join(TINY_PROMPTS))
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]

    def succeed(*arguments: str) -> str:
        assert main([str(tiny_checkpoint), "--output", str(folder), *prompts, *arguments]) == 0
        printed = capsys.readouterr()
        for done, total in re.findall(r"\| (\d+)/(\d+) done in", printed.err):
            assert done == total, "the progress bar must be full at the end"
        return printed.out

    return succeed


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail. Returns its error line, without the usage lines before it."""
    capsys.readouterr()
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = int(stop.code or 0)
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert "Traceback" not in printed.err
    sentence = re.split(r"tdm-export: (?:error: )?", printed.err)[-1].strip()
    assert sentence and "\n" not in sentence
    return sentence


def manifest_in(folder: Path, checkpoint: Path) -> Manifest:
    return load_manifest(folder, open_checkpoint(checkpoint))


def build_in(folder: Path, checkpoint: Path, backend: BackendName, precision: Precision) -> Build:
    build = manifest_in(folder, checkpoint).find(backend, precision)
    assert build is not None
    return build


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """Return file -> its hash and the time it was written."""
    return {file.name: (file_sha256(file), file.stat().st_mtime_ns) for file in folder.iterdir()}


# -- existing builds -------------------------------------------------------------------------


def test_a_second_run_builds_nothing_and_says_up_to_date(run: Run, folder: Path, tiny_checkpoint: Path) -> None:
    (folder / CHOICE_FILE).write_text("{}")
    before = state(folder)
    for arguments in (("--backend", "onnxruntime"), ("--backend", "openvino", "--precision", "int8,fp32")):
        printed = run(*arguments)
        assert f"{folder} is up to date" in printed
        for build in manifest_in(folder, tiny_checkpoint).builds:
            assert f"| {build.name} | 4 | {build.pictures[4].psnr_db:.1f} |" in printed
    assert state(folder) == before


def test_a_cpu_without_bf16_gets_fp32_by_default(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.cli.has_bf16", lambda: False)
    assert f"{folder} is up to date" in run()  # it holds openvino fp32, not bf16


def test_parity_of_another_cpu_is_shown_as_such(run: Run, folder: Path, tiny_checkpoint: Path) -> None:
    says = "its parity was measured on another CPU; `--verify` measures it on this one"
    assert says not in run("--backend", "onnxruntime")
    manifest = manifest_in(folder, tiny_checkpoint)
    builds = tuple(replace(build, measured_on=("x86_64", "avx")) for build in manifest.builds)
    replace(manifest, builds=builds).save(folder)
    assert says in run("--backend", "onnxruntime")


def test_verify_measures_again_and_builds_nothing(run: Run, folder: Path, tiny_checkpoint: Path) -> None:
    """The manifest holds made-up parities, which the command must replace."""
    measured = build_in(folder, tiny_checkpoint, "openvino", "int8")
    bare = {name: replace(component, parity=None) for name, component in measured.components.items()}
    wrong = replace(measured, components=bare, pictures={1: PictureParity(0.0, 0.0, 0.0)})
    replace(manifest_in(folder, tiny_checkpoint), builds=(wrong,)).save(folder)
    before = state(folder)
    assert "| openvino int8 | 1 | " in run("--verify")
    after = state(folder)
    assert before.pop(MANIFEST_FILE) != after.pop(MANIFEST_FILE)
    assert after == before
    (found,) = manifest_in(folder, tiny_checkpoint).builds
    assert replace(found, components=bare, pictures=wrong.pictures) == wrong
    assert tuple(found.pictures) == tuple(measured.pictures)
    for steps, parity in found.pictures.items():
        assert parity.psnr_db == pytest.approx(measured.pictures[steps].psnr_db, abs=0.5)
    for name, component in found.components.items():
        assert component.parity is not None and measured.components[name].parity is not None
        assert component.parity.relative_l2 == pytest.approx(measured.components[name].parity.relative_l2, rel=0.1)


def picture(checkpoint: Path, backend: BackendName, artifacts: Path) -> Pixels:
    model = load_model(checkpoint, BackendConfig(backend, "fp32", artifacts=artifacts))
    return generate(model, SamplingParams("a red apple", 5, 4, 24, 16))


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the programs that are exported to ONNX within the test."""
    titles: list[str] = []

    def spy(*arguments: Any, title: str, **settings: Any) -> None:
        titles.append(title)
        export_onnx(*arguments, title=title, **settings)

    monkeypatch.setattr("export.build.export_onnx", spy)
    return titles


def test_a_further_build_takes_over_what_is_there(
    run: Run, folder: Path, tiny_checkpoint: Path, exported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_in(folder, tiny_checkpoint)
    before = state(folder)
    replace(manifest, builds=tuple(build for build in manifest.builds if build.backend != "onnxruntime")).save(folder)
    for made in ("write_ir", "write_int8_ir"):
        monkeypatch.delattr(f"export.build.{made}")  # a call of either would fail
    run("--backend", "onnxruntime")
    assert exported == []
    assert [build.name for build in manifest_in(folder, tiny_checkpoint).builds] == [
        build.name for build in manifest.builds
    ]
    after = state(folder)
    assert before.pop(MANIFEST_FILE) != after.pop(MANIFEST_FILE)  # the parities were measured again
    assert after == before


def test_force_exports_again(
    folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any, title: str) -> None:
        raise ExportError(f"{title} is exported again")

    monkeypatch.setattr("export.build.export_onnx", stop)
    says = refusal(capsys, str(tiny_checkpoint), "--output", str(folder), "--backend", "onnxruntime", "--force")
    assert says == "text_encoder is exported again"


def test_a_damaged_artifact_is_built_again_with_all_earlier_builds(
    run: Run, folder: Path, tiny_checkpoint: Path, tiny_artifacts: Path, exported: list[str]
) -> None:
    kept: tuple[tuple[BackendName, Precision], ...] = (("openvino", "fp32"), ("onnxruntime", "fp32"))
    builds = tuple(build_in(folder, tiny_checkpoint, *target) for target in kept)
    replace(manifest_in(folder, tiny_checkpoint), builds=builds).save(folder)
    with (folder / "denoiser.onnx.data").open("r+b") as stream:
        stream.write(b"\0\1\2\3")
    (folder / CHOICE_FILE).write_text("{}")
    assert "up to date" not in run("--backend", "onnxruntime")
    assert exported == ["denoiser"]
    built = manifest_in(folder, tiny_checkpoint)
    assert [(build.backend, build.precision) for build in built.builds] == list(kept)
    assert all(build.pictures for build in built.builds)
    assert not (folder / CHOICE_FILE).exists(), "the choice was measured on the old files and must be deleted"
    for backend, _ in kept:
        np.testing.assert_array_equal(
            picture(tiny_checkpoint, backend, folder), picture(tiny_checkpoint, backend, tiny_artifacts)
        )
    assert [file.name for file in folder.parent.iterdir() if file.is_dir()] == [folder.name], "no temporary folder"


# -- errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backend", "abacus"], "unknown backend 'abacus'; choose from openvino, onnxruntime, tensorrt"),
        (["--backend", "torch"], "unknown backend 'torch'; choose from openvino, onnxruntime, tensorrt"),
        (["--backend", "openvino,"], "unknown backend ''"),
        (["--precision", "fp12"], "unknown precision fp12; choose from fp32, bf16, fp16, int8, fp8"),
        (["--backend", "onnxruntime", "--precision", "int8"], "onnxruntime is built at fp32; --precision names none"),
        (["--backend", "openvino,onnxruntime", "--precision", "int8"], "onnxruntime is built at fp32"),
        (["--backend", "openvino", "--precision", "fp16"], "openvino is built at bf16, fp32, int8"),
        (["--prompts", "/absent/prompts.txt"], "the prompts file /absent/prompts.txt cannot be read"),
    ],
)
def test_an_invalid_flag_value_is_refused_and_changes_nothing(
    run: Run, folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    before = state(folder)
    assert says in refusal(capsys, str(tiny_checkpoint), "--output", str(folder), *arguments)
    assert state(folder) == before


@pytest.mark.parametrize(
    ("content", "says"), [(b" \n\n", "is empty; write one prompt per line"), (b"\xff\xfe", "cannot be read")]
)
def test_an_empty_or_unreadable_prompts_file_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    message = refusal(capsys, str(tiny_checkpoint), "--prompts", str(tmp_path / "prompts.txt"))
    assert str(tmp_path / "prompts.txt") in message and says in message


def test_a_missing_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path / 'absent'} is not a folder" in refusal(capsys, str(tmp_path / "absent"))
    assert "lacks model_index.json" in refusal(capsys, str(tmp_path))


def test_verify_without_artifacts_names_the_command_to_run(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "absent"
    message = refusal(capsys, str(tiny_checkpoint), "--output", str(output), "--verify")
    assert f"run `tdm-export {tiny_checkpoint} --output {output}`" in message


def test_verify_refuses_a_damaged_artifact(
    folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "denoiser.bin").unlink()
    message = refusal(capsys, str(tiny_checkpoint), "--output", str(folder), "--verify")
    assert f"{folder / 'denoiser.bin'} is damaged or missing; run `tdm-export" in message


def test_an_output_that_cannot_be_written_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("a file")
    for output in (tmp_path / "file", tmp_path / "file" / "artifacts"):
        message = refusal(capsys, str(tiny_checkpoint), "--output", str(output), "--backend", "openvino")
        assert str(output) in message and "choose another folder with --output" in message
    assert (tmp_path / "file").read_text() == "a file"


def test_a_folder_with_other_files_is_never_replaced(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The artifacts folder is replaced as a whole, so it must not hold anything else."""
    (tmp_path / "thesis.txt").write_text("a thesis")
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    for output in (tmp_path, copy):
        message = refusal(capsys, str(copy), "--output", str(output), "--backend", "openvino", "--force")
        assert message == f"{output} holds files that are not artifacts; choose another folder with --output"
    assert (tmp_path / "thesis.txt").read_text() == "a thesis"
    open_checkpoint(copy)


def test_a_model_of_two_experts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_checkpoint(CASES["Wan 2.2 A14B"], tmp_path / "clips")
    message = refusal(capsys, str(folder), "--backend", "openvino")
    assert message.endswith("serve it on torch, with --backend torch") and "transformer_2" in message
    assert not any(tmp_path.glob("*.partial*"))
