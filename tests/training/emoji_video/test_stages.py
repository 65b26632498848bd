"""The stages of the clip model: frame numbers, exact resume, and a checkpoint that stock pipelines open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, UNet2DConditionModel, UNetMotionModel

from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import denoise
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tdm_runtime.sampling.noise import initial_noise
from tdm_runtime.sampling.sampler import solve
from tests.training.run.killed import assert_resumes, needs_font, tensors_of
from training.cli import main
from training.emoji_video.clips import FRAMES, MOTIONS, REVERSED
from training.emoji_video.latents import FRAME_SHAPE, encode_clips
from training.emoji_video.motion_unet import build_motion_unet, frames_shown, load_motion_unet, motion_modules
from training.emoji_video.publish import publish_video
from training.emoji_video.student import EMOJI_VIDEO, train_video_student
from training.emoji_video.teacher import (
    VideoTeacherConfig,
    draw_clips,
    draw_frames,
    draw_timesteps,
    train_video_teacher,
)
from training.run.loop import LoopConfig

TEACHER = VideoTeacherConfig(LoopConfig(steps=3, save_every_s=0.0), batch_size=2, frames=2)
STUDENT = replace(EMOJI_VIDEO, steps=3, batch_size=1, step_counts=(1, 2), warmup_steps=0, save_every_s=0.0)
PROMPT = "a rocket moving right on a blue background"


@pytest.fixture(scope="module")
def picture_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(DEFAULT_CHECKPOINT / "unet").float()


@pytest.fixture(scope="module")
def unet(picture_unet: UNet2DConditionModel) -> UNetMotionModel:
    torch.manual_seed(0)
    return build_motion_unet(picture_unet).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a short run: clips and a teacher."""
    folder = tmp_path_factory.mktemp("run")
    encode_clips(folder / "clips", DEFAULT_CHECKPOINT, count=2 * len(MOTIONS))
    train_video_teacher(folder / "teacher", folder / "clips", DEFAULT_CHECKPOINT, replace(TEACHER, one_way_until=0.0))
    return folder


# -- the denoiser ----------------------------------------------------------------------------------


