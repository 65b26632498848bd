"""`tdm-generate` writes the requested picture, or says in one sentence why it cannot."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tdm_runtime.backends.cpu import cores
from tdm_runtime.checkpoint.recipe import RECIPE_FILE
from tdm_runtime.cli import main
from tdm_runtime.media.image_file import EXIF_IFD, EXIF_USER_COMMENT, describe_parameters
from tdm_runtime.media.receipt import read_claims
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import CHOICE_FILE, load_model
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import MAX_SEED, DecoderName, SamplingParams
from tdm_runtime.pipeline import generate
from tests.stock_checkpoints import CASES, save_checkpoint


def command(checkpoint_folder: Path, output: Path, *more: str, prompt: str = "a red apple") -> list[str]:
    """Return arguments that run torch, unless `more` overrides it."""
    on_torch = ["--backend", "torch", "--threads", "1"]
    return [prompt, "--output", str(output), "--checkpoint", str(checkpoint_folder), *on_torch, *more]


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail. Return its one sentence without the usage lines before it."""
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
def test_the_suffix_decides_the_format(checkpoint_folder: Path, tmp_path: Path, suffix: str, name: str) -> None:
    output = tmp_path / f"apple{suffix}"
    assert main(command(checkpoint_folder, output, "--seed", "7", "--steps", "1")) == 0
    with Image.open(output) as picture:
        assert picture.format == name
        assert b"S\0e\0e\0d\0:\0 \0007" in picture.getexif().get_ifd(EXIF_IFD)[EXIF_USER_COMMENT]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(CASES["AnimateDiff-Lightning"], tmp_path_factory.mktemp("clips"))


def test_a_clip_is_written_as_raw_frames_and_in_every_format(clip_folder: Path, tmp_path: Path) -> None:
    asked = ("--seed", "7", "--steps", "2", "--frames", "6", "--fps", "6", "--size", "64x48")
    files = {suffix: tmp_path / f"clip{suffix}" for suffix in (".npy", ".mp4", ".webm", ".webp", ".gif")}
    for file in files.values():
        assert main(command(clip_folder, file, *asked)) == 0
    frames = np.load(files[".npy"])
    assert frames.shape == (6, 48, 64, 3) and frames.dtype == np.uint8
    params = SamplingParams("a red apple", 7, 2, 64, 48, frames=6)
    np.testing.assert_array_equal(frames, generate(load_model(clip_folder, device="cpu"), params))
    for suffix in (".webp", ".gif"):
        with Image.open(files[suffix]) as animation:
            assert (animation.n_frames, animation.size, animation.info["loop"]) == (6, (64, 48), 0)  # type: ignore[attr-defined]
    with Image.open(files[".webp"]) as animation:
        for number, frame in enumerate(frames):
            animation.seek(number)
            np.testing.assert_array_equal(np.asarray(animation.convert("RGB")), frame)
    for suffix, tag in ((".mp4", "comment"), (".webm", "COMMENT")):
        with av.open(str(files[suffix])) as container:
            (track,) = container.streams
            assert isinstance(track, av.VideoStream)
            assert (track.average_rate, len(list(container.decode(track)))) == (6, 6)
            assert "Frames: 6" in container.metadata[tag]


