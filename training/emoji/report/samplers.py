"""Samplers to compare: the student as it is served, the student with a wrong K, and the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
from tdm_runtime.model.decoder import Pixels, torch_decoder
from tdm_runtime.model.loaded_model import LoadedModel, denoise
from tdm_runtime.model.text_encoder import stacked
from tdm_runtime.params import SamplingParams
from tdm_runtime.sampling.noise import initial_noise
from tdm_runtime.sampling.sampler import solve
from tdm_runtime.sampling.schedule import spaced_timesteps
from tdm_runtime.sampling.step_table import build_step_table
from training.emoji.data.text import tokenize
from training.emoji.stages.teacher import SCHEDULE
from training.methods.losses import guided
from training.methods.precision import autocast

TEACHER_STEPS = (1, 2, 4, 25)
TEACHER_GUIDANCE = 3.0
BATCH_SIZE = 64
STUDENT = "student"

Sampler = Callable[[Sequence[str], int], list[Pixels]]
"""(prompts, first_seed) -> pictures, uint8 [H, W, 3]. Picture n has the seed first_seed + n."""


def student_pictures(model: LoadedModel, prompts: Sequence[str], steps: int, first_seed: int = 0) -> list[Pixels]:
    """Return pictures as the engine serves them, uint8 [H, W, 3]. Picture n has the seed first_seed + n."""
    width, height = model.recipe.native_sizes[0]
    params = [SamplingParams(text, first_seed + n, steps, width, height) for n, text in enumerate(prompts)]
    with DiffusionEngine(model, EngineConfig(max_batch_size=16, max_live=len(params))) as engine:
        return [future.result().pixels for future in engine.submit_all(params)]


@torch.inference_mode()
def pictures_with_k(
    model: LoadedModel, prompts: Sequence[str], steps: int, k: int | None, first_seed: int = 0
) -> list[Pixels]:
    """Return pictures of `steps` steps whose denoiser receives `k`, which may be wrong or None (TDM, sec. 3.2).

    With `k` = `steps` these are the served pictures, up to rounding.
    """
    width, height = model.recipe.native_sizes[0]
    table, device = model.recipe.step_table(steps, width, height), model.denoiser.device
    shape = model.latent_shape(SamplingParams(prompts[0], first_seed, steps, width, height))
    pictures: list[Pixels] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        texts = prompts[start : start + BATCH_SIZE]
        prompt = stacked([model.text_encoder.encode(text).conditioning for text in texts])
        step_counts = None if k is None else torch.full((len(texts),), k, device=device)
        noise = torch.stack([initial_noise(first_seed + start + n, shape) for n in range(len(texts))])
        call = partial(denoise, [model] * len(texts), step_counts=step_counts, prompt=prompt)
        *_, (latents, _) = solve(table, noise.to(device), call)
        pictures += list(model.decoders["full"].decode(latents))
    return pictures


class Teacher:
    """The teacher with guidance, sampled by DDIM with evenly spaced steps."""

    def __init__(self, run: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(run / "teacher" / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(run / "teacher" / "text_encoder").eval()
        self.unet = UNet2DConditionModel.from_pretrained(run / "teacher" / "unet").eval()
        # The decoder of the published student, so that student and teacher differ only in their latents.
        stage = "decoder" if (run / "decoder" / "vae").is_dir() else "autoencoder"
        vae = AutoencoderKL.from_pretrained(run / stage / "vae").eval()
        self.decoder = torch_decoder(vae, torch.device("cpu"))

    def pictures(
        self, prompts: Sequence[str], steps: int, first_seed: int = 0, guidance_scale: float = TEACHER_GUIDANCE
    ) -> list[Pixels]:
        """Return pictures, uint8 [64, 64, 3] each, from the same noise as the student's at the same seeds."""
        pictures: list[Pixels] = []
        for start in range(0, len(prompts), BATCH_SIZE):
            texts = list(prompts[start : start + BATCH_SIZE])
            pictures += self._batch(texts, steps, first_seed + start, guidance_scale)
        return pictures

    @torch.inference_mode()
    def _batch(self, prompts: list[str], steps: int, first_seed: int, guidance_scale: float) -> list[Pixels]:
        embeds = self.text_encoder(tokenize(self.tokenizer, prompts + [""] * len(prompts))).last_hidden_state
        timesteps = spaced_timesteps("trailing", steps, SCHEDULE.num_train_timesteps)
        table = build_step_table(SCHEDULE, "v_prediction", "ddim", timesteps)
        noise = torch.stack([initial_noise(first_seed + n, (4, 16, 16)) for n in range(len(prompts))])

        def predict(x: Tensor, timesteps: Tensor) -> Tensor:
            with autocast():
                output = self.unet(torch.cat([x, x]), timesteps.repeat(2), embeds).sample
            conditional, unconditional = output.float().chunk(2)
            # Guidance on the model output equals guidance on the denoised estimate: one is linear in the other.
            return guided(conditional, unconditional, guidance_scale)

        *_, (latents, _) = solve(table, noise, predict)
        return list(self.decoder.decode(latents))


def teacher_of(run: Path) -> Teacher | None:
    """Return the teacher of a training run, or None if the run does not hold it."""
    return Teacher(run) if (run / "teacher" / "unet").is_dir() else None


def samplers(model: LoadedModel, teacher: Teacher | None) -> dict[str, Sampler]:
    """Return samplers by name: the student at every step count, and the teacher at `TEACHER_STEPS`."""
    found: dict[str, Sampler] = {
        student_name(steps): partial(_student, model, steps) for steps in model.recipe.step_counts
    }
    if teacher is not None:
        for steps in TEACHER_STEPS:
            found[teacher_name(steps)] = partial(_teacher, teacher, steps)
    return found


def student_name(steps: int) -> str:
    """Return the name of the student in `samplers`."""
    return f"{STUDENT}, K = {steps}"


def teacher_name(steps: int) -> str:
    """Return the name of the teacher in `samplers`."""
    return f"teacher, {steps} step{'s' * (steps > 1)}, guidance {TEACHER_GUIDANCE:g}"


def _student(model: LoadedModel, steps: int, prompts: Sequence[str], first_seed: int) -> list[Pixels]:
    return student_pictures(model, prompts, steps, first_seed)


def _teacher(teacher: Teacher, steps: int, prompts: Sequence[str], first_seed: int) -> list[Pixels]:
    return teacher.pictures(prompts, steps, first_seed)
