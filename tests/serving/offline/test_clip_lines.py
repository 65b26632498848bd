"""Clips of `tdm-render`: in every format, beside pictures; a killed run continues to the same bytes."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from benchmarks.render import finished_keys
from tdm_runtime.media.receipt import pixels_sha256, read_claims
from tdm_runtime.media.video_file import read_frames
from tdm_runtime.model.choice import load_model
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.serving.offline.conftest import Render, hashes, manifest, start, write_lines
from tests.serving.offline.test_resume import kill_after
from tests.stock_checkpoints import CASES, save_checkpoint

IMAGES, VIDEOS = "/v1/images/generations", "/v1/videos/generations"
CLIP = {"prompt": "a red fox", "model": "clips", "num_inference_steps": 2, "num_frames": 3}
FORMATS = ("mp4", "webm", "webp", "gif")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(CASES["AnimateDiff-Lightning"], tmp_path_factory.mktemp("clips"))


@pytest.fixture
def models(tiny_checkpoint: Path, clip_folder: Path) -> list[str]:
    """Arguments: one model makes pictures, two make clips."""
    folders = {"pictures": tiny_checkpoint, "clips": clip_folder, "others": clip_folder}
    return [part for name, folder in folders.items() for part in ("--model", f"{name}={folder}")]


def clip_lines(number: int) -> list[dict[str, Any]]:
    """Return requests of clips, with a picture after every fourth."""
    lines = [CLIP | {"id": f"c{n}", "seed": n, "output_format": FORMATS[n % 4]} for n in range(number)]
    return [{"id": f"p{n}", "prompt": "a cat"} if n % 5 == 4 else line for n, line in enumerate(lines)]


def test_one_file_has_clips_and_pictures_of_several_models(
    render: Render, models: list[str], clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        *(CLIP | {"id": name, "seed": 7, "output_format": name} for name in FORMATS),
        {"id": "picture", "prompt": "a cat"},
        {"custom_id": "other", "url": VIDEOS, "body": {"prompt": "a dog", "model": "others", "fps": 4}},
        {"custom_id": "no picture", "url": IMAGES, "body": {"prompt": "a dog", "model": "clips"}},
        {"custom_id": "no clip", "url": VIDEOS, "body": {"prompt": "a dog"}},
        {"id": "no frames", "prompt": "a cat", "num_frames": 3},
    ]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out"
    options = [*models, "--grid", "--set", "size=64x48", "--set", "num_frames=2", "--name", "{model}/{id}-{frames}"]
    lines[4] |= {"size": "16x16"}
    write_lines(source, lines)
    assert render(source, "-o", out, *options) == 1
    assert "6 pictures and clips made, 0 kept, 3 failed" in capsys.readouterr().out
    records = {record["id"]: record for record in manifest(out)}
    assert [records[name]["file"] for name in ("webm", "picture", "other")] == [
        "clips/webm-3.webm",
        "pictures/picture-1.png",
        "others/other-2.mp4",
    ]
    for name, says in (
        ("no picture", "makes clips; send the request to /v1/videos/generations"),
        ("no clip", "makes pictures; /v1/videos makes a walk"),
        ("no frames", "'num_frames' is not a parameter"),
    ):
        assert says in records[name]["error"]["message"]
    wanted = generate(load_model(clip_folder, device="cpu"), SamplingParams("a red fox", 7, 2, 64, 48, frames=3))
    assert {records[name]["receipt"]["pixels_sha256"] for name in FORMATS} == {pixels_sha256(wanted)}
    files = {name: (out / records[name]["file"]).read_bytes() for name in FORMATS}
    assert {len(list(read_frames(content))) for content in files.values()} == {3}
    np.testing.assert_array_equal(np.stack(list(read_frames(files["webp"]))), wanted)
    (claim,) = read_claims(out / "clips/webm-3.webm")
    assert claim.receipt.to_json() == json.dumps(records["webm"]["receipt"], separators=(",", ":"))
    sheet = np.asarray(Image.open(out / "grid.png"))
    assert (sheet[6 : 6 + 48, 6 + 2 * (64 + 6) :][:, :64] == wanted[0]).all(), "the place of the WebP"
    before = hashes(out)
    (out / "clips/mp4-3.mp4").unlink()
    capsys.readouterr()
    assert render(source, "-o", out, *options) == 1
    assert "1 pictures and clips made, 5 kept, 3 failed" in capsys.readouterr().out
    assert hashes(out) == before


def test_parquet_keeps_clips_and_pictures_in_columns_of_their_own(
    render: Render, models: list[str], tmp_path: Path
) -> None:
    """In one file, and found again for the contact sheet."""
    source = write_lines(tmp_path / "in.jsonl", clip_lines(5))
    options = [*models, "--grid", "--shard-size", 3]
    for kind in ("files", "parquet"):
        assert render(source, "-o", tmp_path / kind, "--format", kind, *options) == 0
    tables = [pyarrow.parquet.read_table(file) for file in sorted((tmp_path / "parquet").glob("*.parquet"))]
    rows = pyarrow.concat_tables(tables).to_pylist()
    assert [(row["image"] is None, row["video"] is None) for row in rows] == [(True, False)] * 4 + [(False, True)]
    for row, record in zip(rows, manifest(tmp_path / "files"), strict=True):
        assert (row["image"] or row["video"])["bytes"] == (tmp_path / "files" / record["file"]).read_bytes()
    sheets = {(tmp_path / kind / "grid.png").read_bytes() for kind in ("files", "parquet")}
    assert len(sheets) == 1


def test_a_default_that_no_model_reads_is_refused(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a cat"}])
    assert render(source, "-o", tmp_path / "out", "--set", "num_frames=3") == 2
    assert "--set num_frames has no use: tdm-emoji read" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "on Ray"])
def test_stopped_runs_and_runs_on_ray_have_the_bytes_of_a_whole_one(
    render: Render, models: list[str], tiny_checkpoint: Path, tmp_path: Path, how: str
) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", clip_lines(40)), tmp_path / "out"
    options = [*models, "--format", "webdataset", "--shard-size", "8", "--grid"]
    assert render(source, "-o", tmp_path / "whole", *options) == 0
    if how == "killed":
        kill_after(out, tiny_checkpoint, 7, source, "-o", out, *options)
        recorded = len(finished_keys(out))
        assert recorded >= 7
        assert render(source, "-o", out, *options) == 0
    else:
        running = start(tiny_checkpoint, source, "-o", out, *options, "--ray", "local", "--workers", 2)
        output, errors = running.communicate(timeout=400)
        assert running.returncode == 0, errors[-3000:]
        assert re.search(rb"40 pictures and clips made", output)
    assert hashes(out) == hashes(tmp_path / "whole")
    with tarfile.open(out / "000000.tar") as shard:
        names = [name for name in shard.getnames() if not name.endswith((".txt", ".json"))]
        content = shard.extractfile(names[1])
        assert content is not None and names[1].endswith(".webm")
        assert len(list(read_frames(content.read()))) == 3
