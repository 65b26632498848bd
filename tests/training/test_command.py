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


# ---- bad input: one sentence, and nothing is lost ------------------------------------------------


def distilled(base: Path, tmp_path: Path, settings: str = "", *, prompts: str = '{"prompt": "a fox"}\n') -> int:
    """Run `tdm-train distill` with a prompt file. Return its exit status."""
    (tmp_path / "prompts.jsonl").write_text(prompts)
    changed = {line.split()[0] for line in settings.splitlines()}
    kept = [line for line in SMALL.split("\n") if line and line.split()[0] not in changed]
    (tmp_path / "small.toml").write_text("\n".join([*kept, "save_every_s = 0.0", settings]))
    files = ["--config", str(tmp_path / "small.toml"), "--prompts", str(tmp_path / "prompts.jsonl")]
    return main(["distill", "--preset", "sd15", "--base", str(base), *files, "--output", str(tmp_path / "run")])


def test_a_command_takes_a_prompt_file_to_a_model_and_a_changed_config_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distilled(base, tmp_path) == 0
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in ("state.pt", "config.toml", "model/README.md")}
    capsys.readouterr()
    assert distilled(base, tmp_path, 'seed = 3\nsolver = "euler"\n') == 2
    assert (
        f"tdm-train: {tmp_path / 'run'} was begun with seed 0 (now 3), solver 'ddim' (now 'euler'); resume with the "
        "same, or give another --output\n"
    ) in capsys.readouterr().err
    assert {name: (tmp_path / "run" / name).read_bytes() for name in kept} == kept
    assert distilled(base, tmp_path, "clip_norm = 2.0\n") == 0, "such a change takes effect in the next iteration"


@pytest.mark.parametrize(
    ("prompts", "settings", "said"),
    [
        ('{"prompt": "a fox"}\n\n{"prompt": "a hen"}\n', "", "prompts.jsonl, line 2 is not JSON"),
        ('{"prompt": " "}\n', "", "prompts.jsonl, line 1 has no prompt"),
        ('{"prompt": "' + 2_000_000 * "a" + '"}\n', "", "line 1 has 2000000 characters; at most 20000 are read"),
        ('{"prompt": "a"}\n', 'teacher_prediction = "flow_prediction"', "the base, a stable_diffusion, has epsilon"),
        ('{"prompt": "a"}\n', "student_learning_rate = 1e36\nsteps = 9\nbatch_size = 1", "tdm diverged at iteration"),
    ],
)
def test_bad_input_of_a_run_is_one_sentence(
    prompts: str, settings: str, said: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distilled(base, tmp_path, settings, prompts=prompts) == 2
    printed = capsys.readouterr().err
    assert said in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "model").exists()


def test_a_full_disk_keeps_the_last_state_and_a_second_run_goes_on(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt.partial").symlink_to("/dev/full")
    assert distilled(base, tmp_path) == 2
    printed = capsys.readouterr().err
    assert "state.pt cannot be written after iteration 1" in printed and "make room and run again" in printed
    assert "Traceback" not in printed and not (tmp_path / "run" / "model").exists()
    assert distilled(base, tmp_path) == 0


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_printed_preset_has_every_setting_and_can_be_read_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preset", name]) == 0
    file = tmp_path / "shown.toml"
    file.write_text(capsys.readouterr().out)
    assert load_config(PRESETS["cogvideox-2b" if name != "cogvideox-2b" else "sd3-medium"], file) == PRESETS[name]


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
