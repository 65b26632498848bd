"""The pretrained model that a student starts from, out of a diffusers pipeline folder.

The denoiser and what its scheduler says about noise are loaded here; prompts are encoded once,
beforehand, by the pipeline itself, so text encoders and denoiser are never in memory together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor

from tdm_runtime.errors import CheckpointError, RecipeError
from tdm_runtime.families import Conditioning, Denoiser, denoiser_for
from tdm_runtime.sampling.schedule import DiffusionSchedule, FlowSchedule, NoiseSchedule
from tdm_runtime.sampling.step_table import PREDICTION_TYPES, PredictionType

Family = Literal["sd", "sdxl", "pixart", "sd3", "cogvideox"]


@dataclass(frozen=True)
class _Layout:
    family: Family
    part: str
    """The folder of the denoiser."""
    denoiser_class: str
    former_class: str | None = None
    """What diffusers called it when the published folders were written."""


PIPELINES = {
    "StableDiffusionPipeline": _Layout("sd", "unet", "UNet2DConditionModel"),
    "StableDiffusionXLPipeline": _Layout("sdxl", "unet", "UNet2DConditionModel"),
    "PixArtAlphaPipeline": _Layout("pixart", "transformer", "PixArtTransformer2DModel", "Transformer2DModel"),
    "StableDiffusion3Pipeline": _Layout("sd3", "transformer", "SD3Transformer2DModel"),
    "CogVideoXPipeline": _Layout("cogvideox", "transformer", "CogVideoXTransformer3DModel"),
}
"""By the `_class_name` of model_index.json."""


@dataclass(frozen=True)
class BaseModel:
    """A teacher before it is one: the denoiser and the noise it was trained with."""

    family: Family
    denoiser: Denoiser
    """Float32, in eval mode, on the CPU."""
    noise_schedule: NoiseSchedule
    prediction_type: PredictionType
    spatial_downscale: int
    """Pixels per latent."""
    temporal_downscale: int = 1
    """Frames per latent frame, after the first frame, which has one for itself."""

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """Latents of one sample: [C, H, W], of CogVideoX [C, F, H, W].

        Raises:
            ValueError: the model has no whole number of tokens for that size.
        """
        token = self.spatial_downscale * self.denoiser.patch_size
        if width < token or height < token or width % token or height % token:
            raise ValueError(f"the size is {width}x{height} pixels; {self.family} takes multiples of {token}")
        side = (height // self.spatial_downscale, width // self.spatial_downscale)
        if self.family != "cogvideox":
            if frames != 1:
                raise ValueError(f"frames is {frames}; {self.family} makes pictures, of 1 frame")
            return (self.denoiser.latent_channels, *side)
        latent_frames = (frames - 1) // self.temporal_downscale + 1
        multiple = int(getattr(self.denoiser, "patch_size_t", 1))
        if frames < 1:
            raise ValueError(f"frames is {frames}; it must be at least 1")
        if missing := -latent_frames % multiple:
            raise ValueError(
                f"frames is {frames}, which are {latent_frames} latent frames, and the model takes multiples of "
                f"{multiple}; ask for {frames + missing * self.temporal_downscale}"
            )
        return (self.denoiser.latent_channels, latent_frames, *side)


def family_of(folder: Path) -> Family:
    """The family of a diffusers pipeline folder.

    Raises:
        CheckpointError: as `load_base_model`.
    """
    return _layout(folder).family


def load_base_model(folder: Path) -> BaseModel:
    """Load the denoiser of a diffusers pipeline folder and read its scheduler and VAE configs.

    Raises:
        CheckpointError: the folder is missing, damaged or of an unknown pipeline.
        RecipeError: its scheduler has a setting that training cannot follow.
    """
    layout = _layout(folder)
    noise_schedule, prediction_type = _read_noise_schedule(folder / "scheduler")
    vae = _read_json(folder / "vae" / "config.json")
    if not isinstance(vae.get("block_out_channels"), list):
        raise CheckpointError(f"{folder / 'vae' / 'config.json'} lacks block_out_channels; restore it from its source")
    denoiser = denoiser_for(load_denoiser_model(folder / layout.part, layout.denoiser_class))
    if vae.get("latent_channels", denoiser.latent_channels) != denoiser.latent_channels:
        raise CheckpointError(
            f"{folder}: the vae has {vae['latent_channels']} latent channels and the {layout.part} "
            f"{denoiser.latent_channels}; they are not of one model, restore the folder from its source"
        )
    return BaseModel(
        family=layout.family,
        denoiser=denoiser,
        noise_schedule=noise_schedule,
        prediction_type=prediction_type,
        spatial_downscale=2 ** (len(vae["block_out_channels"]) - 1),
        temporal_downscale=int(vae.get("temporal_compression_ratio", 4)) if layout.family == "cogvideox" else 1,
    )


def _layout(folder: Path) -> _Layout:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a diffusers pipeline folder, which has model_index.json")
    index = _read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        raise CheckpointError(f"{folder} holds a {name}; training knows {', '.join(PIPELINES)}: use a folder of those")
    layout = PIPELINES[name]
    if index.get(layout.part) not in (["diffusers", layout.denoiser_class], ["diffusers", layout.former_class]):
        raise CheckpointError(
            f"{folder / 'model_index.json'} says that {layout.part} is {index.get(layout.part)}; a {name} has a "
            f"{layout.denoiser_class}: restore the folder from its source"
        )
    return layout


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); restore the folder from its source") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds a {type(raw).__name__}, not an object; restore the folder from its source")
    return raw


def load_denoiser_model(folder: Path, class_name: str) -> Any:
    """Load weights that are all there and all used: diffusers would fill gaps with random numbers."""
    load = partial(getattr(diffusers, class_name).from_pretrained, use_safetensors=True, local_files_only=True)
    try:
        model, report = load(folder, output_loading_info=True)
    except Exception as error:  # diffusers raises many kinds; all mean the same to a user
        raise CheckpointError(
            f"{folder} cannot be loaded: {error}; it needs config.json and diffusion_pytorch_model.safetensors"
        ) from error
    if strangers := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe the weights beside it: {len(strangers)} tensors are missing "
            f"or left over ({strangers[0]}, ...); restore the folder from its source"
        )
    return model.float().eval()


def _read_noise_schedule(folder: Path) -> tuple[NoiseSchedule, PredictionType]:
    """Build our schedule from a diffusers scheduler, whose class fills in what its config leaves out."""
    file = folder / "scheduler_config.json"
    name = str(_read_json(file).get("_class_name"))
    scheduler_class = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if scheduler_class is None:
        raise RecipeError(f"{file} names the class {name}, which is no scheduler of diffusers; correct _class_name")
    try:
        scheduler = scheduler_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # diffusers raises many kinds; all mean the same to a user
        raise RecipeError(f"{file} is refused by {name} ({error}); correct it or use another base model") from error
    config = scheduler.config
    for setting in ("trained_betas", "use_dynamic_shifting", "shift_terminal", "invert_sigmas"):
        if config.get(setting):
            raise RecipeError(
                f"{file}: {setting} is {config[setting]!r}, which training cannot follow; remove it, "
                "if the model was trained without it, or use another base model"
            )
    try:
        return _flow_schedule(scheduler) or _diffusion_schedule(scheduler)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}; use a base model with a schedule that training knows") from None


def _flow_schedule(scheduler: Any) -> tuple[FlowSchedule, PredictionType] | None:
    config = scheduler.config
    if type(scheduler).__name__.startswith("FlowMatch"):
        shift = config.shift
    elif config.get("use_flow_sigmas"):
        shift = config.flow_shift
    else:
        return None
    return FlowSchedule(shift=shift, num_train_timesteps=config.num_train_timesteps), "flow_prediction"


def _diffusion_schedule(scheduler: Any) -> tuple[DiffusionSchedule, PredictionType]:
    config = scheduler.config
    if "beta_schedule" not in config or not hasattr(scheduler, "alphas_cumprod"):
        raise RecipeError(f"{type(scheduler).__name__} has no betas and no flow")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES or prediction_type == "flow_prediction":
        raise RecipeError(f"prediction_type is {prediction_type!r}; it must be epsilon, v_prediction or sample")
    is_rescaled = bool(config.get("rescale_betas_zero_snr", False))
    schedule = DiffusionSchedule(
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        num_train_timesteps=config.num_train_timesteps,
        rescale_zero_terminal_snr=is_rescaled,
        # Some keep a trace of signal at the last timestep after the rescale: as much as this one does.
        min_alpha_cumprod=float(scheduler.alphas_cumprod[-1]) if is_rescaled else 0.0,
        snr_shift_scale=config.get("snr_shift_scale", 1.0),
    )
    return schedule, prediction_type


def encode_prompts(
    folder: Path, prompts: Sequence[str], *, batch_size: int, width: int, height: int, device: str = "cpu"
) -> Iterator[Conditioning]:
    """Encode prompts as the pipeline of the folder encodes them, without guidance; "" is the negative prompt.

    An SDXL pipeline that says `force_zeros_for_empty_prompt` guides away from zeros, so "" becomes zeros there.

    Args:
        batch_size: prompts in one call of the text encoders.
        width, height: of the pictures, in pixels; SDXL is told.

    Yields:
        A `Conditioning` of at most `batch_size` prompts, in order, on `device`, float32.

    Raises:
        CheckpointError: at once, as `load_base_model`, or because a text encoder is missing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    layout = _layout(folder)
    encode = _ENCODERS[layout.family]
    encoder = _TextEncoders(
        pipeline=_load_text_pipeline(folder, layout, device),
        device=device,
        max_tokens=_read_json(folder / layout.part / "config.json").get("max_text_seq_length", 226),
        time_ids=torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=device),
    )

    def batches() -> Iterator[Conditioning]:
        for start in range(0, len(prompts), batch_size):
            with torch.no_grad():  # not inference_mode: its tensors could not enter a loss later
                encoded = encode(encoder, list(prompts[start : start + batch_size]))
            yield encoded

    return batches()


