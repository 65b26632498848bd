"""VBench: clips under the names that it reads, its weights, its results and its totals."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tdm_runtime.checkpoint.folder import CLIP_CHECKPOINT
from tdm_runtime.media.receipt import read_claims
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from training.cli import main
from training.measure.vbench import (
    DIMENSIONS,
    VBenchScores,
    check_ready,
    clip_settings,
    file_prompts,
    make_clips,
    package_folder,
    read_results,
    suite_prompts,
    with_totals,
)

INFO = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a red heart",
        "dimension": ["color", "object_class"],
        "auxiliary_info": {"color": {"color": "red"}, "object_class": {"object": "heart"}},
    },
    {"prompt_en": "a red heart", "dimension": ["overall_consistency", "imaging_quality"]},
]
"""In the layout of VBench_full_info.json, which has some prompts twice."""
VBENCH_PYTHON = os.environ.get("VBENCH_PYTHON", "build/vbench/bin/python")


@pytest.fixture(scope="module")
def clip_model() -> LoadedModel:
    return load_model(CLIP_CHECKPOINT, device="cpu")


@pytest.fixture
def info_file(tmp_path: Path) -> Path:
    file = tmp_path / "VBench_full_info.json"
    file.write_text(json.dumps(INFO))
    return file


def test_prompts_of_a_dimension_come_from_the_info_file_once(info_file: Path) -> None:
    assert suite_prompts(info_file, ["color", "overall_consistency"]) == ["a red heart"]
    assert suite_prompts(info_file, ["temporal_flickering"]) == ["In a still frame, a stop sign"]
    with pytest.raises(ValueError, match="no prompt for scene"):
        suite_prompts(info_file, ["scene"])
    info_file.write_text('[{"prompt": "a"}]')
    with pytest.raises(ValueError, match="is no VBench_full_info"):
        suite_prompts(info_file, ["color"])


def test_prompts_that_cannot_be_file_names_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n../escape\n")
    with pytest.raises(ValueError, match="line 3"):
        file_prompts(file)


def test_clips_resume_and_have_seeds_of_their_own(clip_model: LoadedModel, tmp_path: Path) -> None:
    settings = clip_settings(clip_model, 1, seed=0)
    prompts = ["a star moving down", "a cat"]
    assert make_clips(tmp_path, clip_model, settings, prompts, 2) == 4
    clips = {file.name: file.read_bytes() for file in (tmp_path / "clips").iterdir()}
    assert sorted(clips) == [f"{prompt}-{index}.mp4" for prompt in sorted(prompts) for index in range(2)]
    (tmp_path / "clips" / "a cat-1.mp4").unlink()
    assert make_clips(tmp_path, clip_model, settings, prompts, 2) == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "clips").iterdir()} == clips
    receipts = [read_claims(tmp_path / "clips" / name)[0].receipt for name in clips]
    assert len({receipt.seed for receipt in receipts}) == 4
    assert all(name.startswith(receipt.prompt) for name, receipt in zip(clips, receipts, strict=True))
    with pytest.raises(ValueError, match="num_inference_steps = 1 and this run has 2"):
        make_clips(tmp_path, clip_model, replace(settings, num_inference_steps=2), prompts, 2)


def test_missing_weights_are_named_with_place_and_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    check_ready(["temporal_flickering"], is_suite=False)
    with pytest.raises(
        FileNotFoundError, match=rf"{tmp_path}/amt_model/amt-s.pth is missing.*huggingface.co/lalala125"
    ):
        check_ready(["motion_smoothness"], is_suite=True)
    (tmp_path / "amt_model").mkdir()
    (tmp_path / "amt_model" / "amt-s.pth").touch()
    check_ready(["motion_smoothness"], is_suite=True)
    with pytest.raises(ValueError, match="labels of VBench's own prompts"):
        check_ready(["color"], is_suite=False)
    with pytest.raises(ValueError, match="'colour' is no dimension"):
        check_ready(["colour"], is_suite=True)


def test_an_interpreter_without_vbench_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="does not run"):
        package_folder(str(tmp_path / "python"))
    assert main(["vbench", "--output", str(tmp_path), "--python", sys.executable]) == 2
    assert "has no package vbench; install vbench==0.1.5" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_totals_are_those_of_vbench() -> None:
    """A model that meets every upper limit scores 1. A weight moves its group alone, Quality four times as much."""
    best = VBenchScores({name: dimension.highest for name, dimension in DIMENSIONS.items()}, {})
    assert with_totals(best).total == pytest.approx(1.0)
    still = with_totals(replace(best, dimensions={**best.dimensions, "dynamic_degree": 0.0, "scene": 0.4111}))
    assert still.quality == pytest.approx(1 - 0.5 / 6.5)
    assert still.semantic == pytest.approx(1 - 0.5 / 9)
    assert still.total == pytest.approx(1 - (4 * 0.5 / 6.5 + 0.5 / 9) / 5)
    part = with_totals(VBenchScores({"scene": 0.5}, {"scene": 5}))
    assert part.quality is part.semantic is part.total is None


def test_results_are_read_as_vbench_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "temporal_flickering_eval_results.json"
    clips = [{"video_path": "clips/a cat-0.mp4", "video_results": 0.96}]
    file.write_text(json.dumps({"temporal_flickering": [0.96, clips]}))
    scores = read_results(tmp_path)
    assert (scores.dimensions, scores.num_clips) == ({"temporal_flickering": 0.96}, {"temporal_flickering": 1})
    for broken in ('{"temporal_flickering": [NaN, []]}', '{"temporal_flickering": 0.9}', "{"):
        file.write_text(broken)
        with pytest.raises(ValueError, match="run again"):
            read_results(tmp_path)


def test_pictures_have_no_vbench(model: LoadedModel) -> None:
    with pytest.raises(ValueError, match="name a clip checkpoint"):
        clip_settings(model, None, 0)


@pytest.mark.skipif(not Path(VBENCH_PYTHON).exists(), reason=f"{VBENCH_PYTHON} is missing; see training/README.md")
def test_vbench_itself_scores_the_clips(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red heart still on a blue background\n")
    command = ["vbench", "--output", str(tmp_path / "run"), "--prompts", str(prompts), "--python", VBENCH_PYTHON]
    command += ["--dimensions", "temporal_flickering", "--steps", "1", "--clips", "2", "--device", "cpu"]
    assert main(command) == 0
    found = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert found["num_clips"] == {"temporal_flickering": 2}
    assert 0.9 < found["dimensions"]["temporal_flickering"] < 1.0
