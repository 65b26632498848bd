"""Pipelines of the real classes at a tiny size: denoiser, text encoders, tokenizers, VAE, scheduler."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLFlux2, AutoencoderKLWan
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tdm_runtime.families import FAMILIES
from tests.tiny_models import FLUX2_HIDDEN_DIM, POOLED_DIM, TEXT_DIM, TEXT_TOKENS, TINY_MODELS

SCHEDULERS: Mapping[str, Callable[[], Any]] = {
    "stable_diffusion": lambda: diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ),
    "sdxl": lambda: diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    ),
    "pixart": lambda: diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    "sd3": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flux": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
    "flux2": lambda: diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, time_shift_type="exponential"
    ),
    "cogvideox": lambda: diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "z_image": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "sana": diffusers.SCMScheduler,
    "wan": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "animatediff": lambda: diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", timestep_spacing="trailing"
    ),
}


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer with one token per letter."""
    specials = ["<|startoftext|>", "<|endoftext|>"]
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    vocabulary = {token: number for number, token in enumerate(specials + letters)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)


def clip_model(model_class: Any, width: int, projection_dim: int = POOLED_DIM) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=projection_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return model_class(config).eval()


def t5_parts(config_class: Any = T5Config, model_class: Any = T5EncoderModel) -> tuple[T5Tokenizer, Any]:
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    tokenizer = T5Tokenizer(vocab=specials + [(letter, -3.0) for letter in string.ascii_lowercase], extra_ids=0)
    config = config_class(vocab_size=64, d_model=TEXT_DIM, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    torch.manual_seed(0)
    return tokenizer, model_class(config).eval()


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
"""What Qwen3's template does with one message of a user."""


def qwen3_parts(hidden_size: int, layers: int, model_class: Any = Qwen3ForCausalLM) -> tuple[Qwen2Tokenizer, Any]:
    """Return a tokenizer with one token per byte, and a language model."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(letters + specials)},
        merges=[],
        additional_special_tokens=specials[1:],
        chat_template=CHAT_TEMPLATE,
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return tokenizer, model_class(config).eval()


def one_clip() -> dict[str, Any]:
    parts = {"tokenizer": clip_tokenizer(), "text_encoder": clip_model(CLIPTextModel, TEXT_DIM)}
    return {**parts, "safety_checker": None, "feature_extractor": None}


def two_clips() -> dict[str, Any]:
    first, second = clip_model(CLIPTextModel, 8), clip_model(CLIPTextModelWithProjection, 8)
    tokenizer = clip_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": first, "tokenizer_2": tokenizer, "text_encoder_2": second}


def one_t5() -> dict[str, Any]:
    tokenizer, encoder = t5_parts()
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def one_umt5() -> dict[str, Any]:
    tokenizer, encoder = t5_parts(UMT5Config, UMT5EncoderModel)
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def a_clip_and_no_adapter() -> dict[str, Any]:
    parts = {"tokenizer": clip_tokenizer(), "text_encoder": clip_model(CLIPTextModel, TEXT_DIM)}
    return {**parts, "motion_adapter": None}


def two_clips_and_a_t5() -> dict[str, Any]:
    tokenizer, encoder = t5_parts()
    clips = {f"text_encoder{n}": clip_model(CLIPTextModelWithProjection, 8, POOLED_DIM // 2) for n in ("", "_2")}
    tokenizers = {f"tokenizer{n}": clip_tokenizer() for n in ("", "_2")}
    return {**clips, **tokenizers, "text_encoder_3": encoder, "tokenizer_3": tokenizer}


def a_clip_and_a_t5() -> dict[str, Any]:
    tokenizer, encoder = t5_parts()
    clip = {"tokenizer": clip_tokenizer(), "text_encoder": clip_model(CLIPTextModel, POOLED_DIM)}
    return {**clip, "tokenizer_2": tokenizer, "text_encoder_2": encoder}


def one_qwen3() -> dict[str, Any]:
    tokenizer, encoder = qwen3_parts(FLUX2_HIDDEN_DIM, layers=28)  # hidden state 27 is read, before the last norm
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def z_image_text() -> dict[str, Any]:
    tokenizer, encoder = qwen3_parts(TEXT_DIM, layers=2, model_class=Qwen3Model)
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def one_gemma2() -> dict[str, Any]:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    characters = ["\u2581", *string.ascii_letters, *string.punctuation]
    tokenizer = GemmaTokenizer(
        vocab={token: number for number, token in enumerate(specials + characters)}, add_bos_token=True
    )
    config = Gemma2Config(**_CAUSAL, vocab_size=len(tokenizer), query_pre_attn_scalar=8)
    torch.manual_seed(0)
    return {"tokenizer": tokenizer, "text_encoder": Gemma2Model(config).eval()}


_CAUSAL: Mapping[str, Any] = {
    "hidden_size": TEXT_DIM,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


TEXT_PARTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "stable_diffusion": one_clip,
    "sdxl": two_clips,
    "pixart": one_t5,
    "sd3": two_clips_and_a_t5,
    "flux": a_clip_and_a_t5,
    "flux2": one_qwen3,
    "cogvideox": one_t5,
    "z_image": z_image_text,
    "sana": one_gemma2,
    "wan": one_umt5,
    "animatediff": a_clip_and_no_adapter,
}
"""Family -> what its pipeline takes beside denoiser, VAE and scheduler, by folder."""


def kl_vae(latent_channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=latent_channels,
    )


def cogvideox_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )


def wan_vae(**changes: Any) -> AutoencoderKLWan:
    config: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    config |= {"latents_mean": [-0.7, 0.1, 0.9, 0.0], "latents_std": [2.8, 1.4, 0.7, 1.9]}
    torch.manual_seed(0)
    return AutoencoderKLWan(**config | changes)


def flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=4)
    draw = torch.Generator().manual_seed(0)
    vae.bn.running_mean.normal_(generator=draw)
    vae.bn.running_var.uniform_(0.5, 2.0, generator=draw)
    return vae


def dc_vae() -> AutoencoderDC:
    blocks = {"block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"), "block_out_channels": (8,) * 4}
    blocks |= {"layers_per_block": (1,) * 4, "qkv_multiscales": ((), (), (), (5,))}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()}
    return AutoencoderDC(**sides, latent_channels=4, attention_head_dim=4, scaling_factor=0.41407)


VAES: Mapping[str, Callable[[], Any]] = {
    "AutoencoderKL": kl_vae,
    "AutoencoderKLCogVideoX": cogvideox_vae,
    "AutoencoderKLFlux2": flux2_vae,
    "AutoencoderDC": dc_vae,
    "AutoencoderKLWan": wan_vae,
}
"""Class in diffusers -> a tiny VAE."""


def build_vae(family: str) -> Any:
    return VAES[FAMILIES[family].vae_classes[0]]()


def build_pipeline(name: str, pipeline: str | None = None, **changes: Any) -> Any:
    """Return a stock pipeline of a family, whole; by default the first that it opens.

    Args:
        changes: of the denoiser's config.
    """
    family = FAMILIES[name]
    return getattr(diffusers, pipeline or family.pipelines[0])(
        **{family.denoiser_folder: TINY_MODELS[name](**changes)},
        **TEXT_PARTS[name](),
        **family.pipeline_options,
        vae=build_vae(name),
        scheduler=SCHEDULERS[name](),
    )


STOCK_RUNS: Mapping[str, Mapping[str, Any]] = {
    "pixart": {"guidance_scale": 1.0, "use_resolution_binning": False},
    "z_image": {"guidance_scale": 0.0},
    "sana": {"intermediate_timesteps": None, "use_resolution_binning": False},
}
"""Family -> arguments with which its pipeline runs without guidance, at small sizes and any number of steps."""


@dataclass(frozen=True)
class StockStep:
    """One step of a stock pipeline."""

    arguments: Mapping[str, Any]
    """Arguments of the transformer, by name."""
    sample: Tensor
    """Latents before the step, as the scheduler receives them."""
    timestep: Tensor
    model_output: Tensor
    """Output of the transformer, as the scheduler receives it."""


def run_stock(pipeline: Any, family: str, prompts: list[str], **arguments: Any) -> tuple[Any, list[StockStep]]:
    """Run a stock pipeline at 96x64 pixels. Return its pictures and its steps."""
    calls: list[Mapping[str, Any]] = []
    steps: list[StockStep] = []
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    signature, step = inspect.signature(type(transformer).forward), scheduler.step

    def record_call(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(signature.bind(module, *args, **kwargs).arguments)

    @wraps(step)  # pipelines read its signature
    def record_step(model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append(StockStep(calls[-1], sample, timestep, model_output))
        return step(model_output, timestep, sample, *args, **kwargs)

    hook = transformer.register_forward_pre_hook(record_call, with_kwargs=True)
    scheduler.step = record_step
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(prompts, width=96, height=64, **STOCK_RUNS[family], **arguments).images
    hook.remove()
    return pictures, steps


@torch.no_grad()
def stock_embeds(family: str, prompts: list[str]) -> Tensor:
    """Embeddings by the whole stock pipeline. It encodes the empty prompt of SDXL as the negative prompt."""
    pipeline, cpu = build_pipeline(family), torch.device("cpu")
    if family in ("stable_diffusion", "animatediff"):
        return pipeline.encode_prompt(prompts, cpu, 1, True, [""] * len(prompts))[0]
    if family == "sdxl":
        embeds, negative, *_ = pipeline.encode_prompt(prompts, device=cpu)
        rows = [embeds[n] if prompt else negative[n] for n, prompt in enumerate(prompts)]
        return torch.stack(rows)
    if family == "sd3":
        return pipeline.encode_prompt(prompts, prompts, prompts, device=cpu)[0]
    if family == "z_image":
        embeds, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return torch.stack([torch.nn.functional.pad(tokens, (0, 0, 0, 512 - len(tokens))) for tokens in embeds])
    if family == "sana":
        _, (step,) = run_stock(pipeline, family, prompts, num_inference_steps=1, output_type="latent")
        return step.arguments["encoder_hidden_states"]
    lengths = {"cogvideox": TEXT_TOKENS, "flux": 256, "wan": 512}
    length = {"max_sequence_length": lengths[family]} if family in lengths else {}
    return pipeline.encode_prompt(prompts, device=cpu, **length)[0]
