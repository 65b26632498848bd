"""Table of scores of a clip checkpoint and its teacher, and contact sheets of their clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from tdm_runtime.families.animatediff import MotionUNetDenoiser
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tdm_runtime.sampling.noise import initial_noise
from tdm_runtime.sampling.schedule import spaced_timesteps
from training.emoji.stages.teacher import COORDINATES
from training.emoji_video.clips import FRAMES, MOTIONS, SIDE_PX, Motion, caption
from training.emoji_video.latents import FRAME_SHAPE
from training.emoji_video.motion_unet import load_motion_unet
from training.emoji_video.score import ClipScore, ClipScorer, contact_sheet, scoring_clips
from training.emoji_video.student import ClipPrompts
from training.methods.precision import Precision
from training.methods.roles import CleanEstimator, Guided
from training.methods.trajectory import build_trajectories, sample

TEACHER_STEPS = (25, 4, 1)
TEACHER_GUIDANCE = 3.0
SHEET_PROMPTS = (
    "a rocket moving right on a blue background",
    "a red heart moving left on a yellow background",
    "a butterfly moving up on a green background",
    "a star moving down on a purple background",
    "a ghost growing on a black background",
    "a pizza shrinking on a pink background",
    "a red car spinning",
    "a panda fading in on an orange background",
    "a cat face still on a red background",
)

ClipSampler = Callable[[str, int], Pixels]
"""(prompt, seed) -> clip, uint8 [F, H, W, 3]."""


def student_clip(model: LoadedModel, steps: int, prompt: str, seed: int) -> Pixels:
    """Return a clip as it is served."""
    return generate(model, SamplingParams(prompt, seed, steps, SIDE_PX, SIDE_PX, frames=FRAMES))


class VideoTeacher:
    """The clip teacher with guidance, sampled by DDIM with evenly spaced steps."""

    def __init__(self, folder: Path, decode: Callable[[torch.Tensor], Pixels], precision: Precision) -> None:
        """Load a teacher.

        Args:
            decode: Decoder of the published student, so that student and teacher differ only in their latents.
        """
        self.prompts, self.decode = ClipPrompts(folder, 0), decode
        denoiser = MotionUNetDenoiser(load_motion_unet(folder / "unet").eval())
        self.estimate = Guided(CleanEstimator(denoiser, COORDINATES, precision), self.prompts.empty(), TEACHER_GUIDANCE)

    @torch.inference_mode()
    def clip(self, steps: int, prompt: str, seed: int) -> Pixels:
        """Return a clip from the same noise as the student's at the same seed."""
        timesteps = spaced_timesteps("trailing", steps, COORDINATES.schedule.num_train_timesteps)
        trajectories = build_trajectories(COORDINATES, "ddim", {steps: tuple(timesteps.tolist())})
        noise = initial_noise(seed, (1, FRAME_SHAPE[0], FRAMES, *FRAME_SHAPE[1:]))
        latents = sample(
            self.estimate, trajectories, noise, steps, self.prompts.encode([prompt]), with_k=False, renoise=None
        )
        clip: Pixels = self.decode(latents)[0]
        return clip


def clip_samplers(checkpoint: Path, run: Path, precision: Precision) -> dict[str, ClipSampler]:
    """Return samplers by name: the student at every K and, if `run` holds it, the teacher at `TEACHER_STEPS`."""
    model = load_model(checkpoint)
    found: dict[str, ClipSampler] = {
        f"student, K = {steps}": partial(student_clip, model, steps) for steps in model.recipe.step_counts
    }
    if (run / "teacher" / "unet").is_dir():
        teacher = VideoTeacher(run / "teacher", model.decoders["full"].decode, precision)
        for steps in TEACHER_STEPS:
            name = f"teacher, {steps} step{'s' * (steps > 1)}, guidance {TEACHER_GUIDANCE:g}"
            found[name] = partial(teacher.clip, steps)
    return found


def print_video_scores(checkpoint: Path, run: Path, count: int, precision: Precision) -> None:
    """Print the scores as two Markdown tables: by sampler, and motion by its kind.

    Args:
        count: Number of clips of the training kind, and of held-out triples.
    """
    scorer = ClipScorer()
    asked = scoring_clips(count), scoring_clips(count, held_out=True)
    rows: dict[str, tuple[ClipScore, ClipScore]] = {}
    print("| sampler | motion | held out | glyph | held out | background | held out | unevenness |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, make in clip_samplers(checkpoint, run, precision).items():
        seen, unseen = (
            scorer.score([make(caption(clip), seed) for seed, clip in enumerate(clips)], clips) for clips in asked
        )
        rows[name] = seen, unseen
        shares = (s for field in ("motion", "glyph", "background") for s in (vars(seen)[field], vars(unseen)[field]))
        cells = [name, *(f"{share:.0%}" for share in shares), f"{(seen.unevenness + unseen.unevenness) / 2:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n| motion right, by kind | {' | '.join(MOTIONS)} |\n|---|{'---|' * len(MOTIONS)}")
    for name, (seen, unseen) in rows.items():
        print(f"| {name} | {' | '.join(_by_motion(seen.by_motion, unseen.by_motion))} |")


def _by_motion(seen: Mapping[Motion, float], unseen: Mapping[Motion, float]) -> list[str]:
    """Return the mean share of seen and held-out clips for each motion, which have equal counts."""
    return [f"{(seen[motion] + unseen[motion]) / 2:.0%}" if motion in seen else "-" for motion in MOTIONS]


def draw_contact_sheet(checkpoint: Path, file: Path, prompts: Sequence[str] = SHEET_PROMPTS) -> None:
    """Draw clips of the served student at its most steps, prompts down and frames across."""
    model = load_model(checkpoint)
    contact_sheet(
        [student_clip(model, model.recipe.default_steps, text, seed) for seed, text in enumerate(prompts)]
    ).save(file)
