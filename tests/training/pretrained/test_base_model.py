"""Base models load from real pipeline folders, with the noise schedule of diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tdm_runtime.errors import CheckpointError, RecipeError
from tdm_runtime.families import FAMILIES, Conditioning, denoiser_for
from tdm_runtime.sampling.schedule import DiffusionSchedule, FlowSchedule
from tests.tiny_models import TEXT_TOKENS, TINY_MODELS, tiny_cogvideox
from tests.tiny_pipelines import SCHEDULERS, build_vae, stock_embeds
from tests.training.tiny_runs import NOISE
from training.pretrained.base_model import encode_prompts, load_base_model

PROMPTS = ["a red fox", "", "two cats on a green hill at night"]


@pytest.fixture
def sd_copy(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a folder whose JSON files may be changed."""
    source = folders("stable_diffusion")
    for file in source.rglob("*"):
        target = tmp_path / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            target.write_bytes(file.read_bytes())
        elif file.is_file():
            target.symlink_to(file)
    return tmp_path


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", NOISE)
def test_the_denoiser_has_the_folders_weights(folders: Callable[[str], Path], family: str) -> None:
    base = load_base_model(folders(family))
    expected = TINY_MODELS[family]().state_dict()
    assert base.family == FAMILIES[family] and not base.denoiser.training
    loaded = base.denoiser.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert base.geometry.spatial_compression == {"flux2": 16}.get(family, 8)
    assert base.geometry.temporal_compression == (4 if family == "cogvideox" else None)


@pytest.mark.parametrize("family", NOISE)
def test_the_noise_schedule_equals_the_folders_scheduler(folders: Callable[[str], Path], family: str) -> None:
    base = load_base_model(folders(family))
    theirs = type(SCHEDULERS[family]()).from_pretrained(folders(family) / "scheduler")
    if isinstance(base.noise_schedule, FlowSchedule):
        ours = base.noise_schedule.shifted(np.arange(1000, 0, -1) / 1000)
        np.testing.assert_allclose(ours, theirs.sigmas.double().numpy(), atol=2e-7)
        assert base.prediction_type == "flow_prediction"
        return
    np.testing.assert_allclose(
        base.noise_schedule.alphas_cumprod, theirs.alphas_cumprod.double().numpy(), rtol=6e-5, atol=1e-8
    )
    assert base.prediction_type == theirs.config.prediction_type


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_encoded_as_the_pipeline_encodes_them_and_fit_the_denoiser(
    folders: Callable[[str], Path], family: str
) -> None:
    batches = list(encode_prompts(folders(family), PROMPTS, batch_size=2, width=64, height=128))
    assert [len(batch) for batch in batches] == [2, 1]
    lengths = {"pixart": 120, "sd3": 12 + 256, "flux": 256, "flux2": 512, "z_image": 512, "sana": 300}
    if family in lengths:  # their pipelines pad to fixed lengths
        assert batches[0].prompt_embeds.shape[1] == lengths[family]
    everything = Conditioning.cat(*batches)
    expected = stock_embeds(family, PROMPTS)
    torch.testing.assert_close(everything.prompt_embeds, expected, rtol=1e-5, atol=1e-5)
    denoiser = denoiser_for(TINY_MODELS[family]())
    read = [spec.name for spec in denoiser.interface(TEXT_TOKENS).inputs]
    given = {field.name for field in fields(Conditioning) if getattr(everything, field.name) is not None}
    assert given == {field.name for field in fields(Conditioning) if field.name in read}
    if family == "sdxl":
        assert everything.time_ids is not None
        assert everything.time_ids.tolist() == [[128.0, 64.0, 0.0, 0.0, 128.0, 64.0]] * 3
        assert not everything.prompt_embeds[1].any() and everything.prompt_embeds[2].any()
    assert not any(t is not None and (t.requires_grad or t.is_inference()) for t in everything.tensors())
    geometry = FAMILIES[family].geometry(denoiser.model.config, build_vae(family).config)
    x = torch.zeros(3, *geometry.latent_shape(64, 128, frames=9 if FAMILIES[family].makes_clips else 1))
    with torch.no_grad():
        assert denoiser(x, torch.tensor([999.0, 500.0, 1.0]), None, *everything.tensors()).shape == x.shape


def test_latent_shapes_of_pictures_and_clips(folders: Callable[[str], Path]) -> None:
    assert load_base_model(folders("stable_diffusion")).geometry.latent_shape(64, 48) == (4, 6, 8)
    video = load_base_model(folders("cogvideox"))
    shapes = [video.geometry.latent_shape(64, 48, frames) for frames in (1, 9, 17, 49)]
    assert shapes == [(4, count, 6, 8) for count in (1, 3, 5, 13)]


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("stable_diffusion", (60, 64), "60x64 pixels; stable_diffusion takes multiples of 8"),
        ("pixart", (64, 72), "64x72 pixels; pixart takes multiples of 16"),
        ("stable_diffusion", (0, 64), "multiples of 8"),
        ("stable_diffusion", (64, 64, 5), "frames is 5; stable_diffusion makes pictures"),
        ("cogvideox", (64, 64, 0), "frames is 0; it must be at least 1"),
        ("cogvideox", (64, 64, 12), r"frames is 12; cogvideox makes 1 \+ 8 k frames: ask for 9 or 17"),
    ],
)
def test_a_size_without_whole_tokens_is_refused(
    folders: Callable[[str], Path], family: str, size: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_base_model(folders(family)).geometry.latent_shape(*size)


def test_cogvideox_1_5_names_the_next_allowed_number_of_frames() -> None:
    model = tiny_cogvideox(patch_size_t=2, patch_bias=False, use_rotary_positional_embeddings=True)
    geometry = FAMILIES["cogvideox"].geometry(model.config, {"block_out_channels": [4] * 4})
    assert geometry.latent_shape(64, 64, 5) == (4, 2, 8, 8)
    with pytest.raises(
        ValueError, match="9, which are 3 latent frames, and the model takes multiples of 2; ask for 13"
    ):
        geometry.latent_shape(64, 64, 9)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=500),
        diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.0),
    ],
)
def test_settings_of_diffusion_schedulers_are_followed(sd_copy: Path, scheduler: Any) -> None:
    scheduler.save_pretrained(sd_copy / "scheduler")
    schedule = load_base_model(sd_copy).noise_schedule
    assert isinstance(schedule, DiffusionSchedule)
    theirs = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs, rtol=2e-4, atol=6e-8)
    assert schedule.alphas_cumprod[-1] == pytest.approx(theirs[-1], rel=2e-4), "the trace of signal at the end"


