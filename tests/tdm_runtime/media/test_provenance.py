"""Manifests that C2PA's own reader accepts, watermarks that their own decoder finds, and refusals at the start."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving.command.cli import main as tdm_serve
from tdm_runtime.cli import main
from tdm_runtime.edit import GivenPicture
from tdm_runtime.media.image_file import encode_image
from tdm_runtime.media.provenance import Provenance, ProvenanceConfig
from tdm_runtime.media.receipt import Claim, pixels_sha256, read_claims
from tdm_runtime.media.watermark import MESSAGE, METHOD, with_watermark
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.params import SamplingParams
from tests.stock_checkpoints import CASES, save_checkpoint
from tests.tiny_checkpoint import write_tiny_checkpoint

pytest.importorskip("c2pa", exc_type=ImportError)
pytest.importorskip("imwatermark", exc_type=ImportError)

from tests.c2pa_files import Credentials, message_in, receipt_in, write_credentials

LARGE = "256x256"


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return write_credentials(tmp_path_factory.mktemp("credentials"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoint of pictures with and without room for a watermark."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("large") / "checkpoint", ((16, 16), (256, 256)))


def read(file: Path) -> Pixels:
    return np.asarray(Image.open(file).convert("RGB"))


def command(folder: Path, output: Path, *more: str) -> list[str]:
    on_torch = ["--checkpoint", str(folder), "--backend", "torch", "--threads", "1"]
    return ["a red apple", "-o", str(output), "--seed", "7", "--steps", "2", *on_torch, *more]


def test_a_watermarked_picture_is_signed_and_made_again_from_its_file(
    folder: Path, credentials: Credentials, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("plain.png", "marked.png", "again.png", "edited.jpg")]
    both = ["--provenance", "watermark,c2pa", *credentials.arguments]
    edit = ["--size", LARGE, "--image", str(files[0]), "--strength", "1", "--previews"]
    assert main(command(folder, files[0], "--size", LARGE)) == 0
    assert main(command(folder, files[1], "--size", LARGE, *both)) == 0
    assert main(command(folder, files[2], "--size", LARGE, "--provenance", "watermark")) == 0
    assert main(command(folder, files[3], *edit, *both)) == 0
    assert np.array_equal(read(files[1]), read(files[2])) and not np.array_equal(read(files[0]), read(files[1]))
    assert (message_in(read(files[1])), message_in(read(files[0])) == MESSAGE) == (MESSAGE, False)

    (claim,) = read_claims(files[1])
    assert claim.receipt.watermark == METHOD and claim.receipt.pixels_sha256 == pixels_sha256(read(files[1]))
    capsys.readouterr()
    assert main(["--verify", str(files[1]), "--checkpoint", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("reproduced\n")
    other = tmp_path / "other.json"
    other.write_text(replace(claim.receipt, watermark=None).to_json())
    assert main(["--verify", str(other), "--checkpoint", str(folder)]) == 1

    manifest = credentials.manifest(files[1].read_bytes(), "png")
    assert receipt_in(manifest)["pixels_sha256"] == claim.receipt.pixels_sha256
    assert manifest["claim_generator_info"][0]["name"] == "tdm-serve"
    created, marked = credentials.actions(files[1].read_bytes(), "png")
    assert (created["action"], marked["action"]) == ("c2pa.created", "c2pa.watermarked.unbound")
    assert created["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert created["softwareAgent"]["name"] == "tdm-serve" and created["softwareAgent"]["version"]
    for file in (files[3], tmp_path / "edited.step1.jpg"):
        opened, edited, _ = credentials.actions(file.read_bytes(), "jpeg")
        assert (opened["action"], edited["action"]) == ("c2pa.opened", "c2pa.edited")
        assert edited["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
    assert credentials.manifest(files[3].read_bytes(), "jpeg")["ingredients"][0]["relationship"] == "parentOf"


def test_references_are_ingredients_of_a_created_picture(credentials: Credentials) -> None:
    provenance = Provenance(ProvenanceConfig(("c2pa",), credentials.cert, credentials.key))
    pixels = np.zeros((64, 64, 3), np.uint8)
    params = SamplingParams("a fox", 0, 1, 64, 64, references=(GivenPicture(pixels), GivenPicture(pixels + 1)))
    signed = provenance.signed(encode_image(pixels, "png"), "png", params)
    assert [one["relationship"] for one in credentials.manifest(signed, "png")["ingredients"]] == ["inputTo"] * 2
    (created,) = credentials.actions(signed, "png")
    assert created["action"] == "c2pa.created" and len(created["parameters"]["ingredients"]) == 2


def test_a_small_picture_gets_a_manifest_and_no_watermark(
    folder: Path, credentials: Credentials, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, signed = tmp_path / "plain.png", tmp_path / "signed.png"
    assert main(command(folder, plain, "--size", "16x16")) == 0
    both = ["--provenance", "c2pa,watermark", *credentials.arguments]
    assert main(command(folder, signed, "--size", "16x16", *both)) == 0
    assert "such as 16x16, have no watermark" in capsys.readouterr().err
    assert np.array_equal(read(plain), read(signed))
    assert read_claims(signed)[0].receipt == read_claims(plain)[0].receipt
    (created,) = credentials.actions(signed.read_bytes(), "png")
    assert created["action"] == "c2pa.created"


def test_a_signed_clip_is_made_again_from_its_file(
    credentials: Credentials, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(CASES["AnimateDiff-Lightning"], tmp_path / "clips")
    for file_format in ("mp4", "gif", "webm"):
        clip = tmp_path / f"clip.{file_format}"
        more = ["--frames", "2", "--provenance", "c2pa", *credentials.arguments]
        assert main(command(folder, clip, *more)) == 0
        if file_format == "webm":
            assert "webm files have no C2PA manifest; png, webp, jpeg, gif, mp4 have one" in capsys.readouterr().err
        else:
            assert credentials.actions(clip.read_bytes(), file_format)[0]["action"] == "c2pa.created"
        if file_format != "gif":
            assert main(["--verify", str(clip), "--checkpoint", str(folder)]) == 0


def test_a_changed_pixel_breaks_the_manifest(folder: Path, credentials: Credentials, tmp_path: Path) -> None:
    file = tmp_path / "apple.png"
    assert main(command(folder, file, "--size", "16x16", "--provenance", "c2pa", *credentials.arguments)) == 0
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 1
    with pytest.raises(AssertionError, match=r"assertion\.dataHash\.mismatch"):
        credentials.manifest(bytes(content), "png")


def test_a_watermark_is_a_function_of_the_pixels_of_each_frame() -> None:
    levels = np.random.default_rng(0).integers(64, 192, (2, 16, 16, 3), dtype=np.uint8)
    frames = levels.repeat(16, axis=1).repeat(17, axis=2)
    marked = with_watermark(frames)
    assert np.array_equal(marked, np.stack([with_watermark(frame) for frame in frames]))
    assert [message_in(frame) for frame in marked] == [MESSAGE] * 2
    assert (marked.shape, marked.dtype) == (frames.shape, frames.dtype)


def test_a_loose_receipt_with_a_watermark_promises_no_comparison(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "apple.png"
    assert main(command(folder, file, "--size", LARGE, "--provenance", "watermark")) == 0
    (claim,) = read_claims(file)
    loose = Claim(replace(claim.receipt, is_strict=False), claim.pixels)
    assert "a watermark makes small differences large" in str(loose.check(np.zeros((256, 256, 3), np.uint8)))


def test_what_cannot_sign_is_refused_at_the_start(
    credentials: Credentials, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        try:
            status = tdm_serve(["--checkpoint", str(folder), "--backend", "torch", *arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        message = capsys.readouterr().err
        assert status == 2 and "Traceback" not in message
        return message

    def signing(cert: Path, key: Path) -> list[str]:
        return ["--provenance", "c2pa", "--c2pa-cert", str(cert), "--c2pa-key", str(key)]

    cert, key = credentials.cert, credentials.key
    missing, text = tmp_path / "missing.pem", tmp_path / "text.pem"
    text.write_text("no PEM")
    other = tmp_path / "other"
    other.mkdir()
    assert "'stamp' is not one or both of c2pa, watermark" in refused("--provenance", "stamp")
    assert "give --c2pa-cert and --c2pa-key" in refused("--provenance", "c2pa")
    assert "are about --provenance c2pa, which is missing" in refused("--c2pa-cert", str(cert))
    assert "missing.pem cannot be read: No such file" in refused(*signing(missing, key))
    assert "text.pem holds no certificates in PEM" in refused(*signing(text, key))
    assert "text.pem holds no private key in PEM" in refused(*signing(cert, text))
    assert "is not the key of the first certificate" in refused(*signing(cert, write_credentials(other).key))
    only_signer = tmp_path / "alone.pem"
    only_signer.write_text(credentials.root)
    assert "is not the key of the first certificate" in refused(*signing(only_signer, key))


@pytest.mark.parametrize(("kind", "module"), [("c2pa", "c2pa"), ("watermark", "imwatermark")])
def test_a_missing_package_is_named_at_the_start(
    kind: str,
    module: str,
    folder: Path,
    credentials: Credentials,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    files = credentials.arguments if kind == "c2pa" else []
    assert tdm_serve(["--checkpoint", str(folder), "--backend", "torch", "--provenance", kind, *files]) == 2
    assert "pip install 'tdm-serve[provenance]'" in capsys.readouterr().err
