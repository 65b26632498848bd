"""The paper's ablations on the emoji model (Tables 1 to 3 and 5 to 8, Fig. 8 and 9), with several seeds.

Each (variant, seed) is trained and measured once and kept as a JSON file. So a run can stop, resume, and
be split over processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.sampling.solvers import DeterministicSolver
from tdm_runtime.whole_file import write_whole
from training.config import DistillConfig
from training.emoji.report.judge import TEACHER_STEPS, Judge, Measured, Sampler
from training.emoji.stages.bases import BASES, CURATED_BASE, finetune_teacher, restore_teacher
from training.emoji.stages.student import EMOJI, build_distiller
from training.emoji.stages.teacher import COORDINATES
from training.methods.trajectory import CleanEstimate
from training.pretrained.presets import as_dmd2, as_lcm, as_tcd
from training.pretrained.student_files import save_denoiser
from training.run.distill import Distiller, trajectories_of
from training.run.loop import step_generator

MEASURED_STEPS = (1, 2, 4)
TEACHER = "teacher"
"""Folder of the teacher in the run, and name of its result."""
BUDGET = replace(EMOJI, steps=40, batch_size=6, warmup_steps=4, ema_decay=0.9)
FIXED = replace(BUDGET, step_counts=(4,), step_condition_for="none")
LCM = replace(as_lcm(FIXED), student_learning_rate=3e-4)
LORA = replace(FIXED, lora_rank=16, student_learning_rate=1e-3, fake_learning_rate=2e-3)
LCM_START = "4 steps, LCM"
EVERY_K = tuple(map(str, MEASURED_STEPS))


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    config: DistillConfig
    tests: str
    """Table or figure of the paper that the row reproduces."""
    samplers: tuple[str, ...] = ("4",)
    """Samplers that measure it, as in `samplers_of`."""
    starts_from: str = ""
    """Name of the variant whose student this one starts from; empty for the teacher."""
    teacher: str = TEACHER
    """Folder in the run of the teacher that is distilled."""


VARIANTS: Mapping[str, Variant] = {
    "TDM, 4 steps": Variant(FIXED, "Tables 5 to 8", (*EVERY_K, "4 dpmsolver++")),
    LCM_START: Variant(replace(LCM, steps=2 * LCM.steps), "Table 1, Fig. 8", ("4", "4 deterministic")),
    "4 steps, LCM, then more LCM": Variant(LCM, "control of Fig. 8", ("4", "4 deterministic"), LCM_START),
    "4 steps, LCM, then TDM": Variant(FIXED, "Fig. 8", starts_from=LCM_START),
    "4 steps, TDM-LoRA": Variant(LORA, "Table 2"),
    "4 steps, LCM-LoRA": Variant(as_lcm(LORA), "Table 2", ("4", "4 deterministic")),
    "4 steps, TCD-LoRA": Variant(as_tcd(LORA), "Table 2", ("4", "4 stochastic")),
    "TDM-unify": Variant(BUDGET, "Table 5", EVERY_K),
    "unify, without K": Variant(replace(BUDGET, step_condition_for="none"), "Table 5", EVERY_K),
    "unify, no surrogate (L2, DMD norm)": Variant(replace(BUDGET, generator_loss="normalised_l2"), "Table 5", EVERY_K),
    "4 steps, no importance sampling": Variant(replace(FIXED, fake_target="clean"), "Table 5"),
    "4 steps, weight 1": Variant(replace(FIXED, fake_target="unweighted"), "ours"),
    "4 steps, trajectory score": Variant(replace(FIXED, fake_target="trajectory_score"), "ours"),
    "4 steps, DPM-Solver++ rollout": Variant(replace(FIXED, solver="dpmsolver++"), "Table 6", ("4", "4 dpmsolver++")),
    "4 steps, matching clean samples": Variant(replace(FIXED, matching="clean"), "Table 7"),
    "4 steps, Fisher divergence": Variant(replace(FIXED, generator_loss="fisher"), "Table 8"),
    "4 steps, DMD2": Variant(as_dmd2(FIXED), "Fig. 9, Table 3", ("4", "4 deterministic")),
    "unify, K for the student only": Variant(replace(BUDGET, step_condition_for="student"), "Eq. 9", EVERY_K),
    "unify-GAN": Variant(replace(BUDGET, adversarial_weight=1.0), "Table 3", EVERY_K),
    "unify-SFT": Variant(BUDGET, "Table 3", EVERY_K, teacher=CURATED_BASE),
}


@dataclass(frozen=True)
class Result:
    """Measurements of a trained variant, or of a teacher."""

    variant: str
    seed: int
    seconds: float
    """Seconds of training, without evaluation."""
    steps: int
    """Iterations of training."""
    measured: Mapping[str, Measured]
    """Name of the sampler, such as "4" or "4 dpmsolver++" -> its measurements."""
    moved: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Folder of another base -> sampler -> Frechet distance to that base's pictures, for LoRA."""


