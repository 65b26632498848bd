"""The paper's ablations on the emoji model (Tables 2, 3, 5, 6, 7, 8, Fig. 8 and 9), with one budget and several seeds.

Each (variant, seed) is trained and measured once and kept as a JSON file. So a run can stop, resume, and
be split over processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.model.decoder import Pixels, torch_decoder
from tdm_runtime.sampling.noise import initial_noise
from tdm_runtime.sampling.schedule import spaced_timesteps
from tdm_runtime.sampling.solvers import DeterministicSolver
from training.config import DistillConfig
from training.emoji.data.scenes import caption
from training.emoji.report.features import FeatureNetwork, features_of, load_features
from training.emoji.report.score import Scorer, scoring_scenes
from training.emoji.stages.curated import finetune_teacher
from training.emoji.stages.student import EMOJI, LATENT_SHAPE, ScenePrompts, build_distiller, load_denoiser
from training.emoji.stages.teacher import COORDINATES
from training.measure.metrics import diversity, frechet_distance
from training.methods.roles import CleanEstimator, Guided
from training.methods.trajectory import CleanEstimate, Trajectories, build_trajectories, sample
from training.pretrained.presets import as_dmd2, as_lcm
from training.pretrained.student_files import save_denoiser
from training.run.distill import Distiller, trajectories_of
from training.run.loop import step_generator

MEASURED_STEPS = (1, 2, 4)
PICTURES = 256
DIVERSE_PROMPTS, DIVERSE_SEEDS = 12, 6
TEACHER_STEPS = 25
OTHER_BASE = "teacher-sft"
"""Folder in the run of the teacher that is fine-tuned on a small clean set."""
BUDGET = replace(EMOJI, steps=120, batch_size=16, warmup_steps=10, ema_decay=0.97)
FIXED = replace(BUDGET, step_counts=(4,), step_condition_for="none")


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    config: DistillConfig
    tests: str
    """Table or figure of the paper that the row reproduces."""
    starts_from: str = ""
    """Name of the variant whose student this one starts from; empty for the teacher."""
    teacher: str = "teacher"
    """Folder in the run of the teacher that is distilled."""


VARIANTS: Mapping[str, Variant] = {
    "TDM-unify": Variant(BUDGET, "Table 5"),
    "unify, without K": Variant(replace(BUDGET, step_condition_for="none"), "Table 5"),
    "unify, K for the student only": Variant(replace(BUDGET, step_condition_for="student"), "Eq. 9"),
    "unify, no surrogate (L2, DMD norm)": Variant(replace(BUDGET, generator_loss="normalised_l2"), "Table 5"),
    "unify, trajectory score": Variant(replace(BUDGET, fake_target="trajectory_score"), "ours"),
    "TDM, 4 steps": Variant(FIXED, "Table 5-8"),
    "4 steps, no importance sampling": Variant(replace(FIXED, fake_target="clean"), "Table 5"),
    "4 steps, DPM-Solver++ rollout": Variant(replace(FIXED, solver="dpmsolver++"), "Table 6"),
    "4 steps, matching clean samples": Variant(replace(FIXED, matching="clean"), "Table 7"),
    "4 steps, Fisher divergence": Variant(replace(FIXED, generator_loss="fisher"), "Table 8"),
    "4 steps, DMD2": Variant(replace(as_dmd2(FIXED), fake_updates=5), "Fig. 9, Table 3"),
    "4 steps, LCM": Variant(replace(as_lcm(FIXED), student_learning_rate=3e-4), "Table 1"),
    "4 steps, TDM from that LCM": Variant(replace(FIXED, steps=60), "Fig. 8", "4 steps, LCM"),
    "unify-GAN": Variant(replace(BUDGET, adversarial_weight=1.0), "Table 3"),
    "unify-SFT": Variant(BUDGET, "Table 3", teacher=OTHER_BASE),
    "4 steps, LoRA rank 16": Variant(
        replace(FIXED, lora_rank=16, student_learning_rate=1e-3, fake_learning_rate=2e-3), "Fig. 9"
    ),
}


@dataclass(frozen=True)
class Measured:
    """Measurements of one sampler at one step count."""

    adherence: float
    """Share of pictures with every glyph and the background right, 0..1."""
    psnr_db: float
    """Peak signal-to-noise ratio to the drawn scene of the caption, decibels, averaged over pictures."""
    frechet: float
    """Frechet distance to the teacher's pictures at 25 steps."""
    frechet_drawn: float
    """Frechet distance to the drawn scenes of the captions."""
    diversity: float
    """Mean feature distance between seeds of one caption."""