def test_a_clip_is_verified_with_the_threads_of_its_receipt(
    clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They change the last bits of longer clips. A receipt without them says why its bits cannot be expected."""
    file, used = tmp_path / "clip.webm", list[int]()
    number, set_threads = cores() + 1, torch.set_num_threads  # a number that no measurement chooses
    asked = ("--seed", "7", "--steps", "1", "--frames", "1", "--size", "64x48", "--threads", str(number))
    assert main(command(clip_folder, file, *asked)) == 0
    (claim,) = read_claims(file)
    assert claim.receipt.threads == number

    def recorded(threads: int) -> None:
        used.append(threads)
        set_threads(threads)

    set_threads(1)
    monkeypatch.setattr(torch, "set_num_threads", recorded)
    assert main(["--verify", str(file), "--checkpoint", str(clip_folder)]) == 0
    assert number in used
    older = tmp_path / "older.json"
    older.write_text(replace(claim.receipt, threads=None, pixels_sha256="0").to_json())
    assert main(["--verify", str(older), "--checkpoint", str(clip_folder)]) == 1
    assert "names no number of threads" in capsys.readouterr().out
    older.write_text(replace(claim.receipt, threads=5000).to_json())
    assert main(["--verify", str(older), "--checkpoint", str(clip_folder)]) == 2
    assert "threads are 5000; at most 1024" in capsys.readouterr().err


def test_a_clips_previews_are_pictures_of_its_first_frame(clip_folder: Path, tmp_path: Path) -> None:
    asked = ("--seed", "7", "--steps", "2", "--frames", "3", "--size", "64x48", "--previews")
    assert main(command(clip_folder, tmp_path / "clip.npy", *asked)) == 0
    with Image.open(tmp_path / "clip.step1.png") as preview:
        assert preview.size == (64, 48)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--frames", "25"), "frames is 25; .* makes clips of 1 to 24 frames: take 24"),
        (("--frames", "0"), "frames is 0; it must be a whole number from 1 to 1025"),
        (("--fps", "500"), "fps is 500; it must be a whole number from 1 to 120"),
        (("-o", "clip.png"), r"the output is clip.png; .* makes clips: \.mp4, \.webm, \.webp, \.gif, \.npy"),
    ],
)
def test_what_a_clip_cannot_be_is_refused_with_value_and_limit(
    clip_folder: Path, tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = complaint(command(clip_folder, tmp_path / "clip.npy", "--size", "64x48", *more), capsys)
    assert re.search(message, sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--frames", "8"), "frames is 8; .* makes pictures, not clips: leave it out"),
        (("--fps", "8"), "fps is 8; .* makes pictures"),
        (("-o", "clip.mp4"), r"the output is clip.mp4; .* makes pictures: \.png, \.webp"),
    ],
)
def test_a_model_of_pictures_makes_no_clip(
    checkpoint_folder: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert re.search(message, complaint(command(checkpoint_folder, tmp_path / "a.png", *more), capsys))


def test_the_same_seed_makes_the_same_bytes_and_another_seed_does_not(checkpoint_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("one", "7"), ("same", "7"), ("other", "8")):
        assert main(command(checkpoint_folder, tmp_path / f"{name}.png", "--seed", seed, "--steps", "1")) == 0
    one, same, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "same", "other"))
    assert one == same != other


def test_the_default_seed_is_drawn_and_printed_and_the_recipe_gives_the_steps(
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
        ([], "-", "neither files nor standard input are read, write the prompt out"),
        ([], f"@{__file__}", "neither files nor standard input are read, write the prompt out"),
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


@pytest.mark.parametrize("name", ["apple.bmp", "apple", "apple.png.txt"])
def test_an_unknown_suffix_is_refused(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    says = complaint(command(checkpoint_folder, tmp_path / name), capsys)
    assert f"{tmp_path / name} ends in none of .png, .webp, .jpg, .jpeg" in says


def test_an_output_folder_that_does_not_exist_is_refused(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "absent" / "apple.png"
    assert f"the folder of {output} does not exist" in complaint(command(checkpoint_folder, output), capsys)


def test_an_existing_file_is_replaced_only_with_force(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "apple.png"
    output.write_bytes(b"a picture of mine")
    asked = command(tiny_checkpoint, output, "--steps", "1")
    message = f"the output {output} exists; choose another name, or replace it with --force"
    assert message in complaint(asked, capsys)
    assert output.read_bytes() == b"a picture of mine"
    assert main([*asked, "--force"]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")


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
    assert f"{tmp_path} lacks model_index.json; restore the folder" in says


# -- backends, decoders and previews ---------------------------------------------------------------


def read(file: Path) -> Pixels:
    with Image.open(file) as picture:
        pixels: Pixels = np.asarray(picture)
        return pixels


@pytest.mark.parametrize(
    ("backend", "precision"), [("openvino", "fp32"), ("openvino", "int8"), ("onnxruntime", "fp32")]
)
def test_the_requested_backend_makes_the_picture(
    tiny_checkpoint: Path,
    tiny_artifacts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    backend: Any,
    precision: Any,
) -> None:
    output = tmp_path / "apple.png"
    options = ["--backend", backend, "--precision", precision, "--artifacts", str(tiny_artifacts), "--seed", "7"]
    assert main(command(tiny_checkpoint, output, *options)) == 0
    model = load_model(tiny_checkpoint, BackendConfig(backend, precision, 1, tiny_artifacts))
    params = SamplingParams("a red apple", 7, model.recipe.default_steps, *model.recipe.native_sizes[0])
    np.testing.assert_array_equal(read(output), generate(model, params))
    assert re.search(rf" ms on {backend} {precision}$", capsys.readouterr().out.strip())


def test_auto_prints_its_choice(
    tiny_checkpoint: Path, tiny_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifacts = shutil.copytree(tiny_artifacts, tmp_path / "artifacts")
    options = ["--backend", "auto", "--artifacts", str(artifacts), "--seed", "7"]
    assert main(command(tiny_checkpoint, tmp_path / "apple.png", *options)) == 0
    printed = capsys.readouterr()
    found = re.search(r" ms on (\S+ \S+)$", printed.out.strip())
    assert found is not None
    assert f"backend: {found[1]} with 1 thread, " in printed.err
    assert found[1] in ("torch fp32", "openvino bf16", "openvino fp32", "openvino int8", "onnxruntime fp32")
    kept = json.loads((artifacts / CHOICE_FILE).read_text())["chosen"]
    assert found[1] == f"{kept['backend']} {kept['precision']}"


@pytest.mark.parametrize("decoder", ["full", "tiny"])
def test_the_requested_decoder_makes_the_picture(tiny_checkpoint: Path, tmp_path: Path, decoder: DecoderName) -> None:
    output = tmp_path / "apple.png"
    assert main(command(tiny_checkpoint, output, "--seed", "7", "--decoder", decoder)) == 0
    model = load_model(tiny_checkpoint, device="cpu")
    params = SamplingParams("a red apple", 7, model.recipe.default_steps, *model.recipe.native_sizes[0], decoder)
    pictures = {name: generate(model, replace(params, decoder=name)) for name in model.decoders}
    assert not np.array_equal(pictures["full"], pictures["tiny"])
    np.testing.assert_array_equal(read(output), pictures[decoder])


def test_a_tiny_decoder_that_the_checkpoint_lacks_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = without_tiny_vae(tiny_checkpoint, tmp_path / "copy")
    says = complaint(command(folder, tmp_path / "apple.png", "--decoder", "tiny"), capsys)
    assert "decoder is 'tiny'; " in says and says.endswith(" has full")
    assert "invalid choice: 'jpeg'" in complaint(command(folder, tmp_path / "apple.png", "--decoder", "jpeg"), capsys)


@pytest.mark.parametrize("has_tiny_vae", [True, False])
def test_previews_of_every_step_but_the_last_are_written(
    tiny_checkpoint: Path, tmp_path: Path, has_tiny_vae: bool
) -> None:
    """The cheapest available decoder makes them."""
    folder = tiny_checkpoint if has_tiny_vae else without_tiny_vae(tiny_checkpoint, tmp_path / "copy")
    output = tmp_path / "apple.webp"
    assert main(command(folder, output, "--seed", "7", "--steps", "3", "--previews")) == 0
    written = sorted(file.name for file in tmp_path.iterdir() if file.is_file())
    assert written == ["apple.step1.webp", "apple.step2.webp", "apple.webp"]
    model = load_model(folder, device="cpu")
    seen: dict[int, Pixels] = {}
    params = SamplingParams("a red apple", 7, 3, *model.recipe.native_sizes[0])
    expected = generate(model, params, seen.__setitem__)
    np.testing.assert_array_equal(read(output), expected)
    for step, preview in seen.items():
        np.testing.assert_array_equal(read(tmp_path / f"apple.step{step}.webp"), preview)
        assert not np.array_equal(preview, expected)


def test_one_step_has_no_previews(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert main(command(tiny_checkpoint, tmp_path / "apple.png", "--steps", "1", "--previews")) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["apple.png"]


def test_a_provider_of_onnxruntime_runs_or_is_refused(
    tiny_checkpoint: Path, tiny_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--backend", "onnxruntime", "--artifacts", str(tiny_artifacts), "--seed", "7", "--provider"]
    assert main(command(tiny_checkpoint, tmp_path / "apple.png", *options, "cpu")) == 0
    assert "onnxruntime fp32" in capsys.readouterr().out
    if torch.cuda.is_available():
        return
    for provider, says in (("cuda", "CUDAExecutionProvider"), ("nv-tensorrt-rtx", "NvTensorRTRTXExecutionProvider")):
        message = complaint(command(tiny_checkpoint, tmp_path / "pear.png", *options, provider), capsys)
        assert f"asked for {says}" in message and "--provider cpu" in message
    assert not (tmp_path / "pear.png").exists()


def test_bad_backend_options_are_refused_in_one_sentence(
    tiny_checkpoint: Path, tiny_artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifacts = ["--artifacts", str(tiny_artifacts)]
    for options, says in (
        (["--backend", "abacus"], "invalid choice: 'abacus'"),
        (["--precision", "int8"], "torch does not run int8; choose fp32, bf16, fp16"),
        (["--threads", "-1"], "threads is -1; give a number of cores, or 0"),
        (artifacts, f"--artifacts is {tiny_artifacts}; torch runs the checkpoint itself"),
        (["--backend", "tensorrt", *artifacts], f"--output {tiny_artifacts} --backend tensorrt`"),
        (["--backend", "openvino", "--artifacts", str(tmp_path)], f"{tmp_path / 'manifest.json'} cannot be read"),
        (["--backend", "onnxruntime", "--provider", "gpu"], "invalid choice: 'gpu' (choose from"),
        (
            ["--backend", "openvino", "--provider", "cuda"],
            "only onnxruntime has providers: choose --backend onnxruntime",
        ),
    ):
        assert says in complaint(command(tiny_checkpoint, tmp_path / "apple.png", *options), capsys)
    assert not (tmp_path / "apple.png").exists()


def test_the_fallback_is_named_and_explained(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--backend", "openvino", "--artifacts", str(tmp_path), "--allow-fallback", "--seed", "7"]
    assert main(command(tiny_checkpoint, tmp_path / "apple.png", *options)) == 0
    printed = capsys.readouterr()
    assert printed.out.strip().endswith(" ms on torch fp32")
    why = f"{tmp_path / 'manifest.json'} cannot be read"
    assert f"backend: torch fp32 in place of openvino: {why}" in printed.err


def without_tiny_vae(checkpoint: Path, copy: Path) -> Path:
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("tiny_vae"))
    recipe = json.loads((copy / RECIPE_FILE).read_text(encoding="utf-8"))
    recipe["files"] = {name: sha256 for name, sha256 in recipe["files"].items() if not name.startswith("tiny_vae")}
    (copy / RECIPE_FILE).write_text(json.dumps(recipe), encoding="utf-8")
    return copy
