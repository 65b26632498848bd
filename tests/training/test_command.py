"""The command `tdm-train`: from prompts to a student, presets, and error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tdm_runtime.checkpoint.folder import open_checkpoint
from tests.tiny_pipelines import build_pipeline
from training.cli import main
from training.config import load_config
from training.pretrained.presets import PRESETS

SMALL = """
steps = 2
batch_size = 2
accumulation = 1
step_counts = [1, 4]
step_condition_for = "both"
width = 64
height = 64
log_every = 1
student_learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_pipeline("stable_diffusion").save_pretrained(folder)
    return folder


def test_embed_and_distill_make_a_student_from_a_prompt_file(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, config, embeddings, run = (tmp_path / name for name in ("p.jsonl", "small.toml", "embeddings", "run"))
    prompts.write_text('{"prompt": "a fox"}\n{"prompt": "a hen"}\n')
    config.write_text(SMALL)
    arguments = ["--base", str(base), "--preset", "sd15"]
    monkeypatch.setitem(PRESETS, "sd15", load_config(PRESETS["sd15"], config))  # type: ignore[index]
    assert main(["embed", *arguments, "--prompts", str(prompts), "--output", str(embeddings)]) == 0
    assert main(["distill", *arguments, "--embeddings", str(embeddings), "--output", str(run)]) == 0
    assert open_checkpoint(run / "model").recipe.step_counts == (1, 4)
    assert all((run / name).is_file() for name in ("config.toml", "log.jsonl", "metrics.png"))
    printed = capsys.readouterr().out
    assert "s_per_step" in printed and f"the student is {run / 'model'}" in printed


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_printed_preset_has_every_setting_and_can_be_read_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preset", name]) == 0
    file = tmp_path / "shown.toml"
    file.write_text(capsys.readouterr().out)
    assert load_config(PRESETS["cogvideox-2b" if name != "cogvideox-2b" else "sd3"], file) == PRESETS[name]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distill", "--preset", "sd15", "--base", "absent", "--embeddings", "x", "--output", "y"], "absent"),
        (["embed", "--preset", "sd15", "--base", "absent", "--prompts", "none.jsonl", "--output", "y"], "none.jsonl"),
        (["ablate", "--variants", "everything"], "everything"),
    ],
)
def test_an_error_is_one_sentence_with_exit_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("tdm-train: ")
    assert "Traceback" not in captured.err
