"""`tdm_recipe.json` says how a checkpoint must be sampled. Training writes it, serving follows it.

A checkpoint whose recipe cannot be followed in every field is refused when it is opened.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from tdm_runtime.checkpoint.size_rule import SizeRule, parse_size_rule
from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.schedule import DiffusionSchedule, FlowSchedule, NoiseSchedule, as_array
from tdm_runtime.sampling.step_table import (
    PREDICTION_TYPES,
    SOLVERS,
    PredictionType,
    Solver,
    StepTable,
    build_step_table,
)

RECIPE_FILE = "tdm_recipe.json"
RECIPE_FORMAT = 1
StepConditionKind = Literal["none", "timestep_cond"]
MAX_STEPS = 8


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

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Step counts the checkpoint serves, rising."""
        return tuple(sorted(self.timesteps))

    @cached_property
    def step_tables(self) -> Mapping[int, StepTable]:
        """Step count K -> its step table."""
        return {
            steps: build_step_table(self.noise_schedule, self.prediction_type, self.solver, as_array(timesteps))
            for steps, timesteps in self.timesteps.items()
        }

    def to_json(self) -> str:
        """The text of `tdm_recipe.json`."""
        raw = asdict(self)
        kind = "flow" if isinstance(self.noise_schedule, FlowSchedule) else "diffusion"
        raw["noise_schedule"] = {"kind": kind, **raw["noise_schedule"]}
        return json.dumps({"format": RECIPE_FORMAT, **raw}, indent=2) + "\n"


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
    known = {f.name for f in fields(Recipe)} | {"format"}
    if unknown := sorted(set(raw) - known):
        raise RecipeError(f"unknown fields {unknown}; this version knows {sorted(known)}")
    if missing := sorted(known - {"size_rule", "step_condition", "files"} - set(raw)):
        raise RecipeError(f"missing fields {missing}")
    recipe = Recipe(
        name=_text(raw, "name"),
        prediction_type=_choice(raw, "prediction_type", PREDICTION_TYPES),
        noise_schedule=_parse_schedule(raw["noise_schedule"]),
        solver=_choice(raw, "solver", SOLVERS),
        timesteps=_parse_timesteps(raw["timesteps"]),
        default_steps=raw["default_steps"],
        native_sizes=_parse_sizes(raw["native_sizes"]),
        size_rule=None if raw.get("size_rule") is None else parse_size_rule(raw["size_rule"]),
        step_condition=_choice(raw, "step_condition", get_args(StepConditionKind), default="none"),
        files=_parse_files(raw.get("files", {})),
    )
    if not _is_whole(recipe.default_steps) or recipe.default_steps not in recipe.timesteps:
        raise RecipeError(f"default_steps is {recipe.default_steps!r}, not one of {list(recipe.step_counts)}")
    _ = recipe.step_tables  # fail here, not at the first request, if a table cannot be built
    return recipe


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


def _parse_schedule(raw: Any) -> NoiseSchedule:
    if not isinstance(raw, dict) or raw.get("kind") not in ("diffusion", "flow"):
        raise RecipeError(f"noise_schedule must be an object whose kind is diffusion or flow, got {raw!r}")
    parameters = {key: value for key, value in raw.items() if key != "kind"}
    try:
        return DiffusionSchedule(**parameters) if raw["kind"] == "diffusion" else FlowSchedule(**parameters)
    except (TypeError, RecipeError) as error:  # a TypeError is a parameter that the schedule does not have
        raise RecipeError(f"noise_schedule {raw!r} cannot be honoured: {error}") from None


def _parse_timesteps(raw: Any) -> Mapping[int, tuple[float, ...]]:
    if not isinstance(raw, dict) or not raw:
        raise RecipeError(f"timesteps must map each step count to its list of timesteps, got {raw!r}")
    timesteps = {}
    for key, values in raw.items():
        if key not in map(str, range(1, MAX_STEPS + 1)):
            raise RecipeError(f"timesteps has the step count {key!r}; whole numbers from 1 to {MAX_STEPS} are served")
        is_numbers = isinstance(values, list) and all(
            type(v) in (int, float) and abs(v) <= sys.float_info.max for v in values
        )
        if not is_numbers or len(values) != int(key):
            raise RecipeError(f"timesteps of {key} steps must be a list of {key} finite numbers, got {values!r}")
        timesteps[int(key)] = tuple(float(v) for v in values)
    return timesteps


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


def _parse_files(raw: Any) -> Mapping[str, str]:
    if not isinstance(raw, dict):
        raise RecipeError(f"files must map weight files to their sha256, got {raw!r}")
    for name, sha256 in raw.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or not path.name:
            raise RecipeError(f"files names {name!r}; a path inside the checkpoint folder is allowed")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise RecipeError(f"files says that the sha256 of {name!r} is {sha256!r}; it has 64 digits 0-9a-f")
    return dict(raw)
