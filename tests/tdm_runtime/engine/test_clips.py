"""The engine makes clips as it makes pictures, and their decode waits between its parts for who is more urgent."""

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
from tdm_runtime.engine.warm_up import warm_up
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.families import FAMILIES
from tdm_runtime.families.cogvideox import CogVideoXDenoiser
from tdm_runtime.families.latent_space import ClipParts
from tdm_runtime.media.receipt import receipt_of
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import ClipDecoder, decoder_on
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tdm_runtime.scheduling.cost_model import CostModel, Kind
from tests.stock_checkpoints import CASES, save_checkpoint
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


# ---- decodes in several calls --------------------------------------------------------------------


class SlowClips(CostModel):
    """A call of clips is thought to take a second, and one of pictures a millisecond."""

    def seconds(self, kind: Kind, size: int = 1) -> float:
        return 1.0 if len(kind.shape) == 4 else 1e-3

    def observe(self, kind: Kind, size: int, seconds: float, now_s: float, is_calm: bool = False) -> None:
        pass


LONG = 17
"""Frames of 5 latent frames of Wan: each is a part of the decode."""


@pytest.fixture(scope="module")
def wan_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A Wan whose every latent frame is decoded by a call of its own."""
    model = load_model(save_checkpoint(CASES["Wan 2.1"], tmp_path_factory.mktemp("wan")), device="cpu")
    decoder = model.decoders["full"]
    assert isinstance(decoder, ClipDecoder)
    parts = decoder.backend.module  # type: ignore[attr-defined]
    return replace(
        model,
        recipe=replace(model.recipe, native_sizes=((64, 32),), frames=FrameRule(LONG, 4, 33)),
        decoders={"full": ClipDecoder(decoder.backend, parts, model.geometry, call_pixels=1)},
    )


def long_clip(seed: int, steps: int) -> SamplingParams:
    return SamplingParams("a fox runs", seed, steps, 64, 32, frames=LONG)


def test_a_budgeted_picture_goes_between_the_parts_of_a_clips_decode(
    tiny_checkpoint: Path, wan_model: LoadedModel
) -> None:
    pictures, params = load_model(tiny_checkpoint, device="cpu"), long_clip(seed=1, steps=2)
    engine = DiffusionEngine(pictures, costs=SlowClips())
    clip = engine.submit(params, model=wan_model)
    for _ in range(1 + 2 + 2):  # the prompt, both steps and the first two of five parts
        engine.step()
    picture = engine.submit(SamplingParams("a red apple", 2, 1, 16, 16), Delivery(latency_budget_ms=60_000.0))
    for _ in range(3):  # prompt, step and decode
        assert not picture.done()
        engine.step()
    assert picture.done() and not clip.done()
    engine.step()
    engine.step()
    assert not clip.done()
    engine.step()
    made = clip.result(0)
    assert np.array_equal(made.pixels, generate(wan_model, params))
    assert len(made.timings.waits_ms) == 1 + 2 + 1, "the waits of all parts of the decode are one, as traces expect"
    engine.close()


def test_cancelling_a_clip_takes_effect_between_the_parts_of_its_decode(wan_model: LoadedModel) -> None:
    engine = DiffusionEngine(wan_model, costs=SlowClips())
    clip = engine.submit(long_clip(seed=1, steps=1))
    for _ in range(3):
        engine.step()
    assert clip.cancel() and engine.num_live == 1
    engine.step()
    assert engine.num_live == 0 and engine.stats.cancelled == 1
    engine.close()


def test_the_parts_of_a_decode_count_in_an_admission(wan_model: LoadedModel) -> None:
    """2 steps and 5 parts of a second each do not fit into 6 seconds."""
    engine = DiffusionEngine(wan_model, costs=SlowClips())
    with pytest.raises(InvalidRequestError, match=r"an idle engine needs 700\d\.\d ms for 1 picture of 2 steps"):
        engine.submit(long_clip(seed=1, steps=2), Delivery(latency_budget_ms=6000.0))
    steps = engine.submit(long_clip(seed=1, steps=4), Delivery(latency_budget_ms=7500.0, min_inference_steps=1))
    while engine.num_live:
        engine.step()
    assert steps.result(0).params.num_inference_steps == 2
    engine.close()


def test_clips_and_pictures_of_several_models_live_in_one_engine(
    tiny_checkpoint: Path, wan_model: LoadedModel, clip_model: LoadedModel
) -> None:
    pictures = load_model(tiny_checkpoint, device="cpu")
    work = [
        (pictures, SamplingParams("a red apple", 2, 3, 16, 16)),
        (wan_model, long_clip(seed=1, steps=2)),
        (clip_model, clip_params(seed=3, steps=1)),
        (wan_model, replace(long_clip(seed=2, steps=4), frames=5)),
    ]
    with DiffusionEngine(pictures) as engine:
        warm_up(engine, wan_model)
        futures = [engine.submit(params, Delivery(strict=True), model) for model, params in work]
        for (model, params), future in zip(work, futures, strict=True):
            made = future.result(TIMEOUT_S)
            assert np.array_equal(made.pixels, generate(model, params))
            receipt = receipt_of(model, params, made.pixels, made.is_strict)
            assert (receipt.frames, receipt.to_params()) == (params.frames, params)


def test_a_model_of_clips_is_not_asked_for_pictures_nor_the_reverse(
    tiny_checkpoint: Path, wan_model: LoadedModel
) -> None:
    pictures = load_model(tiny_checkpoint, device="cpu")
    engine, clip = DiffusionEngine(pictures), long_clip(seed=1, steps=1)
    for params, model, message in (
        (replace(clip, frames=None), wan_model, r"frames is missing; .* makes clips of 4 k \+ 1 frames"),
        (replace(clip, frames=16), wan_model, "frames is 16; .* at most 33: take 17"),
        (replace(clip, width=16, height=16), pictures, "frames is 17; .* makes pictures, not clips"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            engine.submit(params, model=model)
    engine.close()
