"""FLUX.1 and FLUX.2 pass their transformers, text encoders and VAEs what the stock pipelines pass them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import FAMILIES, Conditioning, Family, decoder_for, denoiser_for
from tdm_runtime.families.family import TextEncoders
from tests.tiny_models import tiny_conditioning, tiny_flux, tiny_flux2
from tests.tiny_pipelines import build_pipeline

WIDTH, HEIGHT = 96, 64
PROMPTS = ["A Red Fox", "", "two cats on a green hill at night, " * 20]
TOKENS = {"schnell": 256, "dev": 512, "klein": 512}
"""Model -> tokens of the T5 or of Qwen3."""


def build(model: str) -> tuple[Any, Family]:
    """Return the stock pipeline of a model and its family."""
    family = FAMILIES["flux2" if model == "klein" else "flux"]
    pipeline = build_pipeline(family.name)
    pipeline.set_progress_bar_config(disable=True)
    if family.name == "flux":
        pipeline.register_modules(transformer=tiny_flux(guidance_embeds=model == "dev"))
        pipeline.vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    return pipeline, family


def encode(pipeline: Any, family: Family, prompts: list[str]) -> Conditioning:
    encoders = TextEncoders(pipeline, pipeline.transformer.config, width=WIDTH, height=HEIGHT)
    return family.encode_prompts(prompts, encoders)


@dataclass
class StockRun:
    """What a stock pipeline did for two prompts in two steps."""

    pipeline: Any
    family: Family
    calls: list[dict[str, Any]]
    """Arguments of each call of the transformer."""
    outputs: list[Tensor]
    """Model output of each call, [B, C, H, W]."""
    latents: list[Tensor]
    """Latents before each step and after the last, [B, C, H, W]."""
    timesteps: list[float]
    """Timestep of each call: sigma * 1000."""
    pictures: NDArray[np.uint8]
    """Pictures, [B, HEIGHT, WIDTH, 3]."""


@pytest.fixture(scope="module", params=TOKENS)
def stock(request: pytest.FixtureRequest) -> StockRun:
    pipeline, family = build(request.param)
    calls: list[dict[str, Any]] = []
    packed: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
        calls.append(kwargs)
        packed.append(kwargs["hidden_states"])
        outputs.append(output[0])

    def keep(pipeline: Any, step: int, timestep: Tensor, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1:
            packed.append(changed["latents"])
        return changed

    def unpack(tokens: Tensor) -> Tensor:
        if family.name == "flux":
            return pipeline._unpack_latents(tokens, HEIGHT, WIDTH, pipeline.vae_scale_factor)
        return tokens.transpose(1, 2).reshape(len(tokens), -1, HEIGHT // 16, WIDTH // 16)

    hook = pipeline.transformer.register_forward_hook(record, with_kwargs=True)
    pictures = pipeline(
        prompt=PROMPTS[:2],
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=2,
        guidance_scale=1.0 if request.param == "klein" else 3.5,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=TOKENS[request.param],
        callback_on_step_end=keep,
        output_type="pil",
    ).images
    hook.remove()
    return StockRun(
        pipeline,
        family,
        calls,
        [unpack(output) for output in outputs],
        [unpack(tokens) for tokens in packed],
        pipeline.scheduler.timesteps.tolist(),
        np.stack([np.asarray(picture) for picture in pictures]),
    )


@torch.no_grad()
def test_each_call_of_the_transformer_equals_the_pipelines(stock: StockRun) -> None:
    pipeline = stock.pipeline
    denoiser, prompt = denoiser_for(pipeline.transformer), encode(pipeline, stock.family, PROMPTS[:2])
    calls: list[dict[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    assert len(stock.calls) == len(stock.timesteps) == 2
    for theirs, expected, latents, timestep in zip(
        stock.calls, stock.outputs, stock.latents[:2], stock.timesteps, strict=True
    ):
        output = denoiser(latents, torch.full((2,), timestep), None, *prompt.tensors())
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
        ours = calls.pop()
        assert {name for name in theirs if theirs[name] is not None} - set(ours) <= {"joint_attention_kwargs"}
        for name in ("hidden_states", "timestep", "guidance", "encoder_hidden_states", "pooled_projections"):
            torch.testing.assert_close(ours.get(name), theirs.get(name), rtol=0, atol=0)
        for name in ("img_ids", "txt_ids"):  # FLUX.2's are batched, each sample's the same
            positions = theirs[name] if theirs[name].ndim == 2 else theirs[name][0]
            assert torch.equal(ours[name].float(), positions.float())
    hook.remove()


@torch.no_grad()
def test_pictures_equal_the_pipelines_within_one_level(stock: StockRun) -> None:
    pixels = decoder_for(stock.pipeline.vae)(stock.latents[-1]).numpy()
    assert pixels.shape == (2, HEIGHT, WIDTH, 3)
    assert np.abs(pixels.astype(int) - stock.pictures).max() <= 1
    assert stock.pictures.std() > 5


def test_noise_has_the_shape_and_the_order_of_the_pipelines(stock: StockRun) -> None:
    geometry = stock.family.geometry(stock.pipeline.transformer.config, stock.pipeline.vae.config)
    noise = torch.randn(2, *geometry.latent_shape(WIDTH, HEIGHT), generator=torch.Generator().manual_seed(3))
    assert torch.equal(stock.latents[0], noise)


@pytest.mark.parametrize("model", TOKENS)
@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_encodes_them(model: str) -> None:
    pipeline, family = build(model)
    ours = encode(pipeline, family, PROMPTS)
    theirs = pipeline.encode_prompt(PROMPTS, device=torch.device("cpu"), max_sequence_length=TOKENS[model])
    assert torch.equal(ours.prompt_embeds, theirs[0]) and ours.prompt_embeds.shape[1] == TOKENS[model]
    if model == "klein":
        assert ours.pooled_prompt_embeds is None
    else:
        assert ours.pooled_prompt_embeds is not None and torch.equal(ours.pooled_prompt_embeds, theirs[1])
    assert (None if ours.guidance is None else ours.guidance.tolist()) == ([3.5] * 3 if model == "dev" else None)
    for n, prompt in enumerate(PROMPTS):
        alone = encode(pipeline, family, [prompt])
        for one, all_of_them in zip(alone.tensors(), ours.tensors(), strict=True):
            assert (one is None) == (all_of_them is None)
            if one is not None and all_of_them is not None:
                torch.testing.assert_close(one[0], all_of_them[n], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_encoded_pixels_are_the_latents_that_decode_to_them(stock: StockRun) -> None:
    vae = stock.pipeline.vae
    pixels = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4)) * 2 - 1
    latents = stock.family.encode_pixels(vae, pixels)
    geometry = stock.family.geometry(stock.pipeline.transformer.config, vae.config)
    assert latents.shape == (2, *geometry.latent_shape(WIDTH, HEIGHT))
    assert stock.family.latent_channels(vae.config) == geometry.channels
    torch.testing.assert_close(decoder_for(vae).to_vae(latents), vae.encode(pixels).latent_dist.mode())
    if stock.family.name == "flux2":
        torch.testing.assert_close(latents, stock.pipeline._encode_vae_image(pixels, generator=None))


@pytest.mark.parametrize(("family", "channels", "shape"), [("flux", 64, (16, 96, 128)), ("flux2", 128, (128, 48, 64))])
def test_latents_of_the_published_models(family: str, channels: int, shape: tuple[int, ...]) -> None:
    vae = {"block_out_channels": [128, 256, 512, 512]}
    geometry = FAMILIES[family].geometry({"in_channels": channels, "patch_size": 1}, vae)
    assert geometry.latent_shape(1024, 768) == shape
    with pytest.raises(ValueError, match=f"the size is 1024x760 pixels; {family} takes multiples of 16"):
        geometry.latent_shape(1024, 760)


@torch.no_grad()
def test_each_sample_of_dev_has_its_own_guidance() -> None:
    denoiser = denoiser_for(tiny_flux(guidance_embeds=True))
    x, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 400.0])
    prompt = replace(tiny_conditioning("flux", 2), guidance=torch.tensor([3.5, 2.0]))
    output = denoiser(x, timesteps, None, *prompt.tensors())
    for n in range(2):
        alone = denoiser(x[n : n + 1], timesteps[n : n + 1], None, *prompt[n : n + 1].tensors())
        torch.testing.assert_close(output[n : n + 1], alone, rtol=1e-5, atol=1e-5)
    other = denoiser(x, timesteps, None, *replace(prompt, guidance=torch.tensor([3.5, 2.5])).tensors())
    assert torch.equal(other[0], output[0]) and (other[1] - output[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"guidance is None; FLUX\.1 \[dev\] reads it: give a scale"):
        denoiser(x, timesteps, None, *tiny_conditioning("flux", 2).tensors())


def test_models_of_other_pipelines_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"takes 96 channels and gives 16, allowed are 96; use a text-to-image"):
        denoiser_for(tiny_flux(in_channels=96, out_channels=16))  # FLUX.1 Fill reads a picture and a mask
    with pytest.raises(CheckpointError, match=r"has guidance_embeds, as FLUX\.2 \[dev\] has"):
        denoiser_for(tiny_flux2(guidance_embeds=True))
