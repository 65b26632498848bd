"""Measure a checkpoint as it is served, beside its teacher: a table of scores and a grid of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPTextModel, CLIPTokenizer

from tdm_runtime.decoder import Decoder, Pixels
from tdm_runtime.engine import DiffusionEngine, EngineConfig
from tdm_runtime.loaded_model import LoadedModel, load_model
from tdm_runtime.noise import initial_noise
from tdm_runtime.noise_schedule import spaced_timesteps
from tdm_runtime.params import SamplingParams
from tdm_runtime.step_table import build_step_table
from training.losses import guided
from training.scenes import Scene, caption
from training.score import Score, Scorer, scoring_scenes
from training.tdm import Denoised
from training.teacher import SCHEDULE
from training.text import tokenize

TEACHER_STEPS = (1, 2, 4, 25)
TEACHER_GUIDANCE = 3.0
GRID_PROMPTS = (
    "a red heart",
    "a cat face on a yellow background",
    "a red heart left of a butterfly on a blue background",
    "a small rocket at the top on a purple background",
    "a big strawberry on a pink background",
    "a penguin above a pizza on a green background",
    "an elephant next to a tree",
    "a yellow star on a black background",
)


def student_pictures(model: LoadedModel, prompts: Sequence[str], steps: int, first_seed: int = 0) -> list[Pixels]:
    """Pictures as the engine serves them, uint8 [H, W, 3], seeds counting up."""
    width, height = model.recipe.native_sizes[0]
    params = [SamplingParams(text, first_seed + n, steps, width, height) for n, text in enumerate(prompts)]
    with DiffusionEngine(
        model, EngineConfig(max_batch_size=16, max_live=len(params), threads=torch.get_num_threads())
    ) as engine:
        return [future.result().pixels for future in engine.submit_all(params)]


class Teacher:
    """The teacher with guidance, under DDIM with evenly spaced steps."""

    def __init__(self, run: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(run / "teacher" / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(run / "teacher" / "text_encoder").eval()
        self.denoise = Denoised(UNet2DConditionModel.from_pretrained(run / "teacher" / "unet").eval())
        vae = AutoencoderKL.from_pretrained(run / "autoencoder" / "vae").eval()
        self.decoder = Decoder(vae, torch.device("cpu"))

    @torch.no_grad()
    def pictures(
        self, prompts: Sequence[str], steps: int, first_seed: int = 0, guidance_scale: float = TEACHER_GUIDANCE
    ) -> list[Pixels]:
        """uint8 [64, 64, 3] each, from the noise that the student starts from at the same seeds."""
        embeds, empty = (
            self.text_encoder(tokenize(self.tokenizer, texts)).last_hidden_state
            for texts in (list(prompts), [""] * len(prompts))
        )
        timesteps = spaced_timesteps("trailing", steps, SCHEDULE.num_train_timesteps)
        table = build_step_table(SCHEDULE, "v_prediction", "ddim", timesteps)
        x = torch.stack([initial_noise(first_seed + n, (4, 16, 16)) for n in range(len(prompts))])
        for timestep, a, b in zip(table.timesteps, table.a, table.b, strict=True):
            t = torch.full((2 * len(x),), int(timestep))
            conditional, unconditional = self.denoise(torch.cat([x, x]), t, torch.cat([embeds, empty]), None).chunk(2)
            x = float(a) * x + float(b) * guided(conditional, unconditional, guidance_scale)
        return list(self.decoder.decode(x))


Sampler = Callable[[Sequence[str]], list[Pixels]]


def samplers(model: LoadedModel, teacher: Teacher | None) -> dict[str, Sampler]:
    """Everything worth comparing, by name."""
    found: dict[str, Sampler] = {
        f"student, K = {steps}": partial(student_pictures, model, steps=steps) for steps in model.recipe.step_counts
    }
    if teacher is not None:
        for steps in TEACHER_STEPS:
            found[f"teacher, {steps} step{'s' * (steps > 1)}, guidance {TEACHER_GUIDANCE:g}"] = partial(
                teacher.pictures, steps=steps
            )
    return found


def score_samplers(found: Mapping[str, Sampler], count: int) -> dict[str, tuple[Score, Score]]:
    """Name -> (score on scenes of the training distribution, score on held-out combinations)."""
    scorer = Scorer()
    sets = (scoring_scenes(count), scoring_scenes(count, held_out=True))

    def score(sample: Sampler, scenes: list[Scene]) -> Score:
        return scorer.score(sample([caption(scene) for scene in scenes]), scenes)

    return {name: (score(sample, sets[0]), score(sample, sets[1])) for name, sample in found.items()}


def print_scores(checkpoint: Path, run: Path, count: int = 100) -> None:
    """Print a Markdown table; teacher rows where `run` still holds the teacher."""
    found = samplers(load_model(checkpoint), _teacher_of(run))
    print("| sampler | glyphs | background | both | both, held out |\n|---|---|---|---|---|")
    for name, (seen, unseen) in score_samplers(found, count).items():
        print(f"| {name} | {seen.glyphs:.2f} | {seen.background:.2f} | {seen.adherence:.2f} | {unseen.adherence:.2f} |")


def draw_grid(checkpoint: Path, run: Path, file: Path, prompts: Sequence[str] = GRID_PROMPTS, scale: int = 2) -> None:
    """Draw prompts down, samplers across, one seed a row."""
    found = {name: make(prompts) for name, make in samplers(load_model(checkpoint), _teacher_of(run)).items()}
    cell, gap, head = 64 * scale, 6, 40
    size = (len(found) * (cell + gap) + gap, head + len(prompts) * (cell + 20 + gap))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=11)
    for column, (name, pictures) in enumerate(found.items()):
        x = gap + column * (cell + gap)
        pen.multiline_text((x, 6), name.replace(", ", "\n", 1), fill="black", font=font)
        for row, picture in enumerate(pictures):
            large = Image.fromarray(picture).resize((cell, cell), Image.Resampling.BICUBIC)
            grid.paste(large, (x, head + row * (cell + 20 + gap) + 18))
    for row, prompt in enumerate(prompts):
        pen.text((gap, head + row * (cell + 20 + gap) + 2), prompt, fill="black", font=font)
    grid.save(file)


def _teacher_of(run: Path) -> Teacher | None:
    return Teacher(run) if (run / "teacher" / "unet").is_dir() else None
