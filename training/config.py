"""Settings of a distillation, as one frozen value: every choice that the paper ablates.

A run takes a preset (`training/pretrained/presets.py`) and a TOML file that changes some of its fields.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tdm_runtime.checkpoint.recipe import MAX_STEPS
from tdm_runtime.errors import TDMError
from tdm_runtime.sampling.solvers import DeterministicSolver
from training.methods.precision import Precision

Method = Literal["tdm", "lcm", "tcd"]
Interval = Literal["disjoint", "reverse", "full"]
Rollout = Literal["ode", "stochastic"]
StepConditionFor = Literal["both", "student", "none"]
FakeTarget = Literal["importance", "importance_exact", "unweighted", "clean", "trajectory_score"]
GeneratorLoss = Literal["pseudo_huber", "elementwise_pseudo_huber", "normalised_l2", "fisher"]
Matching = Literal["noisy", "clean"]
TeacherPrediction = Literal["any", "epsilon", "v_prediction", "flow_prediction", "sample"]


_NOT_NEGATIVE = (
    "condition_lr_scale",
    "guidance_scale",
    "adversarial_weight",
    "student_learning_rate",
    "fake_learning_rate",
    "discriminator_learning_rate",
    "lora_alpha",
    "flow_shift",
)


MAY_CHANGE = frozenset(
    {"steps", "accumulation", "precision", "base_precision", "gradient_checkpointing", "guidance_scale", "clip_norm"}
    | {"student_learning_rate", "fake_learning_rate", "discriminator_learning_rate", "warmup_steps", "final_lr_share"}
    | {"save_every_s", "log_every", "grid_every"}
)
"""Fields that a resumed run may change. Its saved state was made with the others, or holds them (betas)."""


class ConfigError(TDMError):
    """Error of a training config. The message names the field, its value and the allowed values."""


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation. Defaults are the paper's method; sizes and rates come from a preset."""

    method: Method = "tdm"
    """tdm: Algorithm 1. lcm, tcd: baselines (Luo et al. 2023; Zheng et al. 2024). The baseline DMD2 is tdm with other
    settings, see `presets.as_dmd2`."""
    steps: int = 3000
    """Optimizer iterations of the student."""
    batch_size: int = 32
    """Samples of one iteration, summed over processes and accumulated parts."""
    accumulation: int = 1
    """Number of parts of a process's share of the batch. Each part has a backward pass of its own."""
    seed: int = 0
    """Seed of the weights of adapters and of all random numbers."""

    step_counts: tuple[int, ...] = (1, 2, 3, 4)
    """Step counts that K is drawn from (Eq. 8). One number is TDM for a fixed K; several are TDM-unify."""
    timesteps: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """K -> its timesteps, falling. A K without an entry takes T i / K."""
    step_condition_for: StepConditionFor = "both"
    """Networks that receive K (sec. 3.2).

    both: student and fake score. student: one fake score serves every K, which is biased (Eq. 9).
    none: Table 5's "w/o Conditioned on Sampling Steps".
    """
    condition_lr_scale: float = 10.0
    """Factor on the learning rate of the zero-initialised projection of K. At 1 the projection is barely learned."""
    interval: Interval = "disjoint"
    """Interval of tau. disjoint: (t_m, t_{m+1}] (Eq. 5). reverse: (t_m, T]. full: the middle 96% of (0, T] (DMD),
    above t_m if noisy samples are matched."""
    min_tau_gap: int = 0
    """Timesteps between t_m and the least tau. Near t_m, real minus fake is mostly error."""
    solver: DeterministicSolver = "ddim"
    """Solver of the rollout (Table 6)."""
    rollout: Rollout = "ode"
    """ode: deterministic. stochastic: each step goes to x_0 and adds fresh noise (DMD2's backward simulation)."""

    fake_target: FakeTarget = "importance"
    """Loss of the fake score.

    importance: Eq. (7) near x_m, with tempered weights. importance_exact: the same with the paper's exact ratio, for
    few dimensions. unweighted: the same with weight 1. clean: Eq. (7) from clean samples, Table 5's "w/o Importance
    Sampling".
    trajectory_score: score matching against q(x_tau | x_m). It is not in the paper.
    """
    fake_updates: int = 1
    """Updates of the fake score for each update of the student. DMD2 takes 5 to 10."""
    generator_loss: GeneratorLoss = "pseudo_huber"
    """Loss of the student.

    pseudo_huber: Eq. (11). elementwise_pseudo_huber: its element-wise form. normalised_l2: plain L2 with DMD's
    normalisation (Table 5). fisher: Fisher divergence (Table 8).
    """
    matching: Matching = "noisy"
    """Samples that are matched. noisy: x_{t_i} (TDM). clean: clean estimates (Table 7)."""
    teacher_prediction: TeacherPrediction = "any"
    """Prediction type that the base must have. any: whatever its scheduler_config.json says."""
    guidance_scale: float = 3.5
    """Guidance of the teacher. The student learns it and runs without guidance."""
    adversarial_weight: float = 0.0
    """Weight of the discriminator's loss, Eq. (16) (TDM-unify-GAN). Above 0, training needs real latents."""

    student_learning_rate: float = 2e-6
    fake_learning_rate: float = 2e-5
    discriminator_learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.0, 0.999)
    """Betas of AdamW, for every network."""
    warmup_steps: int = 0
    """Iterations of linear warm-up of the learning rates."""
    final_lr_share: float = 1.0
    """Share of the learning rates that is left at the end of a cosine. 1 is constant, as in the paper."""
    clip_norm: float = 1.0
    """Greatest gradient norm; larger gradients are scaled down to it."""
    ema_decay: float = 0.999
    """Decay of the average of the student's weights, which is what a run saves."""

    lora_rank: int = 0
    """Rank of the LoRA adapters of student and fake score, which share one base. 0 trains whole copies."""
    lora_alpha: float = 0.0
    """Alpha of the adapters. 0 takes the rank."""
    precision: Precision = "bf16"
    """Number format of the denoiser's calls. bf16 is autocast: trained weights stay float32."""
    base_precision: Precision = "fp32"
    """Number format in which the base of LoRA adapters is held. Under precision bf16, bf16 takes half the memory and
    gives the same results as fp32."""
    gradient_checkpointing: bool = False
    """Whether the backward pass computes activations again, which saves memory and takes time."""

    width: int = 512
    """Pixels."""
    height: int = 512
    """Pixels."""
    frames: int = 1
    """Frames of a clip; 1 for pictures."""
    flow_shift: float = 0.0
    """Shift of a flow schedule. 0 keeps the shift of the base."""

    save_every_s: float = 120.0
    """Seconds between two saved states."""
    log_every: int = 50
    """Iterations between two lines of the log."""
    grid_every: int = 0
    """Iterations between two sample grids. 0 draws none."""

    @property
    def student_receives_k(self) -> bool:
        """Whether the student receives K."""
        return self.method == "tdm" and self.step_condition_for != "none"

    @property
    def samples_with_noise(self) -> bool:
        """Whether the student adds fresh noise after each step (DMD2, LCM)."""
        return self.method == "lcm" or self.rollout == "stochastic"

    @property
    def needs_latents(self) -> bool:
        """Whether the method learns from real latents."""
        return self.method != "tdm" or self.adversarial_weight > 0

    @property
    def adapter_alpha(self) -> float:
        """Alpha of the LoRA adapters, whose output is scaled by alpha / rank."""
        return self.lora_alpha or float(self.lora_rank)

    def __post_init__(self) -> None:
        is_counts = bool(self.step_counts) and min(self.step_counts) >= 1 and max(self.step_counts) <= MAX_STEPS
        require("step_counts", self.step_counts, is_counts, f"a list of numbers from 1 to {MAX_STEPS}")
        check_shared_fields(vars(self))
        for name in ("fake_updates", "width", "height", "frames"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("steps", "min_tau_gap", "lora_rank", "grid_every"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in _NOT_NEGATIVE:
            require_not_negative(name, getattr(self, name))
        for k, values in self.timesteps.items():
            require("timesteps", {k: values}, k == len(values), f"{k} timesteps for {k} steps")
        if self.adversarial_weight and self.lora_rank:
            raise ConfigError(
                "adversarial_weight needs a copy of the teacher as discriminator, and LoRA adapters share one model; "
                f"set lora_rank (now {self.lora_rank}) or adversarial_weight ({self.adversarial_weight:g}) to 0"
            )
        if self.generator_loss == "fisher" and self.lora_rank:
            raise ConfigError(
                "generator_loss 'fisher' backpropagates through teacher and fake score, and LoRA adapters share one "
                f"model with the student; set lora_rank (now {self.lora_rank}) to 0"
            )
        if self.base_precision == "bf16" and not (self.lora_rank and self.precision == "bf16"):
            raise ConfigError(
                f"base_precision 'bf16' is for LoRA adapters in precision bf16; set lora_rank (now {self.lora_rank}) "
                f"above 0 and precision (now {self.precision}) to bf16, or base_precision to fp32"
            )


def check_shared_fields(values: Mapping[str, Any]) -> None:
    """Check the fields that `DistillConfig` and `FinetuneConfig` share.

    Raises:
        ConfigError: A value does not fit.
    """
    for name in ("batch_size", "accumulation", "log_every"):
        require(name, values[name], values[name] >= 1, "at least 1")
    batch_size, accumulation = values["batch_size"], values["accumulation"]
    require("accumulation", accumulation, batch_size % accumulation == 0, f"a divisor of batch_size, {batch_size}")
    require("warmup_steps", values["warmup_steps"], values["warmup_steps"] >= 0, "at least 0")
    for name in ("final_lr_share", "save_every_s"):
        require_not_negative(name, values[name])
    require("clip_norm", values["clip_norm"], values["clip_norm"] > 0, "above 0")
    require("ema_decay", values["ema_decay"], 0 <= values["ema_decay"] < 1, "in [0, 1)")
    betas = values["betas"]
    require("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")


def require_not_negative(name: str, value: float) -> None:
    """Raise a `ConfigError` unless the value is finite and at least 0."""
    require(name, value, math.isfinite(value) and value >= 0, "a finite number of at least 0")


def require(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    """Raise a `ConfigError` that names field, value and what is allowed, unless the value is allowed."""
    if not is_allowed:
        raise ConfigError(f"{name} is {value!r}; it must be {allowed}")


def load_config(preset: DistillConfig, file: Path | None) -> DistillConfig:
    """Return a preset with the changes of a TOML file.

    Raises:
        ConfigError: The file cannot be read or is not TOML, a field is unknown, or a value does not fit.
    """
    if file is None:
        return preset
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from None
    try:
        return with_changes(preset, raw)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def check_resume(there: DistillConfig, config: DistillConfig, folder: Path) -> None:
    """Check that a run which `folder` holds may go on with a config.

    Raises:
        ConfigError: it changes a field that is not in `MAY_CHANGE`.
    """
    names = [f.name for f in fields(config) if f.name not in MAY_CHANGE]
    differing = [n for n in names if getattr(there, n) != getattr(config, n)]
    if differing:
        shown = ", ".join(f"{n} {getattr(there, n)!r} (now {getattr(config, n)!r})" for n in differing)
        raise ConfigError(f"{folder} was begun with {shown}; resume with the same, or give another --output")


def with_changes(preset: DistillConfig, raw: Mapping[str, Any]) -> DistillConfig:
    """Return a preset with fields replaced by decoded TOML values."""
    hints = get_type_hints(DistillConfig)
    if unknown := sorted(set(raw) - set(hints)):
        raise ConfigError(f"unknown fields {unknown}; known are {sorted(hints)}")
    return replace(preset, **{name: _typed(name, value, hints[name]) for name, value in raw.items()})


def _typed(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        require(name, value, value in get_args(hint), f"one of {', '.join(get_args(hint))}")
        return value
    if name == "timesteps":
        is_map = isinstance(value, dict) and all(k.isdecimal() and _is_numbers(v) for k, v in value.items())
        require(name, value, is_map, "a table from step count to a list of timesteps")
        return {int(k): tuple(float(t) for t in v) for k, v in value.items()}
    if get_origin(hint) is tuple:
        require(name, value, isinstance(value, list), "a list of numbers")
        return tuple(_typed(name, item, get_args(hint)[0]) for item in value)
    if hint is float and type(value) is int:
        value = float(value)
    require(name, value, type(value) is hint, f"of type {hint.__name__}")
    return value


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) in (int, float) for item in value)


def config_as_toml(config: DistillConfig) -> str:
    """Return every field with its value, as TOML that `load_config` reads."""
    lines = [f"{f.name} = {_toml(getattr(config, f.name))}" for f in fields(config) if f.name != "timesteps"]
    lines.append("\n[timesteps]")
    lines += [f"{k} = {_toml(values)}" for k, values in config.timesteps.items()]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)
