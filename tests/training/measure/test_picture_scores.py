"""`tdm-train measure` with small weights in the published layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from tdm_runtime.checkpoint.folder import CLIP_CHECKPOINT
from tests.training.measure.test_scorers import TinyInception, tiny_config, to_open_clip
from training.cli import main
from training.measure import scorers
from training.measure.samples import read_picture
from training.measure.scorers import AestheticHead, CLIPScore

PROMPTS = ["a red heart", "a cat", "a cat"]


@pytest.fixture(scope="module")
def weights(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every scorer's weights under their published names."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint_folder / "tokenizer")
    clip = CLIPModel(tiny_config(tokenizer, projection=768))
    clip.save_pretrained(folder / "clip-vit-large-patch14")
    tokenizer.save_pretrained(folder / "clip-vit-large-patch14")
    torch.save({"state_dict": to_open_clip(clip.state_dict())}, folder / "HPS_v2.1_compressed.pt")
    torch.save(AestheticHead().state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    torch.jit.script(TinyInception(2048)).save(str(folder / "inception-2015-12-05.pt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorers, "vit_h_14", lambda: tiny_config(tokenizer, projection=768))
        yield folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return file


def test_a_checkpoint_and_its_pictures_get_the_same_scores(
    weights: Path, prompts: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--prompts", str(prompts), "--weights", str(weights), "--device", "cpu"]
    out, again = tmp_path / "out", tmp_path / "again"
    (tmp_path / "reference").mkdir()
    for shade in (0, 64):
        Image.new("RGB", (32, 32), (shade, shade, shade)).save(tmp_path / "reference" / f"{shade}.png")
    reference = ["--reference", str(tmp_path / "reference")]
    assert main(["measure", "--checkpoint", str(tiny_checkpoint), "--output", str(out), *common, *reference]) == 0
    printed = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in printed.splitlines()[2:6]] == [
        "| CLIP score", "| aesthetic score", "| HPS v2.1", "| FID"
    ]  # fmt: skip
    assert "3 and 2" in printed and "Not measured" not in printed
    found = json.loads((out / "scores.json").read_text())
    files = [Path(row["file"]) for row in found["pictures"]]
    assert files[1].read_bytes() != files[2].read_bytes(), "a prompt that comes twice has two seeds"
    pictures = [read_picture(file) for file in files]
    expected = CLIPScore.open(weights / "clip-vit-large-patch14").scores(pictures, PROMPTS)
    assert [row["CLIP score"] for row in found["pictures"]] == pytest.approx(expected)
    assert found["scores"]["CLIP score"] == {
        "value": pytest.approx(expected.mean()),
        "standard_error": pytest.approx(expected.std(ddof=1) / 3**0.5),
        "pictures": 3,
    }
    means = [[picture.mean() / 128 - 1] * 2048 for picture in pictures], [[-1.0] * 2048, [-0.5] * 2048]
    # The stand-in's features are all equal, so both covariances have one direction: the distance is that of numbers.
    (m1, s1), (m2, s2) = ((np.mean(x, 0), np.std(x, 0, ddof=1)) for x in means)
    assert found["scores"]["FID"]["value"] == pytest.approx(((m1 - m2) ** 2 + (s1 - s2) ** 2).sum(), rel=0.02)
    assert main(["measure", "--pictures", str(out / "pictures"), "--output", str(again), *common]) == 0
    second = json.loads((again / "scores.json").read_text())
    assert second["scores"] == {name: score for name, score in found["scores"].items() if name != "FID"}
    assert "FID: it is a distance to other pictures; name their folder with --reference" in capsys.readouterr().out


def test_missing_weights_are_named_with_source_and_place(
    weights: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "weights", tmp_path / "out"
    folder.mkdir()
    command = ["measure", "--checkpoint", str(CLIP_CHECKPOINT), "--prompts", str(prompts)]
    command += ["--weights", str(folder), "--output", str(out)]
    assert main(command) == 2
    message = capsys.readouterr().err
    for scorer, name, source in (
        (
            "CLIP score",
            "clip-vit-large-patch14 lacks config.json, model.safetensors",
            "huggingface.co/openai/clip-vit-l",
        ),
        (
            "aesthetic score",
            "sac+logos+ava1-l14-linearMSE.pth is missing",
            "github.com/christophschuhmann/improved-aes",
        ),
        ("HPS v2.1", "HPS_v2.1_compressed.pt is missing", "huggingface.co/xswu/HPSv2"),
        ("FID", "pt_inception-2015-12-05-6726825d.pth is missing", "github.com/mseitzer/pytorch-fid"),
    ):
        (line,) = (line for line in message.splitlines() if line.startswith(f"{scorer}: {folder}/{name}"))
        assert f"https://{source}" in line
    assert not out.exists()
    (folder / "clip-vit-large-patch14").symlink_to(weights / "clip-vit-large-patch14")
    assert main(command) == 2
    assert "makes clips; score them with `tdm-train vbench`" in capsys.readouterr().err
    for number in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.png")
    assert main(["measure", "--pictures", str(tmp_path), *command[3:], "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Not measured: ") == 3
    assert list(json.loads((out / "scores.json").read_text())["scores"]) == ["CLIP score"]
    (tmp_path / "2.png").write_bytes(b"nothing")
    assert main(["measure", "--pictures", str(tmp_path), *command[3:], "--device", "cpu"]) == 2
    assert "2.png cannot be read as a picture" in capsys.readouterr().err
    (tmp_path / "2.png").unlink()
    assert main(["measure", "--pictures", str(tmp_path), *command[3:]]) == 2
    assert "has 2 files (.png, .jpg, .jpeg, .webp) for 3 prompts" in capsys.readouterr().err
