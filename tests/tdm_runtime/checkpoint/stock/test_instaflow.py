"""InstaFlow predicts the velocity from noise to data; its pictures are those of its publisher's loop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tdm_runtime.checkpoint.recipe import RECIPE_FILE
from tdm_runtime.recipe_cli import main as tdm_recipe
from tests.stock_pictures import HEIGHT, MIN_PSNR_DB, SEED, WIDTH, picture, psnr_db
from tests.tiny_pipelines import build_pipeline

PROMPT = "a red fox"


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_picture_equals_that_of_the_publishers_loop(steps: int, tmp_path: Path) -> None:
    """N steps of size 1 / N from time 1, the UNet called at 1000 times it (gnobitab/InstaFlow, pipeline_rf.py)."""
    pipeline, folder = build_pipeline("stable_diffusion"), tmp_path / "folder"
    pipeline.save_pretrained(folder)
    assert tdm_recipe([str(folder), "--recipe", "instaflow", "-o", str(folder / RECIPE_FILE)]) == 0
    recipe = json.loads((folder / RECIPE_FILE).read_text())
    assert (recipe["timesteps"], recipe["output_sign"]) == ({"1": [1000.0]}, -1)
    lists = {str(steps): [1000.0 * (1 - n / steps) for n in range(steps)]}
    (folder / RECIPE_FILE).write_text(json.dumps({**recipe, "timesteps": lists, "default_steps": steps}))

    embeds, _ = pipeline.encode_prompt(PROMPT, "cpu", 1, False)
    latents = torch.randn(1, 4, HEIGHT // pipeline.vae_scale_factor, WIDTH // pipeline.vae_scale_factor,
                          generator=torch.Generator().manual_seed(SEED))  # fmt: skip
    with torch.no_grad():
        for n in range(steps):
            time = torch.tensor([1.0 - n / steps])
            latents = latents + pipeline.unet(latents, 1000 * time, encoder_hidden_states=embeds).sample / steps
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    theirs = pipeline.image_processor.postprocess(decoded, output_type="np")[0]
    assert np.ptp(theirs) > 0.1
    assert psnr_db(picture(folder, PROMPT, steps, tmp_path), theirs) >= MIN_PSNR_DB
