"""`tdm_recipe.json` says how a checkpoint must be sampled. Training writes it, serving follows it.

A checkpoint whose recipe cannot be followed in every field is refused when it is opened.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from tdm_runtime.checkpoint.file_hashes import parse_hashes
from tdm_runtime.checkpoint.frame_rule import FrameRule, parse_frame_rule
from tdm_runtime.checkpoint.size_rule import SizeRule, parse_size_rule
from tdm_runtime.edit import ReferenceRule
from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.schedule import (
    DiffusionSchedule,
    FlowSchedule,
    NoiseSchedule,
    TrigFlowSchedule,
    as_array,
)
from tdm_runtime.sampling.size_shift import SizeShift
from tdm_runtime.sampling.solvers import SOLVERS, Solver
from tdm_runtime.sampling.step_table import (
    LCM_TIMESTEP_SCALING,
    PREDICTION_TYPES,
    PredictionType,
    StepTable,
    build_step_table,
)

RECIPE_FILE = "tdm_recipe.json"
RECIPE_FORMAT = 1
StepConditionKind = Literal["none", "timestep_cond"]
MAX_STEPS = 16
MAX_GUIDANCE_SCALE = 100.0
MAX_FPS = 120
SCHEDULES: Mapping[str, type[NoiseSchedule]] = {
    "diffusion": DiffusionSchedule,
    "flow": FlowSchedule,
    "trigflow": TrigFlowSchedule,
}
"""Kind in the file -> class."""
FIRST_FIELDS = ("step_condition", "files")
"""Optional fields that the file always has. The others are left out of it at their default."""
MAX_KEPT_TABLES = 1024


@dataclass(frozen=True)
class Adapter:
    """A LoRA that belongs to a model."""

    file: str
    """File or folder of the LoRA, relative to the recipe's folder."""
    scale: float = 1.0
    """Multiplies the change of the weights; 1 is as trained."""
    part: str = ""
    """Folder of the denoiser that it changes, such as `transformer_2` of Wan 2.2; empty for the family's first."""


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint must be sampled."""

    name: str
    """Name of the model in requests."""
    prediction_type: PredictionType
    noise_schedule: NoiseSchedule
    solver: Solver
    timesteps: Mapping[int, tuple[float, ...]]
    """Step count K -> its K timesteps, falling. Other step counts are refused."""
    default_steps: int
    """Step count of a request that does not name one."""
    native_sizes: tuple[tuple[int, int], ...]
    """(width, height) in pixels that the model was trained at; the first is the default."""
    size_rule: SizeRule | None = None
    """Sizes that are allowed beside the native ones; None allows no others."""
    step_condition: StepConditionKind = "none"
    """How the denoiser receives K: not at all, or by the `timestep_cond` argument."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Weight file, relative to the checkpoint folder -> its sha256."""

    sigmas: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """Step count K -> K + 1 noise levels, falling: where the steps start, and where the last one lands. Ratios of noise
    to signal for a diffusion schedule, sigmas in [0, 1] for a flow. Step counts that are absent start at the levels of
    their timesteps; with sigmas, timesteps are only what the denoiser receives."""
    next_timesteps: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """Step count K -> the timestep where each of its steps lands; below 0 is the clean end. Absent step counts land at
    the next timestep, and the last step at the clean end."""
    size_shift: SizeShift | None = None
    """Rule that shifts a flow's timesteps by the size of the picture; `timesteps` are those before the shift."""
    initial_scale: float | Literal["sigma"] = 1.0
    """The sampler starts from unit noise times this factor; "sigma" is the noise level of the first step."""
    eta: float = 0.0
    """tcd only: how stochastic each step is, from 0 to 1; see `build_step_table`."""
    timestep_scaling: float = LCM_TIMESTEP_SCALING
    """lcm only: scales the timesteps in the boundary scalings."""
    output_sign: Literal[1, -1] = 1
    """Factor on the model output before it is read as `prediction_type`; -1 where a model predicts the opposite, such
    as the velocity from noise to data of InstaFlow."""
    base: str | None = None
    """Folder of the weights, relative to the recipe's; None where they lie beside the recipe."""
    adapters: tuple[Adapter, ...] = ()
    """LoRAs that are merged into the weights when they are loaded, in order."""
    guidance_scale: float | None = None
    """Guidance scale that the denoiser reads as an input; None where it reads none."""
    lora_scale: float | None = None
    """Default of a request's `lora_scale`, for a LoRA that is added at run time. No field of the file."""
    frames: FrameRule | None = None
    """Numbers of frames that clips may have; None for a model that makes pictures."""
    fps: int | None = None
    """Frames per second of a clip whose request names none; None for a model that makes pictures."""
    references: ReferenceRule | None = None
    """Rule of reference pictures, by the family; None for a model that reads none. No field of the file."""

    @property
    def default_frames(self) -> int | None:
        """Frames of a clip whose request names none; None for a model that makes pictures."""
        return None if self.frames is None else self.frames.default

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Step counts the checkpoint serves, rising."""
        return tuple(sorted(self.timesteps))

    def nearest_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) that the model makes and that is nearest to a size, in pixels, in shape first."""
        if self.size_rule is not None:
            return self.size_rule.nearest(width, height)
        return min(self.native_sizes, key=lambda size: abs(math.log(size[0] / size[1] * height / width)))

    def step_table(self, num_inference_steps: int, width: int, height: int, rows: int | None = None) -> StepTable:
        """Return the step table of a step count at a size in pixels. Tables are kept.

        Args:
            rows: 1..num_inference_steps. Steps that really run, the last ones, for a sampler that starts from a given
                picture. It knows nothing of the steps before. None runs all.

        Raises:
            KeyError: the recipe does not have the step count.
            RecipeError: a table cannot be built for this size.
        """
        shift = self.size_shift
        mu = None if shift is None else shift.mu_of(num_inference_steps, width, height)
        key = num_inference_steps, mu, rows or num_inference_steps
        table = self._tables.get(key)
        if table is None:
            if len(self._tables) >= MAX_KEPT_TABLES:
                self._tables.clear()
            table = self._tables[key] = self._build_table(*key)
        return table

    @cached_property
    def _tables(self) -> dict[tuple[int, float | None, int], StepTable]:
        return {}

    def _build_table(self, steps: int, mu: float | None, rows: int) -> StepTable:
        timesteps = as_array(self.timesteps[steps])
        if self.size_shift is not None and mu is not None and isinstance(self.noise_schedule, FlowSchedule):
            total = self.noise_schedule.num_train_timesteps
            timesteps = total * self.size_shift.shifted(timesteps / total, mu)
        landings, sigmas = self.next_timesteps.get(steps), self.sigmas.get(steps)
        return build_step_table(
            self.noise_schedule,
            self.prediction_type,
            self.solver,
            timesteps[-rows:],
            next_timesteps=None if landings is None else as_array(landings)[-rows:],
            sigmas=None if sigmas is None else as_array(sigmas)[-rows - 1 :],
            initial_scale=self.initial_scale,
            eta=self.eta,
            timestep_scaling=self.timestep_scaling,
            output_sign=self.output_sign,
        )

    def to_json(self) -> str:
        """The text of `tdm_recipe.json`. Optional fields beyond the first ones are left out at their default."""
        raw = asdict(self)
        for f in fields(self):
            if f.name in OPTIONAL_FIELDS - set(FIRST_FIELDS) and getattr(self, f.name) == _default(f.name):
                del raw[f.name]
        for adapter in raw.get("adapters", ()):
            if not adapter["part"]:
                del adapter["part"]
        kind = next(kind for kind, schedule in SCHEDULES.items() if isinstance(self.noise_schedule, schedule))
        raw["noise_schedule"] = {"kind": kind, **raw["noise_schedule"]}
        return json.dumps({"format": RECIPE_FORMAT, **raw}, indent=2) + "\n"