@dataclass(frozen=True)
class _TextEncoders:
    pipeline: Any
    device: str
    max_tokens: int
    """CogVideoX has a fixed number of text positions."""
    time_ids: Tensor
    """[1, 6], of SDXL."""


def _encode_sd(encoders: _TextEncoders, prompts: list[str]) -> Conditioning:
    embeds, _ = encoders.pipeline.encode_prompt(prompts, encoders.device, 1, do_classifier_free_guidance=False)
    return Conditioning(embeds)


def _encode_sdxl(encoders: _TextEncoders, prompts: list[str]) -> Conditioning:
    embeds, _, pooled, _ = encoders.pipeline.encode_prompt(
        prompts, device=encoders.device, do_classifier_free_guidance=False
    )
    if encoders.pipeline.config.force_zeros_for_empty_prompt:
        is_given = torch.tensor([prompt != "" for prompt in prompts], device=encoders.device)
        embeds, pooled = embeds * is_given[:, None, None], pooled * is_given[:, None]
    return Conditioning(embeds, pooled, time_ids=encoders.time_ids.repeat(len(prompts), 1))


def _encode_pixart(encoders: _TextEncoders, prompts: list[str]) -> Conditioning:
    embeds, mask, _, _ = encoders.pipeline.encode_prompt(
        prompts, device=encoders.device, do_classifier_free_guidance=False
    )
    return Conditioning(embeds, attention_mask=mask)


