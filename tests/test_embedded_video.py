"""The embedded clip checkpoint shows the glyph, the background and the motion that its prompts name.

The floors are below the values that `tdm-train score-video` measured (checkpoints/tdm-emoji-video/README.md). So only a
worse checkpoint or a broken sampler fails, and not the rounding of another machine.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline

from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.folder import CLIP_CHECKPOINT, open_checkpoint
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from training.emoji_video.clips import DIRECTIONS, FRAMES, caption
from training.emoji_video.report import student_clip
from training.emoji_video.score import ClipScorer, scoring_clips
from training.emoji_video.student import EMOJI_VIDEO, build_video_recipe

MAX_FOLDER_BYTES = 25 * 10**6
CLIPS = 9
MOTION_FLOOR = 0.75
GLYPH_FLOOR = 0.75
BACKGROUND_FLOOR = 0.85


@pytest.fixture(scope="module")
def video_model() -> LoadedModel:
    return load_model(CLIP_CHECKPOINT)


@pytest.mark.parametrize("steps", [1, 4])
def test_clips_show_the_motion_glyph_and_background_of_their_captions(video_model: LoadedModel, steps: int) -> None:
    asked = scoring_clips(CLIPS)
    clips = [student_clip(video_model, steps, caption(clip), seed) for seed, clip in enumerate(asked)]
    assert clips[0].shape == (FRAMES, 64, 64, 3)
    score = ClipScorer().score(clips, asked)
    assert score.motion >= MOTION_FLOOR
    assert score.glyph >= GLYPH_FLOOR
    assert score.background >= BACKGROUND_FLOOR
    assert np.mean([score.by_motion[glide] for glide in DIRECTIONS]) >= MOTION_FLOOR


def test_the_folder_is_small_and_its_hashes_and_recipe_match() -> None:
    files = [file for file in CLIP_CHECKPOINT.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < MAX_FOLDER_BYTES
    served, trained = open_checkpoint(CLIP_CHECKPOINT).recipe, build_video_recipe()
    assert all(file_sha256(CLIP_CHECKPOINT / name) == sha for name, sha in served.files.items())
    assert (served.timesteps, served.noise_schedule, served.frames) == (
        trained.timesteps,
        trained.noise_schedule,
        trained.frames,
    )
    assert served.step_counts == EMOJI_VIDEO.step_counts


def test_a_stock_pipeline_opens_it() -> None:
    pipeline = AnimateDiffPipeline.from_pretrained(CLIP_CHECKPOINT, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "a rocket moving right on a blue background",
        num_frames=FRAMES,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames
    assert frames.shape == (1, FRAMES, 64, 64, 3) and frames.std() > 0.05