def _default(name: str) -> Any:
    """Return the default of an optional field of `Recipe`."""
    found = next(f for f in fields(Recipe) if f.name == name)
    return found.default if found.default_factory is MISSING else found.default_factory()


OPTIONAL_FIELDS = {f.name for f in fields(Recipe) if (f.default, f.default_factory) != (MISSING, MISSING)}


def load_recipe(folder: Path) -> Recipe:
    """Read and check `folder/tdm_recipe.json`.

    Raises:
        RecipeError: the file is missing, is not JSON, or has a value that this version cannot follow.
    """
    file = folder / RECIPE_FILE
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"{file} is missing: it says how the checkpoint must be sampled; "
            "`tdm-train` writes it, see docs/checkpoints.md"
        ) from None
    except OSError as error:
        raise RecipeError(f"{file} cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{file} is not JSON ({error}); restore it from the checkpoint's source") from None
    try:
        return parse_recipe(raw)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from None


def parse_recipe(raw: Any) -> Recipe:
    """Turn decoded JSON into a checked recipe.

    Raises:
        RecipeError: naming the field, its value and what is allowed.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"a recipe is a JSON object, got {type(raw).__name__}")
    if not _is_whole(raw.get("format")) or raw["format"] != RECIPE_FORMAT:
        raise RecipeError(
            f"format is {raw.get('format')!r}, this version reads {RECIPE_FORMAT}; "
            "install the version that the checkpoint was made for"
        )
    known = {f.name for f in fields(Recipe)} - {"lora_scale", "references"} | {"format"}
    if unknown := sorted(set(raw) - known):
        raise RecipeError(f"unknown fields {unknown}; this version knows {sorted(known)}")
    if missing := sorted(known - OPTIONAL_FIELDS - set(raw)):
        raise RecipeError(f"missing fields {missing}")
    timesteps = _parse_lists(raw, "timesteps")
    recipe = Recipe(
        name=_text(raw, "name"),
        prediction_type=_choice(raw, "prediction_type", PREDICTION_TYPES),
        noise_schedule=_parse_schedule(raw["noise_schedule"]),
        solver=_choice(raw, "solver", SOLVERS),
        timesteps=timesteps,
        default_steps=raw["default_steps"],
        native_sizes=_parse_sizes(raw["native_sizes"]),
        size_rule=None if raw.get("size_rule") is None else parse_size_rule(raw["size_rule"]),
        step_condition=_choice(raw, "step_condition", get_args(StepConditionKind), default="none"),
        files=parse_hashes(raw.get("files", {})),
        sigmas=_parse_lists(raw, "sigmas", of=timesteps, more=1),
        next_timesteps=_parse_lists(raw, "next_timesteps", of=timesteps),
        size_shift=_parse_size_shift(raw.get("size_shift")),
        initial_scale="sigma" if raw.get("initial_scale") == "sigma" else _number(raw, "initial_scale", 0.0, 1000.0),
        eta=_number(raw, "eta", 0.0, 1.0),
        timestep_scaling=_number(raw, "timestep_scaling", 1.0, 1000.0),
        output_sign=_sign(raw),
        base=None if raw.get("base") is None else _text(raw, "base"),
        adapters=_parse_adapters(raw.get("adapters", [])),
        guidance_scale=None
        if raw.get("guidance_scale") is None
        else _number(raw, "guidance_scale", 0.0, MAX_GUIDANCE_SCALE),
        frames=None if raw.get("frames") is None else parse_frame_rule(raw["frames"]),
        fps=raw.get("fps"),
    )
    _check_fit(recipe)
    if not _is_whole(recipe.default_steps) or recipe.default_steps not in recipe.timesteps:
        raise RecipeError(f"default_steps is {recipe.default_steps!r}, not one of {list(recipe.step_counts)}")
    for steps in recipe.step_counts:  # fail here, not at the first request, if a table cannot be built
        for width, height in recipe.native_sizes:
            recipe.step_table(steps, width, height)
    return recipe


def _check_fit(recipe: Recipe) -> None:
    """Check that no field is set that the others leave unread, and none is missing that they need."""
    if (recipe.frames is None) != (recipe.fps is None):
        raise RecipeError(
            f"frames is {recipe.frames} and fps {recipe.fps!r}; clips need both, and pictures have neither"
        )
    if recipe.fps is not None and not (_is_whole(recipe.fps) and 1 <= recipe.fps <= MAX_FPS):
        raise RecipeError(f"fps is {recipe.fps!r}; it must be a whole number from 1 to {MAX_FPS}")
    if recipe.size_shift is not None:
        if not isinstance(recipe.noise_schedule, FlowSchedule):
            raise RecipeError("size_shift is set, but noise_schedule is no flow; a size shifts flows only")
        if recipe.sigmas or recipe.next_timesteps:
            raise RecipeError(
                "size_shift is set beside sigmas or next_timesteps; it reads timesteps only, leave them out"
            )
    if recipe.eta != 0.0 and recipe.solver != "tcd":
        raise RecipeError(f"eta is {recipe.eta}, but solver {recipe.solver!r} reads none; leave it out, or use tcd")
    if recipe.timestep_scaling != LCM_TIMESTEP_SCALING and recipe.solver != "lcm":
        raise RecipeError(
            f"timestep_scaling is {recipe.timestep_scaling}, but solver {recipe.solver!r} reads none; "
            "leave it out, or use lcm"
        )


def _is_whole(value: object) -> bool:
    return type(value) is int  # not isinstance: True is an int there


def _text(raw: Mapping[str, Any], name: str) -> str:
    value = raw[name]
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{name} must be a non-empty string, got {value!r}")
    return value


def _choice(raw: Mapping[str, Any], name: str, allowed: tuple[str, ...], default: str | None = None) -> Any:
    value = raw.get(name, default)
    if value not in allowed:
        raise RecipeError(f"{name} is {value!r}; this version honours {', '.join(allowed)}")
    return value


def _number(raw: Mapping[str, Any], name: str, low: float, high: float) -> float:
    """Return an optional number; its default where the file has none."""
    value = raw.get(name, _default(name))
    if type(value) not in (int, float) or not low <= value <= high:
        raise RecipeError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")
    return float(value)


def _sign(raw: Mapping[str, Any]) -> Literal[1, -1]:
    value = raw.get("output_sign", 1)
    if not _is_whole(value) or value not in (1, -1):
        raise RecipeError(f"output_sign is {value!r}; it must be 1 or -1")
    return 1 if value == 1 else -1


def _parse_schedule(raw: Any) -> NoiseSchedule:
    if not isinstance(raw, dict) or raw.get("kind") not in tuple(SCHEDULES):
        raise RecipeError(f"noise_schedule must be an object whose kind is {_either(SCHEDULES)}, got {raw!r}")
    parameters = {key: value for key, value in raw.items() if key != "kind"}
    try:
        return SCHEDULES[raw["kind"]](**parameters)
    except (TypeError, RecipeError) as error:  # a TypeError is a parameter that the schedule does not have
        raise RecipeError(f"noise_schedule {raw!r} cannot be honoured: {error}") from None


def _parse_size_shift(raw: Any) -> SizeShift | None:
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise RecipeError(f"size_shift must be an object, got {raw!r}")
    try:
        return SizeShift(**raw)
    except (TypeError, RecipeError) as error:  # a TypeError is a parameter that the rule does not have
        raise RecipeError(f"size_shift {raw!r} cannot be honoured: {error}") from None


def _either(names: Mapping[str, object]) -> str:
    *rest, last = names
    return f"{', '.join(rest)} or {last}"


def _parse_lists(
    raw: Mapping[str, Any], name: str, of: Mapping[int, object] | None = None, more: int = 0
) -> Mapping[int, tuple[float, ...]]:
    """Return a map from step counts K to lists of K + `more` numbers.

    Args:
        of: step counts that may be listed, and none of which must be; None if any may be, and one must be.
    """
    lists = raw.get(name, {})
    if not isinstance(lists, dict) or (of is None and not lists):
        raise RecipeError(f"{name} must map each step count to its list of {name}, got {lists!r}")
    parsed = {}
    for key, values in lists.items():
        if key not in map(str, range(1, MAX_STEPS + 1)):
            raise RecipeError(f"{name} has the step count {key!r}; whole numbers from 1 to {MAX_STEPS} are served")
        if of is not None and int(key) not in of:
            raise RecipeError(f"{name} has the step count {key!r}, which timesteps lacks; list it there too")
        is_numbers = isinstance(values, list) and all(
            type(v) in (int, float) and abs(v) <= sys.float_info.max for v in values
        )
        if not is_numbers or len(values) != int(key) + more:
            raise RecipeError(
                f"{name} of {key} steps must be a list of {int(key) + more} finite numbers, got {values!r}"
            )
        parsed[int(key)] = tuple(float(v) for v in values)
    return parsed


def _parse_sizes(raw: Any) -> tuple[tuple[int, int], ...]:
    is_sizes = (
        isinstance(raw, list)
        and raw
        and all(
            isinstance(size, list) and len(size) == 2 and all(_is_whole(px) and px > 0 for px in size) for size in raw
        )
    )
    if not is_sizes:
        raise RecipeError(f"native_sizes must be a non-empty list of [width, height] in pixels, got {raw!r}")
    return tuple((width, height) for width, height in raw)


def _parse_adapters(raw: Any) -> tuple[Adapter, ...]:
    is_list = isinstance(raw, list) and all(
        isinstance(one, dict) and set(one) <= {"file", "scale", "part"} for one in raw
    )
    if not is_list:
        raise RecipeError(f"adapters must be a list of objects with file, scale and part, got {raw!r}")
    if parts := [one["part"] for one in raw if not isinstance(one.get("part", ""), str)]:
        raise RecipeError(f"part of an adapter must be a folder's name, got {parts[0]!r}")
    return tuple(
        Adapter(_text({"file": "", **one}, "file"), _finite(one.get("scale", 1.0), "scale"), one.get("part", ""))
        for one in raw
    )


def _finite(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise RecipeError(f"{name} of an adapter must be a finite number, got {value!r}")
    return float(value)
