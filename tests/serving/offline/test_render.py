"""What `tdm-render` makes of its input, in every form of input and output."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from serving.offline.cli import main
from serving.offline.names import DEFAULT_TEMPLATE, NameTemplate, safe
from tdm_runtime.edit import Edit
from tdm_runtime.model.choice import load_model
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.serving.offline.conftest import ALONE, Render, hashes, manifest, mixed_lines, write_lines


def test_pictures_are_those_of_generate(render: Render, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Batch lines and flat lines: file, hash, seed and receipt of each agree with the library's picture."""
    flat = {"prompt": "a cat", "seed": 3, "size": "24x16", "num_inference_steps": 2, "n": 2}
    body = {"prompt": "a dog", "num_inference_steps": 4}
    lines = [flat, {"custom_id": "dog", "method": "POST", "url": "/v1/images/generations", "body": body}]
    out = tmp_path / "out"
    assert render(write_lines(tmp_path / "in.jsonl", lines), "-o", out) == 0
    records = manifest(out)
    assert [(record["id"], record.get("index"), record["file"]) for record in records] == [
        ("1", None, "00000001-0.png"),
        ("1", 1, "00000001-1.png"),
        ("dog", None, "00000002.png"),
    ]
    assert [record["seed"] for record in records[:2]] == [3, 4]
    model = load_model(tiny_checkpoint, device="cpu")
    for record in records:
        content = (out / record["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (record["bytes"], record["sha256"])
        receipt = record["receipt"]
        params = SamplingParams(
            receipt["prompt"], record["seed"], record["num_inference_steps"], receipt["width"], receipt["height"]
        )
        picture = np.asarray(Image.open(io.BytesIO(content)))
        assert np.array_equal(picture, generate(model, params))
        assert receipt["pixels_sha256"] == hashlib.sha256(picture.tobytes()).hexdigest()
    times = [json.loads(line) for line in (out / "times.jsonl").read_bytes().splitlines()]
    assert [one["id"] for one in times] == ["1", "1", "dog"] and all(one["total_ms"] > 0 for one in times)
    assert not (out / ".tdm-render").exists()


def test_edits_are_those_of_generate(render: Render, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Lines name pictures from the folder of their file; a batch line holds them. A changed picture is edited anew."""
    (tmp_path / "given").mkdir()
    levels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    changes = np.zeros((16, 16), np.uint8)
    changes[:, 8:] = 255
    Image.fromarray(levels).save(tmp_path / "given" / "cat.png")
    Image.fromarray(changes).save(tmp_path / "given" / "mask.png")
    flat = {"prompt": "a dog", "seed": 3, "num_inference_steps": 4, "image": "cat.png"}
    url = "/v1/images/edits"
    body = flat | {"image": base64.b64encode((tmp_path / "given" / "cat.png").read_bytes()).decode()}
    lines = [
        flat | {"strength": 0.5},
        flat | {"mask": "mask.png", "n": 2},
        {"custom_id": "batch", "method": "POST", "url": url, "body": body},
        {"prompt": "a dog", "seed": 3, "num_inference_steps": 4},
    ]
    source, out = write_lines(tmp_path / "given" / "in.jsonl", lines), tmp_path / "out"
    options = [source, "-o", out, "--set", "strength=0.75"]
    assert render(*options) == 0
    model = load_model(tiny_checkpoint, device="cpu")
    records, masked = manifest(out), Edit(levels, 0.75, changes)
    edits = [Edit(levels, 0.5), masked, masked, Edit(levels, 0.75), None]
    for record, edit in zip(records, edits, strict=True):
        params = SamplingParams("a dog", record["seed"], 4, 16, 16, edit=edit)
        assert np.array_equal(np.asarray(Image.open(out / record["file"])), generate(model, params))
    (source.parent / "in.csv").write_text("prompt,image,mask,seed,num_inference_steps\na dog,cat.png,mask.png,3,4\n")
    assert render(source.parent / "in.csv", "-o", tmp_path / "csv", "--set", "strength=0.75") == 0
    assert manifest(tmp_path / "csv")[0]["key"] == records[1]["key"]
    Image.fromarray(255 - levels).save(tmp_path / "given" / "cat.png")
    assert render(*options) == 0
    assert [new["key"] == old["key"] for new, old in zip(manifest(out), records, strict=True)] == [False] * 3 + [
        True
    ] * 2


def test_a_line_whose_picture_cannot_be_read_fails_alone(render: Render, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    named = ["missing.png", "text.png", "https://example.org/a.png", ""]
    lines = [{"prompt": "a dog", "image": image} for image in named] + [{"prompt": "a dog"}]
    out = tmp_path / "out"
    assert render(write_lines(tmp_path / "in.jsonl", lines), "-o", out) == 1
    *failed, made = manifest(out)
    assert made["status"] == "completed" and {record["error"]["param"] for record in failed} == {"image"}
    messages = [record["error"]["message"] for record in failed]
    assert "'missing.png' cannot be read: No such file" in messages[0] and "is no file of PNG" in messages[1]
    assert all("give the path of a picture" in message for message in messages[2:])


def test_every_form_of_input_gives_the_same_pictures(render: Render, tmp_path: Path) -> None:
    rows = [{"prompt": 'a "red", big heart', "seed": 7}, {"prompt": "ein Fuß\u200d ❤", "seed": 8}]
    write_lines(tmp_path / "a.jsonl", rows)
    with (tmp_path / "b.csv").open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "seed", "guidance_scale"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("".join(f"{row['prompt']}\r\n\r\n" for row in rows), encoding="utf-8")
    pixels = []
    for name in ("a.jsonl", "b.csv", "c.parquet", "d.txt"):
        out = tmp_path / f"out-{name}"
        more = ["--sweep", "seed=7,8"] if name == "d.txt" else []
        assert render(tmp_path / name, "-o", out, *more) == 0
        pixels.append([record["receipt"]["pixels_sha256"] for record in manifest(out)])
    text = pixels.pop()
    assert pixels[0] == pixels[1] == pixels[2] == [text[0], text[3]]
    assert render(tmp_path / "[ac].*", "-o", tmp_path / "both") == 0
    assert [record["file"] for record in manifest(tmp_path / "both")] == [
        "a-00000001.png",
        "a-00000002.png",
        "c-00000001.png",
        "c-00000002.png",
    ]


def test_shards_hold_the_pictures_of_files(render: Render, tmp_path: Path) -> None:
    """WebDataset and Parquet: same bytes of each picture, beside its record, in the order of the input."""
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(7))
    runs = {kind: tmp_path / kind for kind in ("files", "webdataset", "parquet")}
    for kind, out in runs.items():
        assert render(source, "-o", out, "--format", kind, "--shard-size", 3, "--grid") == 0
    files = {record["id"]: (runs["files"] / record["file"]).read_bytes() for record in manifest(runs["files"])}
    members, table = dict[str, bytes](), []
    for record in manifest(runs["webdataset"]):
        with tarfile.open(runs["webdataset"] / record["file"]) as shard:
            assert [name.rpartition(".")[2] for name in shard.getnames()[:3]] == ["png", "txt", "json"]
            content = shard.extractfile(record["member"])
            assert content is not None
            members[record["id"]] = content.read()
        assert record["file_sha256"] == hashlib.sha256((runs["webdataset"] / record["file"]).read_bytes()).hexdigest()
    for shard_file in sorted(runs["parquet"].glob("*.parquet")):
        table += pyarrow.parquet.read_table(shard_file).to_pylist()
    assert [row["id"] for row in table] == list(files)
    assert {row["id"]: row["image"]["bytes"] for row in table} == members == files
    assert len({(out / "grid.png").read_bytes() for out in runs.values()}) == 1


def test_urls_are_read_and_written_through_fsspec(render: Render, tmp_path: Path) -> None:
    """A place where files neither grow nor are renamed, as an object store: same output, also the second time."""
    store = fsspec.filesystem("memory")
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(5))
    store.pipe("/in/a.jsonl", source.read_bytes())
    for kind in ("files", "webdataset"):
        options = ["--format", kind, "--shard-size", 2]
        assert render(source, "-o", tmp_path / kind, *options) == 0
        for _ in range(2):
            assert render("memory://in/*.jsonl", "-o", f"memory://{kind}", *options) == 0
            stored = {name.removeprefix(f"/{kind}/"): store.cat(name) for name in store.find(f"/{kind}")}
            del stored["times.jsonl"]
            assert {name: hashlib.sha256(content).hexdigest() for name, content in stored.items()} == hashes(
                tmp_path / kind
            )


def test_standard_input_and_defaults(render: Render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a cat\n\na fox")))
    settings = ["--set", "output_format=webp", "--set", "num_inference_steps=2", "--set", "size=24x16"]
    assert render("-", "-o", tmp_path, *settings, "--name", "{prompt}-{steps}-{width}x{height}") == 0
    assert [record["file"] for record in manifest(tmp_path)] == ["a_cat-2-24x16.webp", "a_fox-2-24x16.webp"]
    assert Image.open(tmp_path / "a_fox-2-24x16.webp").size == (24, 16)


def test_lines_name_their_models(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A line without a model gets the first."""
    lines = [{"prompt": "a cat", "seed": 1}, {"prompt": "a cat", "seed": 1, "model": "second"}]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out"
    models = [part for name in ("first", "second") for part in ("--model", f"{name}={tiny_checkpoint}")]
    assert main([str(source), "-o", str(out), *models, *ALONE, "--name", "{model}/{line}"]) == 0
    first, second = manifest(out)
    assert (first["file"], second["file"]) == ("first/1.png", "second/2.png")
    assert (first["receipt"]["model"], second["receipt"]["model"]) == ("first", "second")
    assert first["receipt"]["pixels_sha256"] == second["receipt"]["pixels_sha256"] and first["key"] != second["key"]


def test_a_sweep_makes_a_matrix_with_one_seed_a_line(render: Render, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a cat\na fox\n")
    out = tmp_path / "out"
    sweeps = ["--sweep", "num_inference_steps=1,4", "--sweep", "size=16x16,24x16", "--grid"]
    assert render(tmp_path / "in.txt", "-o", out, *sweeps, "--name", "{prompt}/{sweep}") == 0
    records = manifest(out)
    assert [record["sweep"] for record in records[:4]] == [
        {"num_inference_steps": steps, "size": size} for steps in (1, 4) for size in ("16x16", "24x16")
    ]
    assert records[0]["file"] == "a_cat/num_inference_steps=1-size=16x16.png"
    assert [len({one["seed"] for one in records[part]}) for part in (slice(4), slice(8))] == [1, 2]
    assert Image.open(out / "grid.png").height > 2 * 64


def test_a_line_without_a_seed_keeps_it_wherever_it_is(render: Render, tmp_path: Path) -> None:
    lines = mixed_lines(3)
    write_lines(tmp_path / "a.jsonl", lines)
    write_lines(tmp_path / "b.jsonl", lines[::-1])
    seeds = []
    for name in ("a", "b"):
        assert render(tmp_path / f"{name}.jsonl", "-o", tmp_path / name) == 0
        seeds.append({record["id"]: record["seed"] for record in manifest(tmp_path / name)})
    assert seeds[0] == seeds[1] and len(set(seeds[0].values())) == 3


def test_a_dry_run_estimates_and_writes_nothing(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [*mixed_lines(5), {"prompt": ""}])
    assert render(source, "-o", tmp_path / "out", "--dry-run") == 1
    assert capsys.readouterr().out.startswith("5 pictures to make, 1 cannot be made; about ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--name", "../{id}"], "not inside the output folder"),
        (["--name", "/tmp/{id}"], "not inside the output folder"),
        (["--name", "{id.__class__}"], "known are"),
        (["--name", "a/.{id}"], "not inside the output folder"),
        (["--shard-size", "0"], "at least 1"),
        (["--ray", "local", "-"], "standard input"),
    ],
)
def test_a_run_that_cannot_be_made_is_refused(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    source = [] if "-" in arguments else [write_lines(tmp_path / "in.jsonl", mixed_lines(1))]
    assert render(*source, "-o", tmp_path / "out", *arguments) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("value", ["../../etc/passwd", "/abs", ".hidden", "a\0b", "x" * 5000, "\ud800", "", "Ünï ❤"])
def test_no_value_leaves_the_folder(value: str) -> None:
    assert not set("./\\\0:") & set(safe(value))
    numbers = dict.fromkeys(("line", "index", "seed", "steps", "width", "height", "frames"), 1)
    texts = dict.fromkeys(("id", "source", "variant", "model", "prompt", "sweep"), value)
    assert NameTemplate("{model}x/{id}x").path(numbers, texts).count("/") == 1
    assert NameTemplate(DEFAULT_TEMPLATE).path(numbers, texts).startswith("00000001")