class Judge:
    """Measures samplers on fixed captions and noise, and compares them with the teacher's pictures."""

    def __init__(self, run: Path, teacher_folder: Path | None = None) -> None:
        teacher_folder = teacher_folder or run / "teacher"
        self.prompts = ScenePrompts(teacher_folder, seed=0)
        vae = AutoencoderKL.from_pretrained(run / "autoencoder" / "vae").eval()
        self.decoder = torch_decoder(vae, torch.device("cpu"))
        self.network: FeatureNetwork = load_features()
        self.scorer = Scorer()
        self.scenes = scoring_scenes(PICTURES)
        self.conditioning = self.prompts.encode([caption(scene) for scene in self.scenes])
        self.noise = torch.stack([initial_noise(seed, LATENT_SHAPE) for seed in range(PICTURES)])
        repeated = [caption(scene) for scene in self.scenes[:DIVERSE_PROMPTS] for _ in range(DIVERSE_SEEDS)]
        self.repeated = self.prompts.encode(repeated)
        self.real = Guided(
            CleanEstimator(load_denoiser(teacher_folder / "unet").eval(), COORDINATES),
            self.prompts.empty(),
            EMOJI.guidance_scale,
        )
        teachers = self.pictures(self.teacher(TEACHER_STEPS)(self.noise, self.conditioning))
        self.reference = features_of(self.network, teachers)
        self.drawn = features_of(self.network, [self.scorer.draw(scene) for scene in self.scenes])

    def teacher(self, steps: int) -> Sampler:
        """Return a DDIM sampler of the guided teacher."""
        timesteps = spaced_timesteps("trailing", steps, COORDINATES.schedule.num_train_timesteps).tolist()
        return Sampler(self.real, build_trajectories(COORDINATES, "ddim", {steps: timesteps}), steps, with_k=False)

    def pictures(self, latents: Tensor) -> list[Pixels]:
        """Decode latents to pictures, uint8 [H, W, 3] each."""
        return [picture for part in torch.split(latents, 64) for picture in self.decoder.decode(part)]

    def measure(self, sampler: Sampler) -> Measured:
        """Measure one sampler."""
        pictures = self.pictures(sampler(self.noise, self.conditioning))
        repeated = self.pictures(sampler(self.noise[: len(self.repeated)], self.repeated))
        score, features = self.scorer.score(pictures, self.scenes), features_of(self.network, pictures)
        spread = features_of(self.network, repeated).reshape(DIVERSE_PROMPTS, DIVERSE_SEEDS, -1)
        return Measured(
            score.adherence,
            score.psnr_db,
            frechet_distance(features, self.reference),
            frechet_distance(features, self.drawn),
            diversity(spread),
        )


