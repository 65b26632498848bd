"""Models of clips are trained as those of pictures: from clip files to latents, a student, and sheets of its frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLWan
from PIL import Image
from torch import Tensor

from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.media.video_file import encode_frames
from tests.training.tiny_runs import UNIFY
from training.cli import main
from training.pretrained.latents import encode_latents, read_clip
from training.pretrained.presets import PRESETS
from training.pretrained.prompts import EmbeddedPrompts, PromptError, embed_prompts
from training.pretrained.train import GRID_PROMPTS, finetune_backbone, train_backbone
from training.run.finetune import FinetuneConfig

WIDTH, HEIGHT, FRAMES = 64, 48, 9
TEXTS = ("a fox runs", "a hen walks", "an owl flies", "rain falls")


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with a clip each, in all formats that are read: 12 frames that grow brighter, wider than the size."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for number, text in enumerate(TEXTS):
        kind = ("mp4", "gif", "webp", "mp4")[number]
        grey = np.arange(12, dtype=np.uint8)[:, None, None, None] * 20 + 10 * number
        frames = np.broadcast_to(grey, (12, HEIGHT, WIDTH + 32, 3))
        (folder / f"{number}.{kind}").write_bytes(encode_frames(frames.copy(), kind, fps=8))
        rows.append(json.dumps({"prompt": text, "image": f"{number}.{kind}"}))
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "prompts.jsonl"


@pytest.fixture(scope="module")
def workplace(
    folders: Callable[[str], Path], prompt_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Family -> folder of its base, and its embedded prompts with the latents of their clips."""
    root, made = tmp_path_factory.mktemp("embeddings"), {}

    def places(family: str) -> tuple[Path, Path]:
        if family not in made:
            embed_prompts(folders(family), prompt_file, root / family, WIDTH, HEIGHT, device="cpu")
            encode_latents(
                folders(family), prompt_file, root / family, WIDTH, HEIGHT, FRAMES, stored_type="fp32", device="cpu"
            )
            made[family] = folders(family), root / family
        return made[family]

    return places


