"""A small distillation as a program, which tests launch in several processes, or kill.

python -m tests.training.run.small_run KIND FOLDER --steps N --accumulation N
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.training.tiny_runs import LORA, tiny_distiller, weights_of
from training.mixture import DEFAULT, build_distiller
from training.run.distill import Distiller, distill

KINDS = ("mixture", "adapters")


def build(kind: str, steps: int, accumulation: int) -> Distiller:
    """Return a distiller before its first iteration, of the mixture or of a tiny UNet with adapters."""
    changes = {"steps": steps, "accumulation": accumulation, "save_every_s": 0.0, "log_every": 1}
    if kind == "mixture":
        return build_distiller(replace(DEFAULT, batch_size=16, **changes))  # type: ignore[arg-type]
    return tiny_distiller("stable_diffusion", replace(LORA, **changes))  # type: ignore[arg-type]


def run(kind: str, folder: Path, steps: int, accumulation: int = 1) -> dict[str, Tensor]:
    """Train or resume. Return the weights by role and name; rank n also writes them to `folder/rank-n.safetensors`."""
    torch.set_num_threads(1)
    distiller = build(kind, steps, accumulation)
    distill(folder, distiller)
    weights = weights_of(distiller)
    file = folder / f"rank-{distiller.processes.rank}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    return weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", choices=KINDS, nargs="+")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--accumulation", type=int, default=1)
    given = parser.parse_args()
    for each in given.kinds:
        run(each, given.folder / each, given.steps, given.accumulation)
