"""A training loop that can be killed at any moment and resumes exactly.

Step n draws from a generator seeded by (seed, stage, n). So the state on disk needs no random state:
it is the weights, the optimizer and the step number.
"""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tdm_runtime.errors import TDMError
from training.run.processes import Processes

STATE_FILE = "state.pt"
LOG_FILE = "log.jsonl"
MIB = 2**20


class TrainingDivergedError(TDMError):
    """A loss or gradient is NaN or infinite. The last state on disk is older and finite."""


class StateNotSavedError(TDMError):
    """The state of a run cannot be written. The one from before is kept."""


class LoopSettings(Protocol):
    """Fields of `LoopConfig`, which `DistillConfig` and `FinetuneConfig` have too."""

    @property
    def steps(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def save_every_s(self) -> float: ...
    @property
    def log_every(self) -> int: ...


@dataclass(frozen=True)
class LoopConfig:
    """Length, logging and saving of one training stage."""

    steps: int
    """Optimizer iterations in all, including those before a resume."""
    seed: int = 0
    """Seed of data order, noise and dropout."""
    save_every_s: float = 120.0
    """Seconds between two saved states. The last state is always saved."""
    log_every: int = 50
    """Iterations between two lines of the log."""


@dataclass(frozen=True)
class Trainable:
    """Everything that a stage changes while it trains; the saved state holds it."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """Return the generator of one iteration, a function of the three arguments alone.

    torch's CPU generator reads the low 32 bits of a seed. With the odd multiplier, any two steps of a
    stage differ in these bits.
    """
    key = zlib.crc32(f"{seed}:{stage}".encode())
    return torch.Generator().manual_seed((key + step * 2654435761) % 2**32)


def run_loop(
    folder: Path,
    stage: str,
    config: LoopSettings,
    trainable: Trainable,
    train_step: Callable[[int, torch.Generator], Mapping[str, float]],
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    evaluate_every: int = 1000,
    *,
    processes: Processes | None = None,
) -> None:
    """Call `train_step(step, generator)` until `config.steps`, from the state in `folder` if there is one.

    Args:
        train_step: Runs one iteration and returns the numbers to log.
        evaluate: Runs slower measurements, or draws pictures, every `evaluate_every` iterations and at the end.
            It receives the number of iterations done and returns numbers to log.
        processes: The processes that train together. The main one writes log and states, and all of them wait for
            each other at the end. By default this process trains alone.

    Raises:
        TrainingDivergedError: A number that `train_step` returned is not finite.
    """
    is_main = processes is None or processes.is_main
    folder.mkdir(parents=True, exist_ok=True)
    first = _load_state(folder, trainable)
    saved_at = started_at = time.monotonic()
    bar = tqdm(total=config.steps, initial=first, desc=stage, disable=not (is_main and sys.stderr.isatty()))
    for step in range(first, config.steps):
        numbers = dict(train_step(step, step_generator(config.seed, stage, step)))
        check_finite(stage, step, numbers)
        done = step + 1
        bar.update()
        is_last = done == config.steps
        is_logged = done % config.log_every == 0 or is_last
        if evaluate is not None and (done % evaluate_every == 0 or is_last):
            numbers.update(evaluate(done))
            is_logged = True
        if is_logged and is_main:
            seconds = (time.monotonic() - started_at) / (done - first)
            memory = {"peak_memory_mib": peak_memory_mib()}
            _log(folder, {"stage": stage, "step": done, "s_per_step": seconds, **memory, **numbers})
        if is_main and (is_last or time.monotonic() - saved_at > config.save_every_s):
            _save_state(folder, trainable, done)
            saved_at = time.monotonic()
    bar.close()
    if processes is not None:
        processes.wait()


def check_finite(stage: str, step: int, numbers: Mapping[str, float]) -> None:
    """Check that every number is finite, so that no broken state is saved.

    Raises:
        TrainingDivergedError: A number is NaN or infinite. The message names the step and every number.
    """
    if all(math.isfinite(value) for value in numbers.values()):
        return
    shown = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
    raise TrainingDivergedError(
        f"{stage} diverged at iteration {step}: {shown}. The last state on disk is older and finite; lower the "
        "learning rates or guidance_scale and run again to resume from it, or delete it to start again"
    )


def peak_memory_mib() -> float:
    """Return the peak memory in MiB: of the GPU if there is one, otherwise of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def learning_rate_at(step: int, steps: int, peak: float, warmup: int = 100, floor: float = 0.02) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to `floor` times the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1.0 + float(torch.cos(torch.tensor(progress * torch.pi))))
    return peak * (floor + (1.0 - floor) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of every group to `value` times its `lr_scale`, which is 1 by default."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


@torch.no_grad()
def update_ema(average: nn.Module, current: nn.Module, step: int, decay: float) -> None:
    """Move `average` towards `current`. Early steps use a smaller decay, so that the first weights are forgotten."""
    weight = 1.0 - min(decay, (1.0 + step) / (10.0 + step))
    for target, source in zip(average.parameters(), current.parameters(), strict=True):
        target.lerp_(source.to(target.dtype), weight)


def train_averaged(
    folder: Path,
    stage: str,
    config: LoopSettings,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int, torch.Generator], Tensor],
    ema_decay: float,
) -> dict[str, nn.Module]:
    """Train modules together, or resume. Returns the averages of their weights, by name.

    Args:
        loss_at: function from the step and its random numbers to the loss; it sets the learning rate.
        ema_decay: decay of the averages, see `update_ema`.
    """
    averages = {name: copy.deepcopy(module).eval().requires_grad_(False) for name, module in modules.items()}

    def train_step(step: int, generator: torch.Generator) -> dict[str, float]:
        loss = loss_at(step, generator)
        norm = descend(optimizer, loss)
        for name, module in modules.items():
            update_ema(averages[name], module, step, ema_decay)
        return {"loss": loss.item(), "grad_norm": norm}

    kept = {**modules, **{f"average_{name}": average for name, average in averages.items()}}
    run_loop(folder, stage, config, Trainable(kept, {"adamw": optimizer}), train_step)
    return averages


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float = 1.0) -> float:
    """Backpropagate, clip the gradient norm and update. Return the norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return clipped_update(optimizer, clip_norm)


def accumulated_update(
    optimizer: torch.optim.Optimizer, losses: Iterable[Tensor], parts: int, clip_norm: float, processes: Processes
) -> tuple[float, float]:
    """Update by the mean gradient over accumulated parts and processes.

    Args:
        losses: One loss for each part. An iterator computes each loss when it is needed, so that memory holds the
            activations of one part only.
        parts: Number of losses.

    Returns:
        The mean loss over this process's parts, and the gradient norm before clipping.
    """
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for loss in losses:
        (loss / parts).backward()  # type: ignore[no-untyped-call]
        total += loss.item() / parts
    processes.average_gradients(parameters_of(optimizer))
    return total, clipped_update(optimizer, clip_norm)


def clipped_update(optimizer: torch.optim.Optimizer, clip_norm: float) -> float:
    """Clip the gradient norm, and update if the norm is finite. Return the norm before clipping."""
    norm = float(torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), clip_norm))
    if math.isfinite(norm):
        optimizer.step()
    return norm


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer changes."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _save_state(folder: Path, trainable: Trainable, step: int) -> None:
    state = {
        "step": step,
        "modules": {name: module.state_dict() for name, module in trainable.modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in trainable.optimizers.items()},
    }
    partial = folder / f"{STATE_FILE}.partial"
    try:
        torch.save(state, partial)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free / MIB
        raise StateNotSavedError(
            f"{folder / STATE_FILE} cannot be written after iteration {step}: {str(error).splitlines()[0]}; {free:.0f} "
            "MiB are free there. The state from before is kept: make room and run again to resume from it"
        ) from None
    os.replace(partial, folder / STATE_FILE)


def _load_state(folder: Path, trainable: Trainable) -> int:
    file = folder / STATE_FILE
    if not file.is_file():
        return 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    for name, module in trainable.modules.items():
        module.load_state_dict(state["modules"][name])
    for name, optimizer in trainable.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    return int(state["step"])


def _log(folder: Path, row: Mapping[str, object]) -> None:
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
    line = json.dumps(rounded)
    tqdm.write(line)
    with (folder / LOG_FILE).open("a", encoding="utf-8") as log:
        log.write(line + "\n")