def test_flow_sigmas_of_a_dpm_solver_are_followed(sd_copy: Path) -> None:
    flow = {"use_flow_sigmas": True, "flow_shift": 6.0, "prediction_type": "flow_prediction"}
    diffusers.DPMSolverMultistepScheduler(**flow).save_pretrained(sd_copy / "scheduler")
    base = load_base_model(sd_copy)
    assert base.noise_schedule == FlowSchedule(shift=6.0) and base.prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    ("scheduler", "changes", "message"),
    [
        ("PNDMScheduler", {"trained_betas": [0.1, 0.2]}, r"trained_betas is \[0.1, 0.2\]"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting is true, but"),
        ("UniPCMultistepScheduler", {"use_dynamic_shifting": True, "use_flow_sigmas": True}, "training follows for Fl"),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; it must be one of linear"),
        ("DDPMScheduler", {"beta_schedule": "square"}, "is refused by DDPMScheduler"),
        ("PNDMScheduler", {"prediction_type": "noise"}, "prediction_type is 'noise'; it must be epsilon"),
        ("EDMEulerScheduler", {}, "EDMEulerScheduler has no betas and no flow"),
        ("KarrasFooScheduler", {}, "KarrasFooScheduler, which is no scheduler of diffusers"),
        ("AutoencoderKL", {}, "AutoencoderKL, which is no scheduler of diffusers"),
    ],
)
def test_a_scheduler_that_training_cannot_follow_is_refused(
    sd_copy: Path, scheduler: str, changes: dict[str, Any], message: str
) -> None:
    file = sd_copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": scheduler, **changes}))
    with pytest.raises(RecipeError, match=message) as caught:
        load_base_model(sd_copy)
    assert str(file) in str(caught.value)


def test_sana_is_refused_as_a_teacher(folders: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError, match="SCMScheduler has no betas and no flow; use a base model"):
        load_base_model(folders("sana"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    for read in (load_base_model, lambda folder: encode_prompts(folder, [""], batch_size=1, width=8, height=8)):
        with pytest.raises(CheckpointError, match=f"{tmp_path / 'absent'} is not a folder; give a diffusers pipeline"):
            read(tmp_path / "absent")
        with pytest.raises(CheckpointError, match=r"lacks model_index.json; restore"):
            read(tmp_path)


def test_an_unknown_pipeline_is_refused_by_name(sd_copy: Path) -> None:
    change_json(sd_copy / "model_index.json", _class_name="AllegroPipeline")
    with pytest.raises(CheckpointError, match="holds a AllegroPipeline; this version knows StableDiffusionPipeline, "):
        load_base_model(sd_copy)


def test_a_denoiser_class_of_another_pipeline_is_refused(sd_copy: Path) -> None:
    change_json(sd_copy / "model_index.json", unet=["diffusers", "UNet3DConditionModel"])
    with pytest.raises(CheckpointError, match="a StableDiffusionPipeline has a UNet2DConditionModel"):
        load_base_model(sd_copy)


def test_pixart_folders_that_name_the_former_class_are_read(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "pixart"
    shutil.copytree(folders("pixart"), folder)
    change_json(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    change_json(folder / "transformer" / "config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    model = load_base_model(folder).denoiser.model
    assert type(model) is diffusers.PixArtTransformer2DModel
    assert len(list(encode_prompts(folder, ["a"], batch_size=1, width=64, height=64))) == 1


def test_a_vae_config_without_block_out_channels_is_refused(sd_copy: Path) -> None:
    change_json(sd_copy / "vae" / "config.json", block_out_channels=None)
    with pytest.raises(CheckpointError, match="lacks block_out_channels"):
        load_base_model(sd_copy)


def test_weights_with_missing_tensors_are_refused(sd_copy: Path) -> None:
    change_json(sd_copy / "unet" / "config.json", time_cond_proj_dim=16)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing or left over \(time_embedding.cond_proj.weight"):
        load_base_model(sd_copy)


def test_a_folder_without_weights_is_refused(sd_copy: Path) -> None:
    (sd_copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"it needs config\.json and diffusion_pytorch_model"):
        load_base_model(sd_copy)


def test_a_vae_of_another_model_is_refused(sd_copy: Path) -> None:
    change_json(sd_copy / "vae" / "config.json", latent_channels=16)
    with pytest.raises(CheckpointError, match="the vae has 16 latent channels and the unet 4"):
        load_base_model(sd_copy)


def test_a_missing_text_encoder_is_named(sd_copy: Path) -> None:
    change_json(sd_copy / "model_index.json", text_encoder=[None, None])
    with pytest.raises(CheckpointError, match="comes without text_encoder"):
        encode_prompts(sd_copy, ["a"], batch_size=1, width=64, height=64)
    with pytest.raises(ValueError, match="batch_size is 0"):
        encode_prompts(sd_copy, ["a"], batch_size=0, width=64, height=64)
