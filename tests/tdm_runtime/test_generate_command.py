"""`tdm-generate` writes the picture that was asked for, or says in one sentence why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdm_runtime.cli import main
from tdm_runtime.codec import EXIF_IFD, EXIF_USER_COMMENT, describe_parameters
from tdm_runtime.loaded_model import LoadedModel
from tdm_runtime.params import MAX_SEED, SamplingParams
from tdm_runtime.pipeline import generate


def command(checkpoint_folder: Path, output: Path, *more: str, prompt: str = "a red apple") -> list[str]:
    return [prompt, "--output", str(output), "--checkpoint", str(checkpoint_folder), *more]


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail. Returns its one sentence, less the usage lines before it."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    printed = capsys.readouterr()
    assert status != 0
    assert printed.out == ""
    assert "Traceback" not in printed.err
    *usage, sentence = printed.err.strip().splitlines()
    assert all(line.startswith(("usage: tdm-generate", " ")) for line in usage)
    assert sentence.startswith("tdm-generate: ")
    return sentence


def test_the_file_holds_the_pipelines_picture_and_its_parameters(
    model: LoadedModel, checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "apple.png"
    assert main(command(checkpoint_folder, output, "--seed", "7", "--steps", "2")) == 0
    width, height = model.recipe.native_sizes[0]
    params = SamplingParams("a red apple", 7, 2, width, height)
    with Image.open(output) as picture:
        assert (picture.format, picture.size) == ("PNG", (width, height))
        assert picture.info["parameters"] == describe_parameters(params, model.recipe, model.digest)
        np.testing.assert_array_equal(np.asarray(picture), generate(model, params))
    assert f"{output}: 2 steps, seed 7" in capsys.readouterr().out


@pytest.mark.parametrize(("suffix", "name"), [(".webp", "WEBP"), (".jpg", "JPEG"), (".JPEG", "JPEG")])
def test_the_suffix_names_the_format(checkpoint_folder: Path, tmp_path: Path, suffix: str, name: str) -> None:
    output = tmp_path / f"apple{suffix}"
    assert main(command(checkpoint_folder, output, "--seed", "7", "--steps", "1")) == 0
    with Image.open(output) as picture:
        assert picture.format == name
        assert b"S\0e\0e\0d\0:\0 \0007" in picture.getexif().get_ifd(EXIF_IFD)[EXIF_USER_COMMENT]


def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(checkpoint_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("one", "7"), ("same", "7"), ("other", "8")):
        assert main(command(checkpoint_folder, tmp_path / f"{name}.png", "--seed", seed, "--steps", "1")) == 0
    one, same, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "same", "other"))
    assert one == same != other


def test_a_drawn_seed_is_printed_and_the_default_step_count_is_the_recipes(
    model: LoadedModel, checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "apple.png"
    assert main(command(checkpoint_folder, output)) == 0
    printed = capsys.readouterr().out
    assert f": {model.recipe.default_steps} steps, seed " in printed
    seed = printed.split("seed ")[1].split(",")[0]
    assert 0 <= int(seed) <= MAX_SEED
    with Image.open(output) as picture:
        assert f"Seed: {seed}," in picture.info["parameters"]


@pytest.mark.parametrize(
    ("more", "prompt", "says"),
    [
        (["--steps", "9"], "a red apple", "num_inference_steps is 9; "),
        (["--steps", "0"], "a red apple", "num_inference_steps is 0; "),
        (["--steps", "many"], "a red apple", "invalid int value: 'many'"),
        (["--seed", "-1"], "a red apple", f"seed is -1; it must be a whole number from 0 to {MAX_SEED}"),
        ([], "", "prompt is empty"),
        ([], "x" * 2001, "prompt has 2001 characters; at most 2000"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(
    checkpoint_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    prompt: str,
    says: str,
) -> None:
    output = tmp_path / "apple.png"
    assert says in complaint(command(checkpoint_folder, output, *more, prompt=prompt), capsys)
    assert not output.exists()


@pytest.mark.parametrize("name", ["apple.gif", "apple", "apple.png.txt"])
def test_a_suffix_that_is_no_format_is_refused(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    says = complaint(command(checkpoint_folder, tmp_path / name), capsys)
    assert f"{tmp_path / name} ends in none of .png, .webp, .jpg, .jpeg" in says


def test_an_output_folder_that_does_not_exist_is_refused(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "absent" / "apple.png"
    assert f"the folder of {output} does not exist" in complaint(command(checkpoint_folder, output), capsys)


def test_an_output_that_cannot_be_written_is_refused(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "folder.png"
    output.mkdir()
    assert f"{output} cannot be written: Is a directory" in complaint(
        command(checkpoint_folder, output, "--steps", "1"), capsys
    )


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says = complaint(command(tmp_path / "absent", tmp_path / "apple.png"), capsys)
    assert f"{tmp_path / 'absent'} is not a folder; give the folder of a checkpoint" in says
    says = complaint(command(tmp_path, tmp_path / "apple.png"), capsys)
    assert f"{tmp_path / 'tdm_recipe.json'} is missing" in says