def stock_latents(family: str, base: Path, clips: Tensor) -> Tensor:
    """Return what diffusers' own VAE gives, in the units of the denoiser."""
    vae = {"cogvideox": AutoencoderKLCogVideoX, "wan": AutoencoderKLWan, "animatediff": AutoencoderKL}[family]
    vae = vae.from_pretrained(base / "vae")
    with torch.no_grad():
        if family == "animatediff":
            frames = [vae.encode(clips[:, :, n]).latent_dist.mode() for n in range(clips.shape[2])]
            return torch.stack(frames, dim=2) * vae.config.scaling_factor
        mean = vae.encode(clips).latent_dist.mode()
    if family == "cogvideox":
        return mean * vae.config.scaling_factor
    mean_of, std_of = (torch.tensor(vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    return (mean - mean_of) / std_of


@pytest.mark.parametrize("family", ["cogvideox", "wan", "animatediff"])
def test_latents_of_clips_are_those_of_the_stock_vae(
    workplace: Callable[[str], tuple[Path, Path]], prompt_file: Path, family: str
) -> None:
    base, embeddings = workplace(family)
    prompts = EmbeddedPrompts(embeddings, 0)
    found, rows = prompts.latents(range(4)), prompts.rows(range(4))
    files = [json.loads(line)["image"] for line in prompt_file.read_text().splitlines()]
    clips = torch.stack([read_clip(prompt_file.parent / files[row], WIDTH, HEIGHT, FRAMES) for row in rows])
    torch.testing.assert_close(found, stock_latents(family, base, clips), rtol=1e-3, atol=1e-4)


def test_frames_are_taken_evenly_from_the_first_to_the_last(prompt_file: Path) -> None:
    clip = read_clip(prompt_file.parent / "2.webp", WIDTH, HEIGHT, 3)
    assert clip.shape == (3, 3, HEIGHT, WIDTH)
    levels = (clip.mean(dim=(0, 2, 3)) + 1) * 127.5
    assert (levels - torch.tensor([20.0, 140.0, 240.0])).abs().max() < 3  # frames 0, 6 and 11
    with pytest.raises(PromptError, match=r"2.webp has 12 frames and 13 are taken; replace it or remove its prompt"):
        read_clip(prompt_file.parent / "2.webp", WIDTH, HEIGHT, 13)


def test_clips_that_do_not_fit_are_refused(folders: Callable[[str], Path], prompt_file: Path, tmp_path: Path) -> None:
    for family in ("cogvideox", "stable_diffusion"):
        embed_prompts(folders(family), prompt_file, tmp_path / family, WIDTH, HEIGHT, device="cpu")
    with pytest.raises(PromptError, match="frames is 9 and stable_diffusion makes pictures; set frames to 1"):
        encode_latents(
            folders("stable_diffusion"), prompt_file, tmp_path / "stable_diffusion", WIDTH, HEIGHT, FRAMES, device="cpu"
        )
    broken = tmp_path / "files"
    broken.mkdir()
    for number in range(4):
        (broken / f"{number}.mp4").write_bytes(b"no clip")
    with pytest.raises(PromptError, match=r"0.mp4 cannot be read as a clip .*; replace it or remove its prompt"):
        encode_latents(folders("cogvideox"), broken, tmp_path / "cogvideox", WIDTH, HEIGHT, FRAMES, device="cpu")
    (broken / "3.mp4").rename(broken / "3.png")
    with pytest.raises(PromptError, match=r"has 3 clips \(.mp4, .*\) for 4 prompts; give one for each"):
        encode_latents(folders("cogvideox"), broken, tmp_path / "cogvideox", WIDTH, HEIGHT, FRAMES, device="cpu")


def test_a_clip_student_is_warmed_up_distilled_and_drawn(
    workplace: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """TDM-unify-SFT on clips: fine-tuned on their latents, then distilled with sheets of frames."""
    base, embeddings = workplace("animatediff")
    tuned = finetune_backbone(tmp_path / "sft", base, embeddings, FinetuneConfig(steps=1, batch_size=2))
    size = {"width": WIDTH, "height": HEIGHT, "frames": FRAMES}
    config = replace(UNIFY, **size, steps=1, batch_size=2, step_counts=(1, 2), grid_every=1)
    model = train_backbone(tmp_path / "run", tuned, embeddings, config)
    sheet = Image.open(tmp_path / "run" / "samples" / "000001.png")
    assert sheet.size == (2 * 5 * WIDTH, GRID_PROMPTS * HEIGHT)
    frames = open_checkpoint(model).recipe.frames
    assert frames is not None and frames.default == FRAMES


def test_the_preset_of_wan_runs_from_folder_to_folder_at_the_size_of_its_config(
    folders: Callable[[str], Path], prompt_file: Path, tmp_path: Path
) -> None:
    config = tmp_path / "small.toml"
    config.write_text(
        f"steps = 1\nbatch_size = 2\naccumulation = 1\nlora_rank = 2\nwidth = {WIDTH}\nheight = {HEIGHT}\nframes = 5\n"
    )
    of_base = ["--preset", "wan-1.3b", "--config", str(config), "--base", str(folders("wan"))]
    embeddings = ["--output", str(tmp_path / "embeddings")]
    assert main(["embed", *of_base, "--prompts", str(prompt_file), *embeddings]) == 0
    assert main(["encode", *of_base, "--images", str(prompt_file), *embeddings]) == 0
    latents = EmbeddedPrompts(tmp_path / "embeddings", 0).latents(range(1))
    assert latents is not None and latents.shape[2] == 2
    run = ["--embeddings", str(tmp_path / "embeddings"), "--output", str(tmp_path / "run")]
    assert main(["distill", *of_base, *run]) == 0
    recipe = open_checkpoint(tmp_path / "run" / "model").recipe
    assert recipe.frames is not None and recipe.frames.default == 5
    assert recipe.noise_schedule.shift == PRESETS["wan-1.3b"].flow_shift  # type: ignore[union-attr]
