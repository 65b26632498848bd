"""Prompt files, embeddings and latents on disk: training reads by number what was written."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from tests.training.tiny_runs import NOISE
from training.pretrained import prompts as prompts_module
from training.pretrained.base_model import encode_prompts, load_base_model
from training.pretrained.latents import encode_latents, read_pixels
from training.pretrained.prompts import (
    EmbeddedPrompts,
    EmbeddingIndex,
    PromptError,
    embed_prompts,
    read_index,
    read_prompt_file,
)

TEXTS = ["a red fox", "two cats", "rain", "a green hill at night", "a b c"]


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text, "image": f"{text}.png"}) + "\n" for text in TEXTS))
    return file


def embed(base: Path, prompt_file: Path, folder: Path, **changes: Any) -> EmbeddingIndex:
    settings: dict[str, Any] = {"stored_type": "fp32", "shard_size": 2, "batch_size": 2, "device": "cpu"}
    return embed_prompts(base, prompt_file, folder, 64, 48, **settings | changes)


# ---- prompt files --------------------------------------------------------------------------------


def test_a_prompt_file_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes('{"prompt": "a\u2028b", "other": 1}\r\n{"prompt": "\\u00e9", "image": "x.png"}'.encode())
    rows = read_prompt_file(file)
    assert [(row.prompt, row.image) for row in rows] == [("a\u2028b", None), ("é", "x.png")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is empty; give a line"),
        ('{"prompt": "a"}\n\n{"prompt": "b"}\n', r"line 2 is not JSON .*: ''; write .* or remove the line"),
        ('{"prompt": "a"}\n{"prompt": ', r"line 2 is not JSON"),
        ('{"prompt": ""}', r"line 1 has no prompt: '\{\"prompt\": \"\"\}'; write"),
        ('{"prompt": "  "}', "line 1 has no prompt"),
        ('{"text": "a"}', "line 1 has no prompt"),
        ('"a"', "line 1 has no prompt"),
        ('{"prompt": 4}', "line 1 has no prompt"),
        ('{"prompt": "a", "image": 4}', "line 1: image is 4; it must be a path"),
        ('{"prompt": "\\ud800"}', "line 1 is no text: surrogates not allowed at character 0; correct the prompt"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(PromptError, match=message) as caught:
        read_prompt_file(file)
    assert str(file) in str(caught.value)
    with pytest.raises(PromptError, match=r"absent cannot be read \(No such file or directory\); give a file of lines"):
        read_prompt_file(tmp_path / "absent")


# ---- embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NOISE)
def test_embeddings_on_disk_equal_the_pipelines(
    folders: Callable[[str], Path], prompt_file: Path, tmp_path: Path, family: str
) -> None:
    index = embed(folders(family), prompt_file, tmp_path / "e")
    assert (index.family, index.width, index.height, index.count) == (family, 64, 48, 5)
    source = EmbeddedPrompts(tmp_path / "e", seed=3)
    source.require(load_base_model(folders(family)), 64, 48)
    numbers = range(4, 8)
    texts = [TEXTS[row] for row in source.rows(numbers)]
    assert source.latents(numbers) is None
    for found, asked in ((source.conditioning(numbers), texts), (source.empty(), [""])):
        (expected,) = encode_prompts(folders(family), asked, batch_size=8, width=64, height=48)
        for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_half_precision_is_half_as_large_and_keeps_sizes_exact(
    folders: Callable[[str], Path], prompt_file: Path, tmp_path: Path
) -> None:
    whole, half = (
        embed(folders("sdxl"), prompt_file, tmp_path / kind, stored_type=kind) and EmbeddedPrompts(tmp_path / kind, 0)
        for kind in ("fp32", "bf16")
    )
    found, expected = half.conditioning(range(5)), whole.conditioning(range(5))
    torch.testing.assert_close(found.prompt_embeds, expected.prompt_embeds, rtol=8e-3, atol=1e-3)
    assert found.time_ids is not None and expected.time_ids is not None
    assert torch.equal(found.time_ids, expected.time_ids) and found.prompt_embeds.dtype == torch.float32


def test_a_value_out_of_the_range_of_half_precision_is_named() -> None:
    with pytest.raises(PromptError, match="prompt_embeds reaches 70000, which fp16 cannot hold; store bf16 or fp32"):
        prompts_module.to_stored("prompt_embeds", torch.tensor([70000.0]), "fp16")


def test_a_killed_embedding_continues_with_the_missing_shards(
    folders: Callable[[str], Path], prompt_file: Path, tmp_path: Path
) -> None:
    base, folder = folders("stable_diffusion"), tmp_path / "e"
    embed(base, prompt_file, folder)
    expected = EmbeddedPrompts(folder, 0).conditioning(range(5)).prompt_embeds
    kept = folder / "prompts-00000.safetensors"
    os.utime(kept, ns=(1, 1))
    (folder / "prompts-00001.safetensors").unlink()
    (folder / "prompts-00002.safetensors").rename(folder / "prompts-00002.partial")  # killed while writing
    with pytest.raises(
        PromptError, match=r"lacks 2 of 3 shards \(prompts-00001.safetensors, \.\.\.\); run the command"
    ):
        EmbeddedPrompts(folder, 0)
    embed(base, prompt_file, folder)
    assert kept.stat().st_mtime_ns == 1, "finished shards are kept"
    assert torch.allclose(EmbeddedPrompts(folder, 0).conditioning(range(5)).prompt_embeds, expected, atol=1e-6)


def test_a_folder_is_not_resumed_with_other_settings(
    folders: Callable[[str], Path], prompt_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "e"
    embed(folders("stable_diffusion"), prompt_file, folder)
    for changes, message in (
        ({"shard_size": 3}, r"shard_size 2 \(now 3\)"),
        ({"stored_type": "fp16"}, "stored_type fp"),
    ):
        with pytest.raises(PromptError, match=f"was begun with {message}"):
            embed(folders("stable_diffusion"), prompt_file, folder, **changes)
    with pytest.raises(PromptError, match=r"family stable_diffusion \(now pixart\), text_encoders"):
        embed(folders("pixart"), prompt_file, folder)
    prompt_file.write_text('{"prompt": "another"}\n')
    with pytest.raises(
        PromptError, match=r"count 5 \(now 1\), prompts_sha256 .*; resume with the same, or use another"
    ):
        embed(folders("stable_diffusion"), prompt_file, folder)


def test_embeddings_with_a_familys_former_name_are_read_and_resumed(
    folders: Callable[[str], Path], prompt_file: Path, tmp_path: Path
) -> None:
    base, folder = folders("stable_diffusion"), tmp_path / "e"
    embed(base, prompt_file, folder)
    index = folder / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"family": "sd"}))
    EmbeddedPrompts(folder, 0).require(load_base_model(base), 64, 48)
    (folder / "prompts-00001.safetensors").unlink()
    assert embed(base, prompt_file, folder).family == "stable_diffusion"
    assert (folder / "prompts-00001.safetensors").is_file()


def test_embeddings_of_another_family_or_size_are_refused_by_name(
    folders: Callable[[str], Path], prompt_file: Path, tmp_path: Path
) -> None:
    embed(folders("stable_diffusion"), prompt_file, tmp_path / "e")
    source = EmbeddedPrompts(tmp_path / "e", 0)
    with pytest.raises(
        PromptError, match="holds embeddings for stable_diffusion, the base model is sd3; embed the prompts with this"
    ):
        source.require(load_base_model(folders("sd3")), 64, 48)
    with pytest.raises(PromptError, match="for 64x48 pixels, the config trains 64x64; embed the prompts for that size"):
        source.require(load_base_model(folders("stable_diffusion")), 64, 64)


def test_damaged_folders_are_named(folders: Callable[[str], Path], prompt_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    with pytest.raises(PromptError, match=r"index.json cannot be read .* make embeddings with `tdm-train embed`"):
        EmbeddedPrompts(folder, 0)
    embed(folders("stable_diffusion"), prompt_file, folder)
    (folder / "prompts-00000.safetensors").write_bytes(b"torn")
    with pytest.raises(PromptError, match=r"prompts-00000.safetensors is damaged .*; remove it and embed again"):
        EmbeddedPrompts(folder, 0).conditioning(range(5))
    (folder / "empty.safetensors").unlink()
    with pytest.raises(PromptError, match=r"empty.safetensors is missing; run `tdm-train embed` again"):
        EmbeddedPrompts(folder, 0)
    raw = json.loads((folder / "index.json").read_text())
    for broken, message in (
        ({**raw, "format": 2}, "not of format 1"),
        ({**raw, "colour": 1}, r"\['colour'\] are missing"),
    ):
        (folder / "index.json").write_text(json.dumps(broken))
        with pytest.raises(PromptError, match=message):
            read_index(folder)
    with pytest.raises(PromptError, match="stored_type is 'fp8'; it must be one of fp16, bf16, fp32"):
        embed(folders("stable_diffusion"), prompt_file, tmp_path / "f", stored_type="fp8")
    with pytest.raises(PromptError, match="shard_size is 0; it must be at least 1"):
        embed(folders("stable_diffusion"), prompt_file, tmp_path / "f", shard_size=0)


# ---- the order of prompts ------------------------------------------------------------------------


def test_each_epoch_visits_each_prompt_once_in_its_own_order(
    folders: Callable[[str], Path], prompt_file: Path, tmp_path: Path
) -> None:
    embed(folders("stable_diffusion"), prompt_file, tmp_path / "e")
    source = EmbeddedPrompts(tmp_path / "e", seed=1)
    epochs = [tuple(source.rows(range(5 * epoch, 5 * epoch + 5))) for epoch in range(20)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 10
    assert Counter(source.rows(range(100))) == dict.fromkeys(range(5), 20)
    # A function of (seed, number) alone: in any portions, by any reader.
    again = EmbeddedPrompts(tmp_path / "e", seed=1)
    assert again.rows(range(93, 97)) == source.rows(range(100))[93:97]
    assert again.rows(range(0, 12)) == source.rows(range(100))[:12]
    assert EmbeddedPrompts(tmp_path / "e", seed=2).rows(range(100)) != source.rows(range(100))


# ---- latents -------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = []
    for number, text in enumerate(TEXTS):
        file = tmp_path / f"{text}.png"
        noise = torch.randint(256, (50 + number, 70, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(file)
        files.append(file)
    return files


def reference_latents(base: Path, files: list[Path]) -> Tensor:
    vae = AutoencoderKL.from_pretrained(base / "vae")
    pixels = torch.stack([read_pixels(file, 64, 48) for file in files])
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mode()
    latents: Tensor = (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return latents


@pytest.mark.parametrize("family", ["stable_diffusion", "sd3"])
def test_latents_pair_with_their_prompts_and_have_the_denoisers_scaling(
    folders: Callable[[str], Path], prompt_file: Path, pictures: list[Path], tmp_path: Path, family: str
) -> None:
    base, folder = folders(family), tmp_path / "e"
    embed(base, prompt_file, folder)
    assert encode_latents(base, prompt_file, folder, 64, 48, stored_type="fp32", batch_size=3, device="cpu") == 5
    source = EmbeddedPrompts(folder, 0)
    found = source.latents(range(5))
    assert found is not None and found.shape == (5, 4, 6, 8)
    expected = reference_latents(base, [pictures[row] for row in source.rows(range(5))])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (folder / "latents-00001.safetensors").unlink()
    with pytest.raises(PromptError, match="lacks 1 of 3 shards"):
        EmbeddedPrompts(folder, 0)
    encode_latents(base, prompt_file, folder, 64, 48, stored_type="fp32", device="cpu")
    again = EmbeddedPrompts(folder, 0).latents(range(5))
    assert again is not None
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


def test_pictures_of_a_folder_are_paired_sorted_by_name(
    folders: Callable[[str], Path], prompt_file: Path, pictures: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "e"
    embed(folders("stable_diffusion"), prompt_file, folder)
    encode_latents(folders("stable_diffusion"), tmp_path, folder, 64, 48, stored_type="fp32", device="cpu")
    source = EmbeddedPrompts(folder, 0)
    found = source.latents(range(5))
    assert found is not None
    by_name = sorted(pictures)
    expected = reference_latents(folders("stable_diffusion"), [by_name[row] for row in source.rows(range(5))])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(PromptError, match=r"latents.json is of other pictures, .* or remove latents.json"):
        encode_latents(folders("stable_diffusion"), prompt_file, folder, 64, 48, stored_type="fp32", device="cpu")


def test_pictures_that_do_not_pair_are_refused(
    folders: Callable[[str], Path], prompt_file: Path, pictures: list[Path], tmp_path: Path
) -> None:
    base, folder = folders("stable_diffusion"), tmp_path / "e"
    with pytest.raises(PromptError, match=r"index.json cannot be read"):
        encode_latents(base, prompt_file, folder, 64, 48)
    embed(base, prompt_file, folder)
    with pytest.raises(
        PromptError,
        match="of stable_diffusion at 64x48, the latents are of stable_diffusion at 64x64; latents and embeddings must",
    ):
        encode_latents(base, prompt_file, folder, 64, 64)
    pictures[0].rename(tmp_path / "hidden")
    with pytest.raises(PromptError, match=r"has 4 pictures \(.png, .*\) for 5 prompts; give one for each"):
        encode_latents(base, tmp_path, folder, 64, 48)
    with pytest.raises(
        PromptError, match=r"a red fox.png cannot be read as a picture .*; replace it or remove its prompt"
    ):
        encode_latents(base, prompt_file, folder, 64, 48, device="cpu")
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "a"}\n')
    with pytest.raises(PromptError, match=r'bare.jsonl, line 1 has no picture; add "image": "path"'):
        encode_latents(base, bare, folder, 64, 48)


def test_a_picture_is_scaled_to_cover_the_size_and_cropped_at_the_centre(tmp_path: Path) -> None:
    image = Image.new("RGB", (90, 30), (0, 0, 0))
    image.paste((255, 255, 255), (30, 0, 60, 30))
    image.save(tmp_path / "p.png")
    pixels = read_pixels(tmp_path / "p.png", 10, 10)
    assert pixels.shape == (3, 10, 10) and pixels.min() > 0.8 and pixels[:, 1:-1, 1:-1].min() > 0.98
