"""Each adapter calls its model as the stock pipeline does, and the input for K leaves the teacher unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXPipeline,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import FAMILIES, Conditioning, Denoiser, denoiser_for
from tdm_runtime.families.step_condition import embed_step_count
from tests.tiny_models import (
    STOCK_CALLS,
    TINY_MODELS,
    TINY_SHAPES,
    tiny_cogvideox,
    tiny_conditioning,
    tiny_pixart,
    tiny_sd3,
    tiny_sdxl_unet,
    tiny_unet,
)

TIMESTEPS = torch.tensor([999.0, 500.0, 20.0])
STEP_COUNTS = torch.tensor([1, 2, 4])


def draw_latents(family: str) -> Tensor:
    return torch.randn(3, *TINY_SHAPES[family], generator=torch.Generator().manual_seed(1))


def conditioned(family: str, scale: float = 0.3) -> Denoiser:
    """A denoiser whose output depends on K."""
    denoiser = denoiser_for(TINY_MODELS[family]())
    denoiser.add_step_condition(16)
    generator = torch.Generator().manual_seed(2)
    nn.init.normal_(denoiser.timestep_embedding.cond_proj.weight, std=scale, generator=generator)
    return denoiser


def call(denoiser: Denoiser, family: str, step_counts: Tensor | None, index: slice = slice(None)) -> Tensor:
    prompt = tiny_conditioning(family, 3)[index]
    counts = None if step_counts is None else step_counts[index]
    output: Tensor = denoiser(draw_latents(family)[index], TIMESTEPS[index], counts, *prompt.tensors())
    return output


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_k_the_output_equals_the_bare_models(family: str) -> None:
    model = TINY_MODELS[family]()
    assert sum(p.numel() for p in model.parameters()) < 300_000
    expected = STOCK_CALLS[family](model, draw_latents(family), TIMESTEPS, tiny_conditioning(family, 3))
    denoiser = denoiser_for(model)
    assert denoiser.condition_dim is None and denoiser.step_condition_state() == {}
    output = call(denoiser, family, None)
    assert output.shape == (3, *TINY_SHAPES[family])
    assert torch.equal(output, expected)
    assert torch.equal(call(denoiser, family, STEP_COUNTS), expected), "K is unread without an input for it"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_fresh_input_for_k_changes_no_output(family: str) -> None:
    denoiser = denoiser_for(TINY_MODELS[family]())
    expected = call(denoiser, family, None)
    denoiser.add_step_condition(16)
    assert denoiser.condition_dim == 16
    for step_counts in (None, STEP_COUNTS, torch.tensor([8, 8, 8])):
        assert torch.equal(call(denoiser, family, step_counts), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_k_changes_each_sample_of_a_mixed_batch_and_never_the_teacher(family: str) -> None:
    teacher = call(denoiser_for(TINY_MODELS[family]()), family, None)
    denoiser = conditioned(family)
    mixed = call(denoiser, family, STEP_COUNTS)
    for n in range(3):
        alone = call(denoiser, family, STEP_COUNTS, slice(n, n + 1))
        torch.testing.assert_close(mixed[n : n + 1], alone, rtol=1e-5, atol=1e-5)
        assert (mixed[n] - teacher[n]).abs().max() > 1e-3
    others = call(denoiser, family, torch.tensor([1, 3, 4]))
    assert torch.equal(others[0], mixed[0]) and torch.equal(others[2], mixed[2])
    assert (others[1] - mixed[1]).abs().max() > 1e-3
    assert torch.equal(call(denoiser, family, None), teacher)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_sample_has_its_own_timestep(family: str) -> None:
    denoiser = conditioned(family)
    x, prompt = draw_latents(family), tiny_conditioning(family, 3)
    mixed = denoiser(x, TIMESTEPS, STEP_COUNTS, *prompt.tensors())
    for n, timestep in enumerate(TIMESTEPS):
        same = denoiser(x, timestep.expand(3), STEP_COUNTS, *prompt.tensors())
        torch.testing.assert_close(mixed[n], same[n], rtol=1e-5, atol=1e-5)
    assert (mixed[1] - same[1]).abs().max() > 1e-3
    whole = denoiser(x, TIMESTEPS.long(), STEP_COUNTS, *prompt.tensors())
    assert torch.equal(whole, mixed)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_input_for_k_with_and_without_checkpointing(family: str) -> None:
    gradients = []
    for is_checkpointed in (False, True):
        denoiser = conditioned(family).train()
        if is_checkpointed:
            denoiser.model.enable_gradient_checkpointing()
        output = call(denoiser, family, STEP_COUNTS)
        teacher = call(denoiser, family, None)  # between forward and backward, as in training
        (output - teacher.detach()).square().mean().backward()
        gradients.append({name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)
    assert plain[f"model.{denoiser.timestep_embedding_name}.cond_proj.weight"].abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_k_is_cleared_after_an_error(family: str) -> None:
    denoiser = conditioned(family)
    teacher = call(denoiser, family, None)

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise RuntimeError("a fault")

    hook = denoiser.timestep_embedding.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a fault"):
        call(denoiser, family, STEP_COUNTS)
    hook.remove()
    assert torch.equal(call(denoiser, family, None), teacher)
    assert torch.equal(call(denoiser_for(denoiser.model), family, None), teacher)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_copy_has_its_own_k(family: str) -> None:
    denoiser = conditioned(family)
    twin = copy.deepcopy(denoiser)
    assert torch.equal(call(twin, family, STEP_COUNTS), call(denoiser, family, STEP_COUNTS))
    twin.timestep_embedding.cond_proj.weight.zero_()
    assert torch.equal(call(twin, family, STEP_COUNTS), call(denoiser, family, None))
    assert not torch.equal(call(denoiser, family, STEP_COUNTS), call(denoiser, family, None))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_weights_that_read_k_are_saved_and_loaded(family: str, tmp_path: Path) -> None:
    denoiser = conditioned(family)
    save_file(denoiser.step_condition_state(), tmp_path / "step_condition.safetensors")
    fresh = denoiser_for(TINY_MODELS[family]())
    fresh.load_step_condition(load_file(tmp_path / "step_condition.safetensors"))
    assert fresh.condition_dim == 16
    assert torch.equal(call(fresh, family, STEP_COUNTS), call(denoiser, family, STEP_COUNTS))


@pytest.mark.parametrize("build", [tiny_unet, tiny_sdxl_unet])
@torch.no_grad()
def test_a_unets_own_save_pretrained_keeps_the_input_for_k(
    build: Callable[..., UNet2DConditionModel], tmp_path: Path
) -> None:
    family = "stable_diffusion" if build is tiny_unet else "sdxl"
    denoiser = conditioned(family)
    denoiser.model.save_pretrained(tmp_path)
    loaded = denoiser_for(UNet2DConditionModel.from_pretrained(tmp_path).eval())
    assert loaded.condition_dim == 16
    assert torch.equal(call(loaded, family, STEP_COUNTS), call(denoiser, family, STEP_COUNTS))


def test_an_existing_input_for_k_is_kept() -> None:
    denoiser = denoiser_for(tiny_unet(time_cond_proj_dim=8))
    before = denoiser.timestep_embedding.cond_proj
    denoiser.add_step_condition(32)
    assert denoiser.timestep_embedding.cond_proj is before
    assert denoiser.condition_dim == denoiser.model.config.time_cond_proj_dim == 8


@torch.no_grad()
def test_pixart_adds_the_projected_k_to_the_timesteps_sinusoid() -> None:
    """The reference adds K to the sinusoid by a hook of its own."""
    denoiser = conditioned("pixart")
    embedding = denoiser.timestep_embedding
    shift = embedding.cond_proj(embed_step_count(STEP_COUNTS, 16))
    expected_model = tiny_pixart()
    inner = expected_model.adaln_single.emb
    inner.time_proj.register_forward_hook(lambda module, args, output: output + shift)
    expected = call(denoiser_for(expected_model), "pixart", None)
    torch.testing.assert_close(call(denoiser, "pixart", STEP_COUNTS), expected)


@pytest.mark.parametrize("sides", [(8, 8), (6, 10)])
@torch.no_grad()
def test_pixart_of_1024_pixels_reads_the_size_of_the_picture(sides: tuple[int, int]) -> None:
    model: PixArtTransformer2DModel = tiny_pixart(use_additional_conditions=True)
    height, width = sides
    x, prompt = torch.randn(3, 4, height, width), tiny_conditioning("pixart", 3)
    sizes = {
        "resolution": torch.tensor([8.0 * height, 8.0 * width]).repeat(3, 1),
        "aspect_ratio": torch.tensor([height / width]).repeat(3, 1),
    }
    expected = model(x, prompt.prompt_embeds, TIMESTEPS, sizes, encoder_attention_mask=prompt.attention_mask).sample
    output = denoiser_for(model)(x, TIMESTEPS, None, *prompt.tensors())
    assert torch.equal(output, expected[:, :4])


@torch.no_grad()
def test_pixart_ignores_the_padding_of_a_prompt() -> None:
    denoiser, x = denoiser_for(tiny_pixart()), draw_latents("pixart")
    prompt = tiny_conditioning("pixart", 3)
    assert prompt.attention_mask is not None
    noisy = prompt.prompt_embeds + (1 - prompt.attention_mask)[:, :, None] * 5.0
    first = denoiser(x, TIMESTEPS, None, *prompt.tensors())
    second = denoiser(x, TIMESTEPS, None, noisy, None, prompt.attention_mask)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("changes", [{}, {"patch_size_t": 2, "patch_bias": False}])
@pytest.mark.parametrize("sides", [(8, 8), (6, 10)])
@torch.no_grad()
def test_rotary_embeddings_of_cogvideox_equal_its_pipelines(sides: tuple[int, int], changes: dict[str, Any]) -> None:
    # the slice of CogVideoX 1.5 is cut out of the grid it was trained on
    model = tiny_cogvideox(use_rotary_positional_embeddings=True, sample_width=12, sample_height=12, **changes)
    pipeline = CogVideoXPipeline(None, None, None, model, None)
    height, width = sides
    x, prompt = torch.randn(3, 4, 4, height, width), tiny_conditioning("cogvideox", 3)
    rotary = pipeline._prepare_rotary_positional_embeddings(8 * height, 8 * width, 4, torch.device("cpu"))
    frames_first = x.transpose(1, 2).contiguous()
    expected = model(frames_first, prompt.prompt_embeds, TIMESTEPS, image_rotary_emb=rotary).sample
    output = denoiser_for(model)(x, TIMESTEPS, None, *prompt.tensors())
    assert torch.equal(output, expected.transpose(1, 2))


@pytest.mark.parametrize("family", [pytest.param("pixart", marks=pytest.mark.slow), "stable_diffusion"])
@torch.no_grad()
def test_a_compiled_denoiser_reads_every_k(family: str) -> None:
    denoiser = conditioned(family)
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    for step_counts in (STEP_COUNTS, None, torch.tensor([4, 4, 2])):
        prompt = tiny_conditioning(family, 3)
        output = compiled(draw_latents(family), TIMESTEPS, step_counts, *prompt.tensors())
        torch.testing.assert_close(output, call(denoiser, family, step_counts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_model_gets_the_adapter_of_its_family(family: str) -> None:
    assert type(denoiser_for(TINY_MODELS[family]())) is FAMILIES[family].adapter


@pytest.mark.parametrize("model", [lambda: tiny_unet(in_channels=9), lambda: tiny_cogvideox(in_channels=8)])
def test_a_model_that_reads_a_picture_is_refused(model: Callable[[], Any]) -> None:
    with pytest.raises(CheckpointError, match=r"channels and gives 4, allowed are [98]; use a text-to-image"):
        denoiser_for(model())


@pytest.mark.parametrize("dim", [0, 2, 7])
def test_a_width_that_cannot_hold_sines_and_cosines_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"dim is {dim}; "):
        denoiser_for(tiny_sd3()).add_step_condition(dim)


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("sdxl", "pooled_prompt_embeds"),
        ("sd3", "pooled_prompt_embeds"),
        ("z_image", "attention_mask"),
        ("sana", "guidance"),
    ],
)
def test_a_missing_field_of_the_conditioning_is_named_in_the_error(family: str, field: str) -> None:
    denoiser = denoiser_for(TINY_MODELS[family]())
    embeds = tiny_conditioning(family, 3).prompt_embeds
    with pytest.raises(ValueError, match=f"{field} is None"):
        denoiser(draw_latents(family), TIMESTEPS, None, embeds)


def test_a_step_condition_of_another_model_is_refused() -> None:
    denoiser = denoiser_for(tiny_pixart())
    with pytest.raises(CheckpointError, match="time_embedding"):
        denoiser.load_step_condition(conditioned("stable_diffusion").step_condition_state())
    with pytest.raises(CheckpointError, match=r"\[\]"):
        denoiser.load_step_condition({})
    name = "adaln_single.emb.timestep_embedder.cond_proj.weight"
    with pytest.raises(CheckpointError, match=r"has shape \(8, 16\), the model takes \(256, 16\)"):
        denoiser.load_step_condition({name: torch.zeros(8, 16)})
    denoiser.add_step_condition(8)
    with pytest.raises(CheckpointError, match=r"has shape \(256, 16\), the model takes \(256, 8\)"):
        denoiser.load_step_condition({name: torch.zeros(256, 16)})


def test_conditioning_is_indexed_joined_and_repeated() -> None:
    batch = tiny_conditioning("sdxl", 3)
    assert len(batch) == 3 and len(batch[torch.tensor([2])]) == 1
    again = Conditioning.cat(batch[:1], batch[torch.tensor([1, 2])]).to("cpu")
    for ours, theirs in zip(again.tensors(), batch.tensors(), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)  # type: ignore[arg-type]
    repeated = batch[1:2].expand(4)
    assert len(repeated) == 4 and repeated.time_ids is not None and repeated.time_ids.shape == (4, 6)
    assert torch.equal(repeated.prompt_embeds[3], batch.prompt_embeds[1])


def test_conditioning_refuses_to_join_or_expand_what_does_not_fit() -> None:
    sdxl, unet = tiny_conditioning("sdxl", 2), tiny_conditioning("stable_diffusion", 2)
    with pytest.raises(ValueError, match="pooled_prompt_embeds is given by the first conditioning only"):
        Conditioning.cat(sdxl, unet)
    with pytest.raises(ValueError, match="this one has 2 samples"):
        unet.expand(3)