@dataclass(frozen=True)
class Sampler:
    """Sampler that takes K steps of an estimate, 64 samples at a time."""

    estimate: CleanEstimate
    trajectories: Trajectories
    steps: int
    with_k: bool = True
    is_stochastic: bool = False

    @torch.no_grad()
    def __call__(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Return latents, shaped as noise."""
        generator = torch.Generator().manual_seed(1)
        renoise = torch.randn(len(noise), self.steps, *noise.shape[1:], generator=generator)
        parts = [slice(start, start + 64) for start in range(0, len(noise), 64)]
        return torch.cat(
            [
                sample(
                    self.estimate,
                    self.trajectories,
                    noise[part],
                    self.steps,
                    conditioning[part],
                    with_k=self.with_k,
                    renoise=renoise[part] if self.is_stochastic else None,
                )
                for part in parts
            ]
        )


@dataclass(frozen=True)
class Result:
    """Measurements of a trained variant."""

    variant: str
    seed: int
    seconds: float
    """Seconds of training, without evaluation."""
    steps: int
    """Iterations of training."""
    measured: Mapping[str, Measured]
    """Name of the sampler, such as "4" or "4 dpmsolver++" -> its measurements."""


def samplers_of(distiller: Distiller, student: CleanEstimate) -> dict[str, Sampler]:
    """Return the student's samplers: as in training, and those that the paper compares with it."""
    config = distiller.config
    is_stochastic = config.samples_with_noise

    def sampler(steps: int, solver: DeterministicSolver, *, stochastic: bool) -> Sampler:
        trajectories = trajectories_of(replace(config, step_counts=(steps,), solver=solver), COORDINATES)
        return Sampler(student, trajectories, steps, config.student_receives_k, stochastic)

    found = {str(k): sampler(k, "ddim", stochastic=is_stochastic) for k in MEASURED_STEPS}
    if len(config.step_counts) == 1:
        found["4 dpmsolver++"] = sampler(4, "dpmsolver++", stochastic=False)
    if is_stochastic:
        found["4 deterministic"] = sampler(4, "ddim", stochastic=False)
    return found


def run_variant(name: str, seed: int, judge: Judge, run: Path, folder: Path) -> Result:
    """Train and measure one variant, or read its result if there is one."""
    variant = VARIANTS[name]
    file = folder / f"{_slug(name)}-{seed}.json"
    if file.is_file():
        return read_result(file)
    start = folder / f"{_slug(variant.starts_from)}-{seed}" / "unet" if variant.starts_from else None
    distiller = build_distiller(
        replace(variant.config, seed=seed),
        run / variant.teacher,
        latents_file=run / "teacher" / "latents.npy",
        student_folder=start,
    )
    began = time.monotonic()
    for step in range(variant.config.steps):
        distiller.train_step(step, step_generator(seed, "ablation", step))
    seconds = time.monotonic() - began
    with distiller.averaged_student() as student:
        measured = {label: judge.measure(sampler) for label, sampler in samplers_of(distiller, student).items()}
    if variant.config.lora_rank:
        measured["4 on another base"] = measure_on_another_base(distiller, run)
    if any(other.starts_from == name for other in VARIANTS.values()):
        save_denoiser(distiller.average, folder / f"{_slug(name)}-{seed}")  # type: ignore[arg-type]
    result = Result(name, seed, seconds, variant.config.steps, measured)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    return result


def read_result(file: Path) -> Result:
    """Read a result that `run_variant` wrote."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    return Result(**raw | {"measured": {label: Measured(**m) for label, m in raw["measured"].items()}})


def measure_on_another_base(distiller: Distiller, run: Path) -> Measured:
    """Put the student's adapter on a fine-tuned teacher, and compare with the pictures of that teacher (Table 2)."""
    other = run / OTHER_BASE
    moved = build_distiller(distiller.config, other)
    moved.roles.module("student").load_state_dict(distiller.average.state_dict())
    return Judge(run, other).measure(samplers_of(moved, moved.roles.student)["4"])


def prepare_teachers(run: Path, names: Sequence[str]) -> None:
    """Fine-tune the other base if one of the rows needs it and the run does not hold it yet."""
    other = run / OTHER_BASE
    is_needed = any(VARIANTS[name].teacher == OTHER_BASE or VARIANTS[name].config.lora_rank for name in names)
    if is_needed and not (other / "unet").is_dir():
        finetune_teacher(other, run / "teacher", run / "autoencoder")


def run_ablation(run: Path, folder: Path, seeds: Sequence[int], names: Sequence[str] = tuple(VARIANTS)) -> None:
    """Train and measure the rows that have no result yet."""
    prepare_teachers(run, names)
    judge = Judge(run)
    for name in names:
        for seed in seeds:
            result = run_variant(name, seed, judge, run, folder)
            best = result.measured["4"]
            print(f"{name}, seed {seed}: {result.seconds:.0f} s, K = 4: {best}", flush=True)


COLUMNS = (
    "variant",
    "paper",
    *(f"K = {k}" for k in MEASURED_STEPS),
    "to drawn",
    "adherence",
    "PSNR dB",
    "diversity",
    "s / iteration",
)


def print_ablation(run: Path, folder: Path) -> None:
    """Print the means over seeds as a Markdown table.

    The K columns are Frechet distances to the teacher's pictures at 25 steps. The last of them adds the
    range over seeds, and the columns after it belong to the last K.
    """
    results = [read_result(file) for file in sorted(folder.glob("*.json"))]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, variant in VARIANTS.items():
        rows = [r for r in results if r.variant == name]
        measured = {label: [r.measured[label] for r in rows] for r in rows for label in r.measured}
        seconds = f"{mean(r.seconds / r.steps for r in rows):.2f}" if rows else ""
        if rows:
            _print_row(name, variant.tests, [measured[str(k)] for k in MEASURED_STEPS], seconds)
        for label in [name for name in measured if not name.isdecimal()]:
            _print_row(f"{name}: {label.removeprefix('4 ')}", variant.tests, [[], [], measured[label]], seconds)
    for title, judge in (("teacher", Judge(run)), ("another base", Judge(run, run / OTHER_BASE))):
        found = [[judge.measure(judge.teacher(k))] for k in (*MEASURED_STEPS, TEACHER_STEPS)]
        _print_row(f"{title}, guidance {EMOJI.guidance_scale:g}", "", found[:-1], "")
        _print_row(f"{title}, {TEACHER_STEPS} steps", "", [[], [], found[-1]], "")


def _print_row(name: str, paper: str, measured: Sequence[Sequence[Measured]], seconds: str) -> None:
    """Print a row.

    Args:
        measured: For each of `MEASURED_STEPS`, the measurements of all seeds. Empty lists give empty cells.
    """
    frechets = [[m.frechet for m in seeds] for seeds in measured]
    cells = [f"{mean(seeds):.2f}" if seeds else "" for seeds in frechets]
    if len(frechets[-1]) > 1:
        cells[-1] += f" ({min(frechets[-1]):.2f}-{max(frechets[-1]):.2f})"
    last = measured[-1]
    numbers = (
        f"{mean(m.frechet_drawn for m in last):.2f}",
        f"{mean(m.adherence for m in last):.3f}",
        f"{mean(m.psnr_db for m in last):.1f}",
        f"{mean(m.diversity for m in last):.2f}",
    )
    print(f"| {' | '.join((name, paper, *cells, *numbers, seconds))} |")


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
