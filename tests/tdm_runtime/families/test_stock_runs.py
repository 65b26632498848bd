"""A family encodes, calls and decodes as the stock pipeline does in a whole run from the same latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import FAMILIES, Conditioning, decoder_for, denoiser_for
from tdm_runtime.families.family import TextEncoders
from tests.tiny_models import tiny_sana
from tests.tiny_pipelines import StockStep, build_pipeline, dc_vae, run_stock

PROMPTS = ["A Red fox", "two cats on a green hill at night, " * 20]
"""A short prompt with capitals, and one that is longer than any of these families reads."""


@dataclass(frozen=True)
class Run:
    """A stock pipeline, what it did, and our conditioning of its prompts."""

    family: str
    pipeline: Any
    steps: list[StockStep]
    prompt: Conditioning

    @property
    def unit(self) -> float:
        """Our latents times it are the pipeline's."""
        return float(self.pipeline.scheduler.config.get("sigma_data", 1.0))

    def predict(self, step: StockStep, prompt: Conditioning, index: slice = slice(None)) -> Tensor:
        """Return our model output for the latents and the timestep of a stock step."""
        timesteps = step.timestep.expand(len(step.sample)).float()
        denoiser = denoiser_for(self.pipeline.transformer)
        output: Tensor = denoiser(step.sample[index] / self.unit, timesteps[index], None, *prompt.tensors())
        return output * self.unit


def encoded(family: str, pipeline: Any, prompts: list[str]) -> Conditioning:
    encoders = TextEncoders(pipeline, pipeline.transformer.config, width=96, height=64)
    return FAMILIES[family].encode_prompts(prompts, encoders)


@pytest.fixture(
    scope="module",
    params=[
        ("pixart", "PixArtAlphaPipeline"),
        ("pixart", "PixArtSigmaPipeline"),
        ("z_image", "ZImagePipeline"),
        ("sana", "SanaSprintPipeline"),
    ],
    ids=lambda param: param[1],
)
def run(request: pytest.FixtureRequest) -> Run:
    """Two prompts through three steps."""
    family, pipeline_class = request.param
    pipeline = build_pipeline(family, pipeline_class)
    _, steps = run_stock(pipeline, family, list(PROMPTS), num_inference_steps=3, output_type="latent")
    with torch.no_grad():
        return Run(family, pipeline, steps, encoded(family, pipeline, list(PROMPTS)))


@torch.no_grad()
def test_every_model_output_equals_the_pipelines(run: Run) -> None:
    assert len(run.steps) == 3
    for step in run.steps:
        torch.testing.assert_close(run.predict(step, run.prompt), step.model_output, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prompts_in_company_give_what_each_gives_alone(run: Run) -> None:
    together = run.predict(run.steps[1], run.prompt)
    for n, prompt in enumerate(PROMPTS):
        alone = run.predict(run.steps[1], encoded(run.family, run.pipeline, [prompt]), slice(n, n + 1))
        torch.testing.assert_close(alone, together[n : n + 1], rtol=1e-5, atol=1e-5)


def test_conditioning_equals_what_the_pipeline_gives_its_transformer(run: Run) -> None:
    arguments, ours = run.steps[0].arguments, run.prompt
    assert ours.attention_mask is not None
    if run.family == "z_image":
        for n, stock in enumerate(arguments["cap_feats"]):
            length = len(stock)
            torch.testing.assert_close(ours.prompt_embeds[n, :length], stock, rtol=1e-5, atol=1e-5)
            assert ours.attention_mask[n].tolist() == [1] * length + [0] * (512 - length)
            assert not ours.prompt_embeds[n, length:].any()
        assert ours.attention_mask.sum(dim=1).tolist() == [len(chat_of(PROMPTS[0])), 512]
        return
    torch.testing.assert_close(ours.prompt_embeds, arguments["encoder_hidden_states"], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.attention_mask, arguments["encoder_attention_mask"])
    tokens = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300, "SanaSprintPipeline": 300}
    assert ours.attention_mask.shape == (2, tokens[type(run.pipeline).__name__])
    assert not ours.attention_mask[0].all() and ours.attention_mask[1].all()
    if run.family == "sana":
        assert ours.guidance is not None and ours.guidance.tolist() == [4.5, 4.5]
        torch.testing.assert_close(ours.guidance * 0.1, arguments["guidance"])


def chat_of(prompt: str) -> list[str]:
    """Return the tokens of a prompt in Qwen3's chat template: markers are one token, and the rest one per byte."""
    return ["<|im_start|>", *f"user\n{prompt}", "<|im_end|>", "\n", "<|im_start|>", *"assistant\n"]


@pytest.mark.parametrize("family", ["z_image", "sana"])
@torch.no_grad()
def test_pixels_equal_the_pipelines(family: str) -> None:
    pipeline = build_pipeline(family)
    if family == "z_image":
        pipeline.vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)  # of its published VAE
    latents, pictures = (
        run_stock(
            pipeline,
            family,
            ["a red fox"],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(1),
            output_type=kind,
        )[0]
        for kind in ("latent", "pt")
    )
    pixels = decoder_for(pipeline.vae)(latents)
    assert pixels.shape == (1, 64, 96, 3) and pixels.float().std() > 1
    assert (pixels.movedim(-1, 1) / 255 - pictures).abs().max() <= 0.5 / 255 + 1e-6


@torch.no_grad()
def test_one_step_of_sana_is_the_pipelines_picture() -> None:
    """x_0 = cos(t) x - sin(t) F, in units of sigma_data."""
    pipeline = build_pipeline("sana")
    latents, (step,) = run_stock(pipeline, "sana", ["a red fox"], num_inference_steps=1, output_type="latent")
    sana = Run("sana", pipeline, [step], encoded("sana", pipeline, ["a red fox"]))
    angle = step.timestep
    denoised = angle.cos() * step.sample - angle.sin() * sana.predict(step, sana.prompt)
    torch.testing.assert_close(denoised / sana.unit, latents, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sana_encodes_pixels_to_what_its_decoder_takes() -> None:
    vae, family = dc_vae(), FAMILIES["sana"]
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = family.encode_pixels(vae, pixels)
    assert latents.shape == (2, 4, 4, 6)
    expected = vae(pixels).sample.clamp(-1, 1)
    assert (decoder_for(vae)(latents).movedim(-1, 1) / 127.5 - 1 - expected).abs().max() <= 0.5 / 127.5 + 1e-5


def test_the_published_vae_of_sana_compresses_32_times() -> None:
    family = FAMILIES["sana"]
    vae = {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]}
    geometry = family.geometry({"in_channels": 32, "patch_size": 1}, vae)
    assert geometry.latent_shape(1024, 512) == (32, 16, 32)
    with pytest.raises(CheckpointError, match="lacks encoder_block_out_channels"):
        family.spatial_compression({"block_out_channels": [4] * 4})


def test_z_image_takes_sizes_of_whole_tokens() -> None:
    geometry = FAMILIES["z_image"].geometry({"in_channels": 16}, {"block_out_channels": [128, 256, 512, 512]})
    assert geometry.latent_shape(1024, 512) == (16, 64, 128)
    with pytest.raises(ValueError, match="z_image takes multiples of 16"):
        geometry.latent_shape(1024, 520)


def test_a_sana_that_reads_no_guidance_is_refused() -> None:
    with pytest.raises(CheckpointError, match="guidance_embeds false; use a checkpoint of SANA-Sprint"):
        denoiser_for(tiny_sana(guidance_embeds=False))
