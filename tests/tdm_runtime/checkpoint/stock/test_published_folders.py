"""Folders as publishers lay them out give the pictures of the stock pipeline that opens them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from tdm_runtime.recipe_cli import main as tdm_recipe
from tests.published_folders import (
    as_hub_snapshot,
    clip_vocabulary,
    edit_json,
    old_clip_weights,
    old_vae_weights,
    rename_weights,
    write_clip_tokenizer,
    write_t5_tokenizer,
)
from tests.stock_pictures import MIN_PSNR_DB, picture, psnr_db, stock_picture
from tests.tiny_pipelines import build_pipeline

PROMPTS = ("A red Fox", "two cats, on a hill! 42 times and then some more of them")
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Layout:
    """One kind of published folder, and how its stock pipeline is opened and called."""

    family: str
    edit: Callable[[Path], None] = lambda folder: None
    """Gives a folder that stock saved the publisher's layout."""
    dtype: torch.dtype = torch.float32
    shard_size: str | None = None
    opening: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the stock `from_pretrained`."""
    call: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    """Further arguments of the stock call."""


def sd15(folder: Path) -> None:
    write_clip_tokenizer(folder / "tokenizer")
    old_clip_weights(folder / "text_encoder")
    old_vae_weights(folder / "vae")
    edit_json(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    for name in ("safety_checker/config.json", "feature_extractor/preprocessor_config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}", encoding="utf-8")
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"a pickle")


def sd15_in_hub_cache(folder: Path) -> None:
    sd15(folder)
    as_hub_snapshot(folder)


def with_variants(folder: Path) -> None:
    """Put other variants beside the weights, and both kinds of single files, none of which stock reads by default."""
    sd15(folder)
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        for variant in ("fp16", "non_ema"):
            (folder / part / f"{stem}.{variant}.safetensors").write_bytes(b"another variant")
        (folder / part / f"{stem}.bin").write_bytes(b"a pickle")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"a single file")
    (folder / "v1-5-pruned.ckpt").write_bytes(b"a single file")


def sd21(folder: Path) -> None:
    write_clip_tokenizer(folder / "tokenizer", pad_token="!")


def sdxl(folder: Path) -> None:
    write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad_token="!")
    old_clip_weights(folder / "text_encoder")
    old_clip_weights(folder / "text_encoder_2")


def normalized_sdxl(folder: Path) -> None:
    sdxl(folder)
    edit_json(folder / "vae" / "config.json", latents_mean=[-1.6, 0.4, 0.2, -1.7], latents_std=[8.4, 5.8, 5.1, 4.4])


def pixart(folder: Path) -> None:
    write_t5_tokenizer(folder / "tokenizer")
    edit_json(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit_json(
        folder / "transformer" / "config.json",
        _class_name="Transformer2DModel",
        double_self_attention=False,
        num_vector_embeds=None,
        only_cross_attention=False,
        use_linear_projection=False,
    )


def sd3(folder: Path) -> None:
    sdxl(folder)
    write_t5_tokenizer(folder / "tokenizer_3")


def sd3_without_t5(folder: Path) -> None:
    sdxl(folder)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
        edit_json(folder / "model_index.json", **{part: [None, None]})


def sd3_that_never_had_t5(folder: Path) -> None:
    sd3_without_t5(folder)
    edit_json(folder / "model_index.json", text_encoder_3=None, tokenizer_3=None)


def z_image(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    head = load_file(weights)["embed_tokens.weight"]
    rename_weights(weights, lambda name: f"model.{name}", **{"lm_head.weight": head.clone()})


NO_CHECKER = {"safety_checker": None, "requires_safety_checker": False}
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
NO_BINS = {"guidance_scale": 1.0, "use_resolution_binning": False}
TURBO = {"guidance_scale": 0.0}
LAYOUTS = {
    "SD 1.5": Layout("stable_diffusion", sd15, opening=NO_CHECKER),
    "SD 1.5 with variants beside": Layout("stable_diffusion", with_variants, opening=NO_CHECKER),
    "SD 1.5 in the hub's cache": Layout("stable_diffusion", sd15_in_hub_cache, opening=NO_CHECKER),
    "SD 2.1": Layout("stable_diffusion", sd21),
    "SDXL in float16": Layout("sdxl", sdxl, dtype=torch.float16, call=TURBO),
    "SDXL in shards": Layout("sdxl", shard_size="20KB", call=TURBO),
    "SDXL with normalized latents": Layout("sdxl", normalized_sdxl, call=TURBO),
    "PixArt-alpha": Layout("pixart", pixart, call=NO_BINS),
    "PixArt in bfloat16 and shards": Layout("pixart", dtype=torch.bfloat16, shard_size="8KB", call=NO_BINS),
    "SD 3": Layout("sd3", sd3),
    "SD 3 in float16 and shards": Layout("sd3", dtype=torch.float16, shard_size="8KB"),
    "SD 3 without T5": Layout("sd3", sd3_without_t5, opening=NO_T5),
    "SD 3 that never had a T5": Layout("sd3", sd3_that_never_had_t5, opening=NO_T5),
    "FLUX.1 in bfloat16 and shards": Layout(
        "flux", dtype=torch.bfloat16, shard_size="8KB", call={"guidance_scale": 0.0, "max_sequence_length": 256}
    ),
    "FLUX.2 in bfloat16 and shards": Layout("flux2", dtype=torch.bfloat16, shard_size="40KB"),
    "Z-Image": Layout("z_image", z_image, dtype=torch.bfloat16, call=TURBO),
    "Z-Image in bfloat16 and shards": Layout("z_image", dtype=torch.bfloat16, shard_size="8KB", call=TURBO),
    "SANA in bfloat16 and shards": Layout(
        "sana", dtype=torch.bfloat16, shard_size="8KB", call={"use_resolution_binning": False}
    ),
}
SCHEDULERS = {
    "stable_diffusion": lambda: diffusers.DDIMScheduler(
        **SD_BETAS, set_alpha_to_one=False, steps_offset=1, clip_sample=False
    ),
    "sdxl": lambda: diffusers.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="trailing"),
}


def write_folder(layout: Layout, folder: Path) -> Path:
    pipeline = build_pipeline(layout.family)
    if layout.family in SCHEDULERS:
        pipeline.scheduler = SCHEDULERS[layout.family]()
    if layout.family in ("sd3", "flux", "z_image"):
        pipeline.vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipeline, part, None)
        if encoder is not None and encoder.config.model_type == "clip_text_model":
            encoder.resize_token_embeddings(len(clip_vocabulary()))
            encoder.config.eos_token_id = 2  # as all published configs say; the end mark has the largest id
    pipeline.to(layout.dtype).save_pretrained(folder, max_shard_size=layout.shard_size)
    layout.edit(folder)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_picture_equals_that_of_the_stock_pipeline(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = LAYOUTS[name]
    folder = write_folder(layout, tmp_path / "folder")
    if layout.shard_size is not None:
        assert list(folder.rglob("*.index.json"))
    stock = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **layout.opening)
    stock.set_progress_bar_config(disable=True)
    capsys.readouterr()
    assert tdm_recipe([str(folder), "--steps", "2", "-o", str(folder / "tdm_recipe.json")]) == 0, capsys.readouterr()
    for prompt in PROMPTS:
        theirs = stock_picture(stock, prompt, num_inference_steps=2, **layout.call)
        assert psnr_db(picture(folder, prompt, 2, tmp_path), theirs) >= MIN_PSNR_DB, prompt
    noise = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("backend: ")]
    assert noise == []
