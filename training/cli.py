"""`tdm-train`: the stages from nothing to a served checkpoint. Each resumes where it was killed.

tdm-train autoencoder && tdm-train teacher && tdm-train tdm && tdm-train publish
tdm-train score && tdm-train grid --output docs/grid.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tdm_runtime.checkpoint import DEFAULT_CHECKPOINT
from training.autoencoder import AutoencoderConfig, train_autoencoder
from training.loop import LoopConfig
from training.publish import publish
from training.report import draw_grid, print_scores
from training.tdm import TDMConfig, train_tdm
from training.teacher import TeacherConfig, train_teacher

STAGES = ("autoencoder", "teacher", "tdm", "publish", "score", "grid")


def main(arguments: list[str] | None = None) -> int:
    """Run one stage. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="tdm-train", description=__doc__.split("\n", 1)[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="working folder (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="what publish writes, score reads")
    parser.add_argument("--output", type=Path, default=Path("grid.png"), help="what grid writes (%(default)s)")
    parser.add_argument("--steps", type=int, help="iterations, in place of the stage's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    autoencoder, teacher, tdm = (given.run / stage for stage in ("autoencoder", "teacher", "tdm"))

    def loop(default: LoopConfig) -> LoopConfig:
        return LoopConfig(steps=given.steps or default.steps, seed=given.seed)

    if given.stage == "autoencoder":
        train_autoencoder(autoencoder, AutoencoderConfig(loop=loop(AutoencoderConfig.loop)))
    elif given.stage == "teacher":
        train_teacher(teacher, autoencoder, TeacherConfig(loop=loop(TeacherConfig.loop)))
    elif given.stage == "tdm":
        train_tdm(tdm, teacher, TDMConfig(loop=loop(TDMConfig.loop)))
    elif given.stage == "publish":
        publish(given.checkpoint, autoencoder, teacher, tdm)
    elif given.stage == "score":
        print_scores(given.checkpoint, given.run)
    else:
        draw_grid(given.checkpoint, given.run, given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