def _encode_sd3(encoders: _TextEncoders, prompts: list[str]) -> Conditioning:
    embeds, _, pooled, _ = encoders.pipeline.encode_prompt(
        prompts, None, None, device=encoders.device, do_classifier_free_guidance=False
    )
    return Conditioning(embeds, pooled)


def _encode_cogvideox(encoders: _TextEncoders, prompts: list[str]) -> Conditioning:
    embeds, _ = encoders.pipeline.encode_prompt(
        prompts,
        device=encoders.device,
        do_classifier_free_guidance=False,
        max_sequence_length=encoders.max_tokens,
    )
    return Conditioning(embeds)


_ENCODERS: Mapping[Family, Callable[[_TextEncoders, list[str]], Conditioning]] = {
    "sd": _encode_sd,
    "sdxl": _encode_sdxl,
    "pixart": _encode_pixart,
    "sd3": _encode_sd3,
    "cogvideox": _encode_cogvideox,
}


def _load_text_pipeline(folder: Path, layout: _Layout, device: str) -> Any:
    """Load the pipeline with nothing but its tokenizers and text encoders, float32."""
    index = _read_json(folder / "model_index.json")
    parts = {name for name, value in index.items() if isinstance(value, list)}
    unneeded = {name: None for name in parts if not name.startswith(("text_encoder", "tokenizer"))}
    if empty := sorted(name for name in parts - set(unneeded) if index[name][1] is None):
        raise CheckpointError(f"{folder} comes without {', '.join(empty)}; prompts need all text encoders: add them")
    switches = {"requires_safety_checker": False} if layout.family == "sd" else {}
    load = partial(getattr(diffusers, index["_class_name"]).from_pretrained, **switches, **unneeded)
    try:
        pipeline = load(folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True)
    except Exception as error:  # the libraries raise many kinds; all mean the same to a user
        raise CheckpointError(
            f"the text encoders of {folder} cannot be loaded: {error}; restore the folder from its source"
        ) from error
    return pipeline.to(device)