def spread_over_frames(unet: UNetMotionModel, frames: int = FRAMES) -> float:
    """Return how much the output differs between frames whose inputs are all the same."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, 4, 1, 16, 16, generator=generator)
    embeds = torch.randn(1, 32, 128, generator=generator).expand(frames, -1, -1)
    with torch.no_grad():
        output = unet(picture.expand(-1, -1, frames, -1, -1), torch.tensor([900]), embeds).sample
    return float(output.std(dim=2).mean())


def test_the_frame_number_reaches_the_output_before_training(unet: UNetMotionModel) -> None:
    stock = build_motion_unet_without_start(unet)
    assert spread_over_frames(unet) > 10 * spread_over_frames(stock)


def build_motion_unet_without_start(unet: UNetMotionModel) -> UNetMotionModel:
    """Return the same denoiser with the attention of the stock start: nearly uniform over the frames."""
    stock = UNetMotionModel.from_config(unet.config).eval()
    stock.load_state_dict(unet.state_dict())
    fresh = UNetMotionModel.from_config(unet.config)
    for ours, theirs in zip(motion_modules(stock), motion_modules(fresh), strict=True):
        output = ours.proj_out.state_dict()
        ours.load_state_dict(theirs.state_dict())
        ours.proj_out.load_state_dict(output)
    return stock


def test_each_frame_attends_mostly_to_itself_before_training(unet: UNetMotionModel) -> None:
    for module in motion_modules(unet):
        block = module.transformer_blocks[0]
        position = block.pos_embed.pe[:, :FRAMES]
        query, key = (block.attn1.head_to_batch_dim(p(position)) for p in (block.attn1.to_q, block.attn1.to_k))
        weights = block.attn1.get_attention_scores(query, key)
        assert weights.diagonal(dim1=1, dim2=2).min() > 0.7


def test_it_takes_over_the_projection_of_k(unet: UNetMotionModel, picture_unet: UNet2DConditionModel) -> None:
    ours, theirs = (model.time_embedding.cond_proj.weight for model in (unet, picture_unet))
    assert torch.equal(ours, theirs) and theirs.abs().max() > 0


def test_some_frames_keep_their_true_positions(unet: UNetMotionModel) -> None:
    codes = [module.transformer_blocks[0].pos_embed for module in motion_modules(unet)]
    whole = [code.pe for code in codes]
    with frames_shown(unet, [2, 7]):
        assert all(torch.equal(code.pe, pe[:, [2, 7]]) for code, pe in zip(codes, whole, strict=True))
    assert all(code.pe is pe for code, pe in zip(codes, whole, strict=True))


# -- stages ----------------------------------------------------------------------------------------


def test_draws_favour_high_noise_leave_out_reversed_motions_at_first_and_end_with_whole_clips() -> None:
    config = VideoTeacherConfig(LoopConfig(steps=100), batch_size=400, frames=3)
    generator = torch.Generator().manual_seed(0)
    timesteps = draw_timesteps(config, generator)
    high = config.high_noise_share + (1 - config.high_noise_share) * (1000 - config.high_noise_from) / 1000
    assert (timesteps >= config.high_noise_from).float().mean() == pytest.approx(high, abs=0.07)
    assert timesteps.min() >= 0 and timesteps.max() <= 999 and torch.equal(timesteps, timesteps.round())

    def motions(step: int) -> set[str]:
        return {MOTIONS[n % len(MOTIONS)] for n in draw_clips(config, step, 900, generator)}

    assert motions(0) == set(MOTIONS) - set(REVERSED) and motions(99) == set(MOTIONS)
    assert max(draw_clips(config, 99, 20, generator)) < 18
    assert len(set(draw_frames(config, 0, generator))) == 3
    assert draw_frames(config, 99, generator) == list(range(FRAMES))


@needs_font
def test_the_teacher_resumes_exactly_and_trains_every_part(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(folder: Path) -> None:
        train_video_teacher(folder, run / "clips", DEFAULT_CHECKPOINT, TEACHER)

    assert_resumes(train, tmp_path, monkeypatch)
    torch.manual_seed(0)
    start = build_motion_unet(UNet2DConditionModel.from_pretrained(DEFAULT_CHECKPOINT / "unet").float()).state_dict()
    trained = tensors_of(tmp_path / "peace")
    kept = {name for name in start if torch.equal(start[name], trained[f"unet.{name}"])}
    assert kept == {name for name in start if name.endswith("pos_embed.pe") or "cond_proj" in name}


@needs_font
def test_the_student_resumes_exactly_and_learns_k(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_resumes(lambda folder: train_video_student(folder, run / "teacher", STUDENT), tmp_path, monkeypatch)
    before, after = (load_motion_unet(f / "unet").state_dict() for f in (run / "teacher", tmp_path / "peace"))
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith("pos_embed.pe")
    }


def test_clips_must_be_encoded_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emoji-video", "teacher", "--run", str(tmp_path)]) == 2
    assert "make it with `tdm-train emoji-video clips`" in capsys.readouterr().err


# -- the checkpoint --------------------------------------------------------------------------------


def stock_clip(pipeline: AnimateDiffPipeline, steps: int, seed: int) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT,
        num_frames=FRAMES,
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=1.0,
        latents=initial_noise(seed, (1, FRAME_SHAPE[0], FRAMES, *FRAME_SHAPE[1:])),
        output_type="np",
    ).frames[0]  # type: ignore[no-any-return]


@needs_font
@pytest.mark.parametrize("steps", [1, 4])
def test_a_stock_pipeline_makes_our_clip_without_k(run: Path, tmp_path: Path, steps: int) -> None:
    publish_video(tmp_path, DEFAULT_CHECKPOINT, run / "teacher", run / "teacher")
    recipe = open_checkpoint(tmp_path).recipe
    assert (recipe.default_frames, recipe.fps, recipe.step_counts) == (FRAMES, 8, (1, 2, 3, 4))
    assert recipe.step_condition == "timestep_cond" and open_checkpoint(tmp_path).has_tiny_vae
    model = load_model(tmp_path)
    params = SamplingParams(PROMPT, 3, steps, 64, 64, frames=FRAMES)
    prompt, noise = model.conditioning(model.embedding(params), params), model.noise(params).initial()[None]
    *_, (latents, _) = solve(
        recipe.step_table(steps, 64, 64), noise, partial(denoise, [model], step_counts=None, prompt=prompt)
    )
    ours = model.decoders["full"].decode(latents)[0]
    stock = stock_clip(AnimateDiffPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32), steps, seed=3)
    assert np.abs(stock * 255.0 - ours).max() <= 1.0
    assert np.abs(generate(model, params).astype(float) - ours).mean() > 0.5, "K changes nothing"


def test_stages_run_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    stages: Sequence[str] = ("clips", "teacher", "student", "publish")
    monkeypatch.setattr("training.cli._EMOJI_VIDEO", {name: lambda _, name=name: ran.append(name) for name in stages})
    assert main(["emoji-video"]) == 0 and ran == list(stages)
