"""Bad lines are reported with their number, end no run, and write nothing outside the output folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.offline.lines import MAX_LINE_BYTES
from tests.serving.offline.conftest import Render, manifest

GOOD = b'{"prompt": "a cat", "num_inference_steps": 1}'
BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"prompt": "' + b"x" * 10_000_000 + b'"}', f"longer than {MAX_LINE_BYTES} bytes"),
    (b'{"prompt": "' + b"x" * 3000 + b'"}', "prompt has 3000 characters"),
    (b'{"prompt": "\xff\xfe"}', "not UTF-8"),
    (b'{"prompt": "a\\u0000b"}', "NUL"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"prompt": "a", "guidance_scale": NaN}', "NaN is not JSON"),
    (b'{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale"),
    (b'{"prompt": "a", "steps": 4}', "'steps' is not a parameter"),
    (b'{"prompt": "a", "seed": 4294967296}', "seed is 4294967296"),
    (b'{"prompt": "a", "seed": "7"}', "seed is '7'"),
    (b'{"prompt": "a", "size": "65536x65536"}', "size"),
    (b'{"prompt": "a", "n": 1000000000}', "n is 1000000000"),
    (b'{"prompt": "a", "stream": true}', "stream has no use"),
    (b'{"prompt": "a", "latency_budget_ms": 40}', "latency_budget_ms has no use"),
    (b'{"prompt": "a", "model": "../x"}', "does not exist"),
    (b'{"prompt": "a", "prompt": "b"}', "appears twice"),
    (b'{"prompt": "a", "id": true}', "id is true"),
    (b'{"prompt": "a", "id": "' + b"x" * 65 + b'"}', "id is"),
    (b'{"id": "once", "prompt": "a", "num_inference_steps": 1}', ""),
    (b'{"id": "once", "prompt": "b"}', "the id 'once' appears twice"),
    (b'{"id": "ONCE", "prompt": "b", "num_inference_steps": 1}', "the name 'ONCE' is taken"),
    (b'{"id": "../../escaped", "prompt": "a", "num_inference_steps": 1}', ""),
    (b'{"id": "/etc/passwd\\u0000", "prompt": "a", "num_inference_steps": 1}', ""),
    (b'{"custom_id": "c", "url": "/v1/embeddings", "body": {"prompt": "a"}}', "url"),
    (b"[" * 100_000, "longer than"),
    (b"[" * 10_000, "nests deeper"),
    (b"[]", "send an object"),
    (b"{broken", "not JSON"),
    (b"\x00", "not JSON"),
]


def test_hostile_lines_are_reported_and_the_others_made(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "deep" / "in.jsonl", tmp_path / "deep" / "er" / "out"
    source.parent.mkdir()
    lines = [line for bad, _ in BAD_LINES for line in (bad, GOOD)]
    source.write_bytes(b"\n".join(lines))
    assert render(source, "-o", out, "--name", "{id}", "--shard-size", 7) == 1
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    reported = {event["message"].partition(":")[0] for event in events if event["event"] == "failed"}
    records = manifest(out)
    assert len(records) == len(lines)
    for number, (record, (_, says)) in enumerate(zip(records[::2], BAD_LINES, strict=True)):
        assert record["line"] == 2 * number + 1
        if says:
            assert record["status"] == "failed" and says in record["error"]["message"], (says, record)
            assert len(record["error"]["message"]) < 1000
            assert f"line {record['line']}" in reported
        else:
            assert record["status"] == "completed"
    assert {record["status"] for record in records[1::2]} == {"completed"}
    written = {file.relative_to(tmp_path).parts[:3] for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {("deep", "in.jsonl"), *((("deep", "er", "out")),)}
    assert {file.parent for file in out.rglob("*")} == {out}


@pytest.mark.parametrize(
    ("name", "content", "failures"),
    [
        ("in.txt", b"a cat\n\xff\n" + b"x" * 200_000 + b"\nb\0c\na fox", {2: "not UTF-8", 3: "longer", 4: "NUL"}),
        (
            "in.csv",
            b'prompt,seed\na cat,1\n\xff,2\na,b,c\n"two\nlines",x\n' + b"y" * 200_000 + b'\na fox,5\n"open,6\n',
            {3: "not UTF-8", 4: "3 cells", 5: "seed is 'x'", 7: "longer"},
        ),
    ],
)
def test_text_and_csv_report_theirs(
    render: Render, tmp_path: Path, name: str, content: bytes, failures: dict[int, str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert render(tmp_path / name, "-o", tmp_path / "out") == 1
    failed = {record["line"]: record for record in manifest(tmp_path / "out") if record["status"] == "failed"}
    assert failed.keys() == failures.keys()
    for line, says in failures.items():
        assert says in failed[line]["error"]["message"]


def test_a_link_out_of_the_folder_is_not_followed(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "sub").symlink_to(elsewhere)
    kept = elsewhere / "kept"
    kept.write_text("mine")
    (out / "x-1.png").symlink_to(kept)
    (tmp_path / "in.txt").write_text("a cat\n")
    assert render(tmp_path / "in.txt", "-o", out, "--name", "sub/{id}") == 2
    assert "symbolic link" in capsys.readouterr().err
    assert render(tmp_path / "in.txt", "-o", out, "--name", "x-{id}") == 0
    assert kept.read_text() == "mine" and list(elsewhere.iterdir()) == [kept]
    assert (out / "x-1.png").is_file() and not (out / "x-1.png").is_symlink()