def samplers_of(distiller: Distiller, student: CleanEstimate, names: Sequence[str]) -> dict[str, Sampler]:
    """Return samplers of a student by name, which is the step count and how it differs from the method's own sampler.

    "4" is as in training, "4 dpmsolver++" has this solver, "4 deterministic" leaves out the fresh noise of LCM and
    DMD2, and "4 stochastic" adds fresh noise to the clean estimate of each step (TCD with gamma 1).
    """
    config = distiller.config

    def sampler(name: str) -> Sampler:
        steps, _, way = name.partition(" ")
        solver: DeterministicSolver = "dpmsolver++" if way == "dpmsolver++" else "ddim"
        trajectories = trajectories_of(replace(config, step_counts=(int(steps),), solver=solver), COORDINATES)
        is_stochastic = way == "stochastic" or (config.samples_with_noise and not way)
        return Sampler(student, trajectories, int(steps), config.student_receives_k, is_stochastic)

    return {name: sampler(name) for name in names}


def run_variant(name: str, seed: int, judge_of: Callable[[str], Judge], run: Path, folder: Path) -> Result:
    """Train and measure one variant, or read its result if there is one.

    Args:
        judge_of: Function from the folder of a teacher in the run to its judge.
        run: Folder of the teachers.
        folder: Folder of the results.
    """
    variant = VARIANTS[name]
    file = folder / f"{_slug(name)}-{seed}.json"
    if file.is_file():
        return read_result(file)
    start = folder / f"{_slug(variant.starts_from)}-{seed}" / "unet" if variant.starts_from else None
    distiller = build_distiller(
        replace(variant.config, seed=seed),
        run / variant.teacher,
        latents_file=run / TEACHER / "latents.npy" if variant.config.needs_latents else None,
        student_folder=start,
    )
    began = time.monotonic()
    for step in range(variant.config.steps):
        distiller.train_step(step, step_generator(seed, "ablation", step))
    seconds = time.monotonic() - began
    with distiller.averaged_student() as student:
        found = samplers_of(distiller, student, variant.samplers)
        measured = {label: judge_of(TEACHER).measure(sampler) for label, sampler in found.items()}
    moved: dict[str, dict[str, float]] = {}
    if variant.config.lora_rank:
        moved = {base: _measure_moved(distiller, run, judge_of(base), base, variant.samplers) for base in BASES}
    if any(other.starts_from == name for other in VARIANTS.values()):
        save_denoiser(distiller.average, folder / f"{_slug(name)}-{seed}")  # type: ignore[arg-type]
    return _kept(Result(name, seed, seconds, variant.config.steps, measured, moved), file)


def _measure_moved(distiller: Distiller, run: Path, judge: Judge, base: str, names: Sequence[str]) -> dict[str, float]:
    """Put the student's adapter on another base. Return the Frechet distances to that base's pictures (Table 2)."""
    moved = build_distiller(
        distiller.config,
        run / base,
        latents_file=run / base / "latents.npy" if distiller.config.needs_latents else None,
    )
    moved.average.load_state_dict(distiller.average.state_dict())
    with moved.averaged_student() as student:
        return {label: judge.frechet(sampler) for label, sampler in samplers_of(moved, student, names).items()}


def measure_teacher(base: str, judge_of: Callable[[str], Judge], folder: Path) -> Result:
    """Measure a guided teacher, or read its result if there is one. Another base is measured at 4 steps only."""
    file = folder / f"{base}-0.json"
    if file.is_file():
        return read_result(file)
    judge = judge_of(base)
    steps = MEASURED_STEPS if base == TEACHER else (4,)
    measured = {str(k): judge.measure(judge.teacher(k)) for k in steps}
    if base == TEACHER:
        measured[str(TEACHER_STEPS)] = judge.measure_teacher()
    return _kept(Result(base, 0, 0.0, 0, measured), file)


def _kept(result: Result, file: Path) -> Result:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(asdict(result), indent=1).encode())
    return result


def read_result(file: Path) -> Result:
    """Read a result that `run_variant` or `measure_teacher` wrote."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    return Result(**raw | {"measured": {label: Measured(**m) for label, m in raw["measured"].items()}})


def prepare_teachers(run: Path, names: Sequence[str]) -> list[str]:
    """Make the teachers that the rows need and the run does not hold yet. Return their folders in the run.

    A run without a teacher gets one that is made from the embedded checkpoint (`restore_teacher`).
    """
    if not (run / TEACHER / "unet").is_dir():
        restore_teacher(run, DEFAULT_CHECKPOINT)
    moves = any(VARIANTS[name].config.lora_rank for name in names)
    bases = [base for base in BASES if moves or any(VARIANTS[name].teacher == base for name in names)]
    for base in bases:
        if not (run / base / "unet").is_dir():
            finetune_teacher(run / base, run / TEACHER, run / "autoencoder", BASES[base])
    return [TEACHER, *bases]


def run_ablation(run: Path, folder: Path, seeds: Sequence[int], names: Sequence[str] = tuple(VARIANTS)) -> None:
    """Train and measure the rows that have no result yet, all rows of a seed before the next seed."""
    judge_of = cache(lambda base: Judge(run, base))
    for base in prepare_teachers(run, names):
        print(f"{base}: {measure_teacher(base, judge_of, folder).measured}", flush=True)
    for seed in seeds:
        for name in names:
            result = run_variant(name, seed, judge_of, run, folder)
            print(f"{name}, seed {seed}: {result.seconds:.0f} s, {result.measured} {result.moved}", flush=True)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
