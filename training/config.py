"""What a distillation is: every choice the paper ablates, as one frozen value.

A run is a preset (`training/pretrained/presets.py`), changed by a TOML file of the same field names.
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
from tdm_runtime.sampling.step_table import Solver
from training.methods.precision import Precision

Method = Literal["tdm", "lcm"]
Interval = Literal["disjoint", "reverse", "full"]
Rollout = Literal["ode", "stochastic"]
Told = Literal["both", "student", "nobody"]
FakeTarget = Literal["importance", "importance_exact", "clean", "trajectory_score"]
GeneratorLoss = Literal["pseudo_huber", "elementwise_pseudo_huber", "normalised_l2", "fisher"]
Matching = Literal["noisy", "clean"]


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


class ConfigError(TDMError):
    """A training config cannot be honoured; the message names field, value and what is allowed."""


@dataclass(frozen=True)
class DistillConfig:
    """A distillation. Defaults are the paper's method; sizes and rates come from a preset."""

    method: Method = "tdm"
    """tdm (Algorithm 1; DMD2 is a setting of it, see `presets.as_dmd2`), or the baseline lcm (Luo et al. 2023)."""
    steps: int = 3000
    """Optimizer iterations of the student."""
    batch_size: int = 32
    """Samples of one iteration, over all processes and accumulated parts."""
    accumulation: int = 1
    """Parts that a process's share of the batch is cut into, one backward pass each."""
    seed: int = 0

    step_counts: tuple[int, ...] = (1, 2, 3, 4)
    """K is drawn from these (Eq. 8). One number is TDM for a fixed K; several are TDM-unify."""
    timesteps: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """K -> its timesteps, falling, where they are not T i / K."""
    told: Told = "both"
    """Who is told K (sec. 3.2): both; student, with one fake score for every K (Eq. 9's bias); or nobody,
    Table 5's "w/o Conditioned on Sampling Steps"."""
    condition_lr_scale: float = 10.0
    """Learning rate of the zero-initialised projection of K, relative; at 1 it is barely learned."""
    interval: Interval = "disjoint"
    """tau in (t_m, t_{m+1}] (Eq. 5); reverse: in (t_m, T]; full: in the middle 96% of all (DMD)."""
    min_tau_gap: int = 0
    """tau stays this many timesteps above t_m, where real minus fake is mostly error."""
    solver: Solver = "ddim"
    """Of the rollout (Table 6)."""
    rollout: Rollout = "ode"
    """Deterministic, or through x_0 and fresh noise at every step (DMD2's backward simulation)."""

    fake_target: FakeTarget = "importance"
    """How the fake score learns.

    importance: Eq. (7) near x_m, tempered weights. importance_exact: the ratio itself, for few
    dimensions. clean: Eq. (7) from clean samples, Table 5's "w/o Importance Sampling".
    trajectory_score: score matching against q(x_tau | x_m) itself, ours.
    """
    fake_updates: int = 1
    """Updates of the fake score for each of the student; DMD2 takes 5 to 10."""
    generator_loss: GeneratorLoss = "pseudo_huber"
    """Eq. (11); its element-wise form; plain L2 under DMD's normalisation (Table 5); Fisher divergence (Table 8)."""
    matching: Matching = "noisy"
    """Match x_{t_i} (TDM) or clean estimates (Table 7)."""
    guidance_scale: float = 3.5
    """Of the teacher; the student has it built in and runs without."""
    adversarial_weight: float = 0.0
    """Of Eq. (16)'s discriminator (TDM-unify-GAN); needs real latents. 0 is data-free."""

    student_learning_rate: float = 2e-6
    fake_learning_rate: float = 2e-5
    discriminator_learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.0, 0.999)
    """Of AdamW, student and fake score."""
    warmup_steps: int = 0
    final_lr_share: float = 1.0
    """Share of the learning rates left at the end of a cosine; 1 is constant, as in the paper."""
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    """Of the student that is kept."""

    lora_rank: int = 0
    """0 trains whole copies; else student and fake score are adapters of this rank on one base."""
    lora_alpha: float = 0.0
    """0 takes the rank."""
    precision: Precision = "bf16"
    gradient_checkpointing: bool = False

    width: int = 512
    height: int = 512
    frames: int = 1
    flow_shift: float = 0.0
    """Of a flow schedule, in place of the base's own; 0 keeps the base's."""

    save_every_s: float = 120.0
    log_every: int = 50
    grid_every: int = 0
    """Iterations between two sample grids; 0 draws none."""

    @property
    def tells_student(self) -> bool:
        """Whether the student reads K."""
        return self.method == "tdm" and self.told != "nobody"

    @property
    def samples_with_noise(self) -> bool:
        """Whether a step of the student ends in fresh noise (DMD2, LCM)."""
        return self.method == "lcm" or self.rollout == "stochastic"

    @property
    def needs_latents(self) -> bool:
        """Whether the method learns from data."""
        return self.method == "lcm" or self.adversarial_weight > 0

    @property
    def adapter_alpha(self) -> float:
        """Alpha of the LoRA adapters; what they add is scaled by alpha / rank."""
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
                "adversarial_weight needs a teacher of its own to make a discriminator of, and LoRA adapters share "
                f"theirs; set lora_rank (now {self.lora_rank}) or adversarial_weight ({self.adversarial_weight:g}) to 0"
            )
        if self.generator_loss == "fisher" and self.lora_rank:
            raise ConfigError(
                "generator_loss 'fisher' backpropagates through teacher and fake score, which LoRA adapters share "
                f"with the student; set lora_rank (now {self.lora_rank}) to 0"
            )
        if self.method == "lcm" and self.lora_rank:
            raise ConfigError(f"method 'lcm' trains whole copies; set lora_rank (now {self.lora_rank}) to 0")


def check_shared_fields(values: Mapping[str, Any]) -> None:
    """Check the fields that `DistillConfig` and `FinetuneConfig` share.

    Raises:
        ConfigError: a value does not fit.
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
    """A preset changed by a TOML file.

    Raises:
        ConfigError: the file is missing or no TOML, a field is unknown, or a value does not fit.
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


def with_changes(preset: DistillConfig, raw: Mapping[str, Any]) -> DistillConfig:
    """A preset with fields replaced by decoded TOML values."""
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
    """Every field with its value, as a file that `load_config` reads."""
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
