"""The commands of `tdm-train` that measure: their arguments, and what they call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tdm_runtime.checkpoint.folder import CLIP_CHECKPOINT


def add_measure_commands(commands: Any) -> None:
    """Add the arguments of `MEASURE_COMMANDS` to the subparsers of `tdm-train`."""
    _add_vbench(commands)
    _add_measure(commands)
    _add_user_study(commands)


def _add_vbench(commands: Any) -> None:
    vbench = commands.add_parser("vbench", help="make VBench's clips and score them with its own package")
    vbench.add_argument("--checkpoint", type=Path, default=CLIP_CHECKPOINT)
    vbench.add_argument("--output", type=Path, required=True, help="folder of clips and scores; a killed run resumes")
    vbench.add_argument("--dimensions", nargs="+", help="dimensions to score; by default all that the prompts allow")
    vbench.add_argument("--prompts", type=Path, help="text file, one prompt a line, instead of VBench's own suite")
    vbench.add_argument("--clips", type=int, default=5, help="clips of each prompt (%(default)s)")
    vbench.add_argument("--steps", type=int, help="steps of each clip; by default the most of the checkpoint")
    vbench.add_argument("--seed", type=int, default=0, help="seed that each clip's own is drawn from (%(default)s)")
    vbench.add_argument("--python", default=sys.executable, help="interpreter that has the package (this one)")
    vbench.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")


def _add_measure(commands: Any) -> None:
    measure = commands.add_parser("measure", help="score pictures: CLIP score, aesthetic score, HPS v2.1 and FID")
    source = measure.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="checkpoint that makes a picture of each prompt")
    source.add_argument(
        "--pictures", type=Path, help='folder of pictures by name, or JSONL file with "image" on each line'
    )
    measure.add_argument("--prompts", type=Path, required=True, help='JSONL file, {"prompt": ...} on each line')
    measure.add_argument("--weights", type=Path, required=True, help="folder of the scorers' published weights")
    measure.add_argument(
        "--output", type=Path, required=True, help="folder of scores and pictures; a killed run resumes"
    )
    measure.add_argument("--reference", type=Path, help="folder of pictures, to which the FID is the distance")
    measure.add_argument("--steps", type=int, help="steps of each picture; by default those of the checkpoint")
    measure.add_argument("--seed", type=int, default=0, help="seed that each picture's own is drawn from (%(default)s)")
    measure.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")


def _add_user_study(commands: Any) -> None:
    study = commands.add_parser("user-study", help="ask people which of two pictures or clips is better")
    actions = study.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="write the page that asks")
    for side in "ab":
        make.add_argument(
            f"--{side}", type=Path, required=True, help="checkpoint, or folder of pictures or clips by name"
        )
        make.add_argument(f"--steps-{side}", type=int, help="steps of a checkpoint; by default its own")
    make.add_argument("--prompts", type=Path, required=True, help='JSONL file, {"prompt": ...} on each line')
    make.add_argument("--output", type=Path, required=True, help="folder: page/ to publish, and key.json to keep")
    make.add_argument(
        "--question", action="append", help="question of each pair; several are asked one after the other"
    )
    make.add_argument(
        "--seed", type=int, help="seed of order, sides and samples; by default drawn, so that none can guess"
    )
    tally = actions.add_parser("tally", help="count the answers")
    tally.add_argument("answers", type=Path, nargs="+", help="files that raters have saved")
    tally.add_argument("--key", type=Path, required=True, help="key.json of the study")
    tally.add_argument("--output", type=Path, help="JSON file of the counts")


def _vbench(given: argparse.Namespace) -> None:
    from training.measure.vbench import run_vbench

    run_vbench(
        given.output,
        given.checkpoint,
        given.dimensions,
        given.prompts,
        clips_per_prompt=given.clips,
        steps=given.steps,
        seed=given.seed,
        python=given.python,
        device=given.device,
    )


def _measure(given: argparse.Namespace) -> None:
    from training.measure.picture_scores import measure_pictures

    measure_pictures(
        given.output,
        given.prompts,
        given.weights,
        checkpoint=given.checkpoint,
        pictures=given.pictures,
        reference=given.reference,
        steps=given.steps,
        seed=given.seed,
        device=given.device,
    )


def _user_study(given: argparse.Namespace) -> None:
    if given.action == "make":
        from training.measure.user_study import Side, make_study

        sides = Side(given.a, given.steps_a), Side(given.b, given.steps_b)
        make_study(given.output, *sides, given.prompts, given.question, given.seed)
    else:
        from training.measure.tally import print_tally

        print_tally(given.answers, given.key, given.output)


MEASURE_COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "vbench": _vbench,
    "measure": _measure,
    "user-study": _user_study,
}
