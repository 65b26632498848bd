"""The engine makes clips as it makes pictures: latents [C, F, H, W], pixels [F, H, W, 3]."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.checkpoint.frame_rule import FrameRule
from tdm_runtime.engine.delivery import Delivery, Preview
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.families import FAMILIES
from tdm_runtime.families.cogvideox import CogVideoXDenoiser
from tdm_runtime.families.latent_space import ClipParts
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import decoder_on
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.tiny_models import tiny_cogvideox

CPU = torch.device("cpu")
NUM_FRAMES = 9
"""Of 3 latent frames: the autoencoder compresses time by 4."""
MAX_LEVELS_APART = 2
"""torch's CPU kernels sum in another order at another batch size."""
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def clip_model(tiny_checkpoint: Path) -> LoadedModel:
    """A CogVideoX transformer and its autoencoder at minimal size, behind the tiny checkpoint's text encoder."""
    base = load_model(tiny_checkpoint, device="cpu")
    transformer = tiny_cogvideox(max_text_seq_length=base.text_encoder.encode("").max_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
        )
    geometry = FAMILIES["cogvideox"].geometry(transformer.config, vae.config)
    parts = ClipParts(FAMILIES["cogvideox"].decoder(vae))
    return replace(
        base,
        recipe=replace(base.recipe, native_sizes=((64, 64), (96, 64)), frames=FrameRule(NUM_FRAMES, 8, 17), fps=8),
        denoiser=TorchBackend(CogVideoXDenoiser(transformer), CPU),
        decoders={"full": decoder_on(TorchBackend(parts, CPU), geometry)},
        geometry=geometry,
    )


def clip_params(seed: int, steps: int, width: int = 64) -> SamplingParams:
    return SamplingParams("a fox runs", seed, steps, width, 64, frames=NUM_FRAMES)


def test_a_clip_has_all_its_frames(clip_model: LoadedModel) -> None:
    clip = generate(clip_model, clip_params(seed=1, steps=2, width=96))
    assert clip.shape == (NUM_FRAMES, 64, 96, 3)
    assert clip.dtype == np.uint8
    assert len(np.unique(clip)) > 10


def test_clips_of_mixed_step_counts_share_calls_and_equal_the_reference(clip_model: LoadedModel) -> None:
    requests = [clip_params(seed, steps) for seed, steps in enumerate((1, 4, 2, 3))]
    engine = DiffusionEngine(clip_model)
    futures = engine.submit_all(requests)
    with engine:
        clips = [future.result(TIMEOUT_S).pixels for future in futures]
    for params, clip in zip(requests, clips, strict=True):
        expected = generate(clip_model, params)
        assert clip.shape == expected.shape
        assert np.abs(clip.astype(int) - expected).max() <= MAX_LEVELS_APART
    assert engine.stats.sample_steps == 10
    assert engine.stats.steps < 10, "the clips shared no call"


def test_previews_of_a_clip_are_its_first_frame(clip_model: LoadedModel) -> None:
    shown: list[Preview] = []
    with DiffusionEngine(clip_model) as engine:
        delivery = Delivery(on_preview=shown.append, num_previews=2)
        engine.submit(clip_params(seed=5, steps=3), delivery).result(TIMEOUT_S)
    assert [preview.pixels.shape for preview in shown] == [(1, 64, 64, 3)] * 2
