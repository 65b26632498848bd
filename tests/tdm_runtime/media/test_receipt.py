"""A receipt reproduces its picture, detects any other, and is read from every kind of file that holds it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdm_runtime.cli import main
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.media.image_file import encode_image
from tdm_runtime.media.receipt import TOLERANCE_LEVELS, Claim, Receipt, read_claims, receipt_of
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

PARAMS = SamplingParams("a red apple", 5, 2, 24, 16, "tiny")


@pytest.fixture(scope="module")
def tiny_model(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint, device="cpu")


@pytest.fixture
def receipt(tiny_model: LoadedModel) -> Receipt:
    return receipt_of(tiny_model, PARAMS, generate(tiny_model, PARAMS), is_strict=True)


def test_a_receipt_holds_all_parameters_of_the_picture(tiny_model: LoadedModel, receipt: Receipt) -> None:
    assert receipt.to_params() == PARAMS
    assert receipt.digest == tiny_model.digest and receipt.backend == "torch fp32"
    assert receipt.bucket == (4, 8, 12)


def test_every_value_that_changes_a_picture_changes_its_hash(tiny_model: LoadedModel, receipt: Receipt) -> None:
    others = [
        replace(PARAMS, seed=6),
        replace(PARAMS, num_inference_steps=3),
        replace(PARAMS, decoder="full"),
        replace(PARAMS, noise_angle=1.0),
    ]
    hashes = {receipt_of(tiny_model, other, generate(tiny_model, other), True).pixels_sha256 for other in others}
    assert len(hashes | {receipt.pixels_sha256}) == 5


def test_a_picture_of_weighted_words_is_made_again_from_its_file(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "apple.png", ["--checkpoint", str(tiny_checkpoint)]
    asked = ["a (red:1.5) apple", "-o", str(file), "--prompt-syntax", "a1111", "--seed", "7", "--steps", "2"]
    assert main([*asked, *folder, "--backend", "torch", "--threads", "1"]) == 0
    (claim,) = read_claims(file)
    assert (claim.receipt.prompt, claim.receipt.prompt_syntax) == ("a (red:1.5) apple", "a1111")
    assert main(["--verify", str(file), *folder]) == 0
    older = tmp_path / "older.json"
    older.write_text(replace(claim.receipt, prompt_syntax="plain").to_json())
    assert main(["--verify", str(older), *folder]) == 1
    assert "its bits differ" in capsys.readouterr().out


def test_a_frame_of_a_clip_is_reproduced_at_its_noise_angle(tiny_model: LoadedModel) -> None:
    params = replace(PARAMS, noise_angle=2.5)
    frame = generate(tiny_model, params)
    receipt = receipt_of(tiny_model, params, frame, is_strict=True)
    assert receipt.to_params() == params
    assert Claim(receipt).check(generate(tiny_model, receipt.to_params())) is None


@pytest.mark.parametrize("shape", ["a receipt", "an answer", "a picture"])
def test_a_receipt_is_read_from_json_answers_and_pictures(
    tiny_model: LoadedModel, receipt: Receipt, tmp_path: Path, shape: str
) -> None:
    pixels, file = generate(tiny_model, PARAMS), tmp_path / "file"
    if shape == "a picture":
        file.write_bytes(encode_image(pixels, "png", receipt=receipt.to_json()))
    else:
        raw = json.loads(receipt.to_json())
        file.write_text(json.dumps(raw if shape == "a receipt" else {"data": [{"b64_json": "", "receipt": raw}]}))
    (claim,) = read_claims(file)
    assert claim.receipt == receipt
    assert claim.check(pixels) is None
    assert claim.check(generate(tiny_model, replace(PARAMS, seed=6))) is not None


def test_a_picture_that_is_not_strict_may_differ_within_the_tolerance(
    tiny_model: LoadedModel, receipt: Receipt
) -> None:
    pixels = np.clip(generate(tiny_model, PARAMS), 10, 240)
    loose = replace(receipt, is_strict=False)
    near, far = (pixels + np.uint8(levels) for levels in (TOLERANCE_LEVELS, TOLERANCE_LEVELS + 1))
    assert Claim(loose, pixels).check(near) is None
    assert "3 levels" in str(Claim(loose, pixels).check(far))
    assert "verify the PNG" in str(Claim(loose).check(near))
    assert "bits differ" in str(Claim(receipt, pixels).check(near))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no receipt"),
        (b"\x89PNG but no picture", "holds no receipt"),
        (b'{"data": []}', "holds no receipt"),
        (b'{"pixels_sha256": "00", "seed": "many"}', "the receipt's"),
    ],
)
def test_a_file_without_a_receipt_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=says):
        read_claims(file)


def test_the_command_reproduces_its_own_picture(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, checkpoint = tmp_path / "a.png", ["--checkpoint", str(tiny_checkpoint)]
    assert main(["a cat", "--seed", "3", "-o", str(file), "--backend", "torch", *checkpoint]) == 0
    assert main(["--verify", str(file), *checkpoint]) == 0
    assert "seed 3, 4 steps on torch fp32, reproduced" in capsys.readouterr().out


def test_the_command_reports_a_picture_that_differs(
    tiny_model: LoadedModel, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.json"
    file.write_text(receipt_of(tiny_model, PARAMS, generate(tiny_model, replace(PARAMS, seed=6)), True).to_json())
    assert main(["--verify", str(file), "--checkpoint", str(tiny_checkpoint)]) == 1
    assert "not reproduced: its bits differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [({"digest": "0" * 64}, "name its folder with --checkpoint"), ({"backend": "abacus fp3"}, "'abacus fp3'")],
)
def test_the_command_refuses_a_receipt_that_it_cannot_reproduce(
    receipt: Receipt,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    says: str,
) -> None:
    file = tmp_path / "a.json"
    file.write_text(replace(receipt, **change).to_json())
    assert main(["--verify", str(file), "--checkpoint", str(tiny_checkpoint)]) == 2
    assert says in capsys.readouterr().err


def test_the_command_needs_either_a_prompt_or_a_receipt(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["a cat", "--verify", "a.png"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "give a prompt, or --verify" in capsys.readouterr().err


def test_the_engine_says_whether_bits_can_depend_on_the_batch(tiny_model: LoadedModel, artifacts: Path) -> None:
    from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
    from tdm_runtime.model.artifacts import BackendConfig

    on_openvino = load_model(DEFAULT_CHECKPOINT, BackendConfig("openvino", artifacts=artifacts))
    for model, params, is_strict in (
        (tiny_model, PARAMS, False),
        (on_openvino, SamplingParams("a red apple", 5, 2, 64, 64), True),
    ):
        with DiffusionEngine(model) as engine:
            assert engine.submit(params).result(60).is_strict == is_strict


def test_only_png_files_hold_a_receipt(tiny_model: LoadedModel, receipt: Receipt) -> None:
    webp = encode_image(generate(tiny_model, PARAMS), "webp", receipt=receipt.to_json())
    assert receipt.pixels_sha256.encode() not in webp
    png = Image.open(io.BytesIO(encode_image(generate(tiny_model, PARAMS), "png", receipt=receipt.to_json())))
    assert receipt.pixels_sha256 in png.text["tdm_receipt"]  # type: ignore[attr-defined]
