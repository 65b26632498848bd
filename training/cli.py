"""`tdm-train`: distil few-step students, prove the method, and make the embedded checkpoint.

Embedded model:  tdm-train emoji                      every stage, from glyphs to a checkpoint to serve
                 tdm-train emoji teacher              one stage; a killed stage resumes exactly
                 tdm-train score | glyphs | wrong-k | tiny-vae | grid | ablate     measurements
Embedded clip model: tdm-train emoji-video [stage]    every stage or one, from the embedded picture model
                 tdm-train score-video                scores of student and teacher, and a contact sheet
Any model:       tdm-train measure --checkpoint DIR --prompts FILE --weights DIR --output DIR     scores of pictures
                 tdm-train vbench --checkpoint DIR --output DIR       VBench's scores of clips, by its own package
                 tdm-train user-study make | tally    a page that asks people which of two is better, and its count
Your own model:  tdm-train distill --preset sd15 --base DIR --prompts FILE --output DIR
                 tdm-train preset sd15                every setting with its value, as TOML
                 tdm-train plan --preset sd15         memory at the model's published size
The method:      tdm-train proof [mixture|gaussian|colours]   cases with a known answer
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tdm_runtime.checkpoint.folder import CLIP_CHECKPOINT, DEFAULT_CHECKPOINT
from tdm_runtime.checkpoint.folder_files import TINY_VAE
from tdm_runtime.errors import TDMError
from training.measure.commands import MEASURE_COMMANDS, add_measure_commands
from training.methods.precision import fastest_precision
from training.pretrained.commands import COMMANDS, add_commands
from training.run.loop import LoopConfig

EMOJI_STAGES = ("autoencoder", "teacher", "decoder", "student", "tiny-autoencoder", "publish")
RESTORED_TEACHER = "teacher-from-checkpoint"
"""Stage that stands in for `autoencoder` and `teacher`."""
VIDEO_STAGES = ("clips", "teacher", "student", "publish")
DEFAULT_RUN = Path("runs/emoji")
DEFAULT_VIDEO_RUN = Path("runs/emoji-video")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Return the exit status, which is 2 for an error of the caller."""
    given = _parser().parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        _COMMANDS[given.command](given)
    except (TDMError, ValueError, OSError, SafetensorError) as error:  # the last two: files, also on a full disk
        print(f"tdm-train: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tdm-train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)

    emoji = commands.add_parser("emoji", help="make the embedded checkpoint, or run one of its stages")
    emoji.add_argument(
        "stage",
        nargs="?",
        choices=(*EMOJI_STAGES, RESTORED_TEACHER),
        help=f"stage to run; by default all in order but {RESTORED_TEACHER}, which makes a teacher of --checkpoint in "
        "minutes, for ablations",
    )
    emoji.add_argument("--steps", type=int, help="iterations, instead of the default of the stage")
    emoji.add_argument("--seed", type=int, default=0)
    for name, help_text in (
        ("score", "table of scores of the checkpoint and its teacher"),
        ("glyphs", "tables of the glyphs that can be read, of the worst ones and of what they are taken for"),
        ("wrong-k", "table of the checkpoint when its K is wrong or missing"),
        ("tiny-vae", "table of scores of the tiny and the full autoencoder"),
        ("grid", "picture of samples, prompts down and samplers across"),
    ):
        commands.add_parser(name, help=help_text)
    for name in ("emoji", "score", "glyphs", "wrong-k", "tiny-vae", "grid"):
        command = commands.choices[name]
        command.add_argument("--run", type=Path, default=DEFAULT_RUN, help="working folder (%(default)s)")
        command.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    commands.choices["score"].add_argument(
        "--repetitions", type=int, default=1, help="with other scenes and noise; several give intervals (%(default)s)"
    )
    commands.choices["grid"].add_argument("--output", type=Path, default=Path("grid.png"))
    commands.choices["glyphs"].add_argument("--sheet", type=Path, help="file for a picture of the worst glyphs")
    commands.choices["glyphs"].add_argument("--seeds", type=int, default=8, help="pictures of a glyph (%(default)s)")
    commands.choices["glyphs"].add_argument("--damaged", action="store_true", help="read damaged students too")

    _add_video(commands)
    add_measure_commands(commands)

    ablate = commands.add_parser(
        "ablate",
        help="the paper's ablations on the emoji model; a --run without a teacher gets one of the embedded checkpoint",
    )
    ablate.add_argument("--run", type=Path, default=DEFAULT_RUN)
    ablate.add_argument("--output", type=Path, default=Path("runs/ablation"))
    ablate.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    ablate.add_argument("--variants", nargs="+", help="rows to run; by default all")
    ablate.add_argument("--print", action="store_true", help="print the tables of the finished rows and the orderings")

    proof = commands.add_parser("proof", help="distil cases with a known answer, and print a table")
    proof.add_argument(
        "case",
        nargs="?",
        choices=("mixture", "gaussian", "colours"),
        default="mixture",
        help="mixture: variants on Gaussians in the plane. gaussian: where each target of the fake score leaves an "
        "inner step. colours: a tiny flow transformer, trained and distilled",
    )
    proof.add_argument("--flow", action="store_true", help="in the coordinates of a flow; colours always are")
    proof.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    proof.add_argument("--variants", nargs="+", default=[], help="rows of the mixture's table; by default all")

    add_commands(commands)
    return parser


def _add_video(commands: Any) -> None:
    video = commands.add_parser("emoji-video", help="make the embedded clip checkpoint, or run one of its stages")
    video.add_argument("stage", nargs="?", choices=VIDEO_STAGES, help="stage to run; by default all in order")
    video.add_argument("--steps", type=int, help="iterations, instead of the default of the stage")
    video.add_argument("--seed", type=int, default=0)
    video.add_argument("--pictures", type=Path, default=DEFAULT_CHECKPOINT, help="picture checkpoint to grow from")
    score = commands.add_parser("score-video", help="table of scores of the clip checkpoint and its teacher")
    score.add_argument("--clips", type=int, default=36, help="clips of either kind, seen and held out (%(default)s)")
    score.add_argument("--sheet", type=Path, help="picture file for a contact sheet, instead of the table")
    for command in (video, score):
        command.add_argument("--run", type=Path, default=DEFAULT_VIDEO_RUN, help="working folder (%(default)s)")
        command.add_argument("--checkpoint", type=Path, default=CLIP_CHECKPOINT)


def _emoji(given: argparse.Namespace) -> None:
    stages = [given.stage] if given.stage else EMOJI_STAGES
    for stage in stages:
        _EMOJI[stage](given)


def _autoencoder(given: argparse.Namespace) -> None:
    from training.emoji.stages.autoencoder import AutoencoderConfig, train_autoencoder

    config = AutoencoderConfig()
    train_autoencoder(given.run / "autoencoder", replace(config, loop=_loop(config.loop, given)))


def _teacher(given: argparse.Namespace) -> None:
    from training.emoji.stages.teacher import TeacherConfig, train_teacher

    config = TeacherConfig()
    train_teacher(given.run / "teacher", given.run / "autoencoder", replace(config, loop=_loop(config.loop, given)))


def _restored_teacher(given: argparse.Namespace) -> None:
    from training.emoji.stages.bases import RESTORED, restore_teacher

    config = replace(RESTORED, seed=given.seed, steps=given.steps or RESTORED.steps)
    restore_teacher(given.run, given.checkpoint, config)


def _decoder(given: argparse.Namespace) -> None:
    from training.emoji.stages.autoencoder import DecoderConfig, train_decoder

    config = DecoderConfig()
    train_decoder(given.run / "decoder", given.run / "autoencoder", replace(config, loop=_loop(config.loop, given)))


def _student(given: argparse.Namespace) -> None:
    from training.emoji.stages.student import EMOJI, train_student

    config = replace(EMOJI, seed=given.seed, steps=given.steps or EMOJI.steps)
    train_student(given.run / "student", given.run / "teacher", config, given.run / "autoencoder")


def _tiny_autoencoder(given: argparse.Namespace) -> None:
    from training.emoji.stages.tiny_autoencoder import TinyAutoencoderConfig, train_tiny_autoencoder

    config = TinyAutoencoderConfig()
    run: Path = given.run
    folders = run / "tiny-autoencoder", run / "decoder", run / "teacher", run / "student"
    train_tiny_autoencoder(*folders, replace(config, loop=_loop(config.loop, given)))


def _publish(given: argparse.Namespace) -> None:
    from training.emoji.stages.publish import publish

    run: Path = given.run
    tiny = run / "tiny-autoencoder" if (run / "tiny-autoencoder" / TINY_VAE).is_dir() else None
    publish(given.checkpoint, run / "decoder", run / "teacher", run / "student", tiny)


def _emoji_video(given: argparse.Namespace) -> None:
    for stage in [given.stage] if given.stage else VIDEO_STAGES:
        _EMOJI_VIDEO[stage](given)


def _clips(given: argparse.Namespace) -> None:
    from training.emoji_video.latents import encode_clips

    encode_clips(given.run / "clips", given.pictures, seed=given.seed, precision=fastest_precision())


def _video_teacher(given: argparse.Namespace) -> None:
    from training.emoji_video.teacher import VideoTeacherConfig, train_video_teacher

    config = VideoTeacherConfig()
    config = replace(config, loop=_loop(config.loop, given), precision=fastest_precision())
    train_video_teacher(given.run / "teacher", given.run / "clips", given.pictures, config)


def _video_student(given: argparse.Namespace) -> None:
    from training.emoji_video.student import EMOJI_VIDEO, train_video_student

    steps = given.steps or EMOJI_VIDEO.steps
    config = replace(EMOJI_VIDEO, seed=given.seed, steps=steps, precision=fastest_precision())
    train_video_student(given.run / "student", given.run / "teacher", config)


def _video_publish(given: argparse.Namespace) -> None:
    from training.emoji_video.publish import publish_video

    publish_video(given.checkpoint, given.pictures, given.run / "teacher", given.run / "student")


def _loop(loop: LoopConfig, given: argparse.Namespace) -> LoopConfig:
    return replace(loop, seed=given.seed, steps=given.steps or loop.steps)


def _score(given: argparse.Namespace) -> None:
    from training.emoji.report.scores import print_scores

    print_scores(given.checkpoint, given.run, repetitions=given.repetitions)


def _glyphs(given: argparse.Namespace) -> None:
    from training.emoji.report.legibility import print_legibility

    print_legibility(given.checkpoint, given.run, given.sheet, damaged=given.damaged, seeds=given.seeds)


def _score_video(given: argparse.Namespace) -> None:
    from training.emoji_video.report import draw_contact_sheet, print_video_scores

    if given.sheet:
        draw_contact_sheet(given.checkpoint, given.sheet)
    else:
        print_video_scores(given.checkpoint, given.run, given.clips, fastest_precision())


def _wrong_k(given: argparse.Namespace) -> None:
    from training.emoji.report.scores import print_wrong_step_counts

    print_wrong_step_counts(given.checkpoint)


def _tiny_vae(given: argparse.Namespace) -> None:
    from training.emoji.report.tiny_report import print_tiny_vae

    print_tiny_vae(given.checkpoint)


def _grid(given: argparse.Namespace) -> None:
    from training.emoji.report.grid import draw_grid

    draw_grid(given.checkpoint, given.run, given.output)


def _ablate(given: argparse.Namespace) -> None:
    from training.emoji.report.ablation import VARIANTS, run_ablation
    from training.emoji.report.ablation_table import print_ablation

    if unknown := sorted(set(given.variants or ()) - set(VARIANTS)):
        raise ValueError(f"unknown variants {unknown}; known are {list(VARIANTS)}")
    if given.print:
        print_ablation(given.output)
    else:
        run_ablation(given.run, given.output, given.seeds, given.variants or tuple(VARIANTS))


def _proof(given: argparse.Namespace) -> None:
    from training.proofs import print_colours, print_gaussian, print_mixture

    if given.case == "mixture":
        print_mixture(given.seeds, is_flow=given.flow, names=given.variants)
    elif given.case == "gaussian":
        print_gaussian(given.seeds, is_flow=given.flow)
    else:
        print_colours(given.seeds)


_EMOJI: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "autoencoder": _autoencoder,
    "teacher": _teacher,
    RESTORED_TEACHER: _restored_teacher,
    "decoder": _decoder,
    "student": _student,
    "tiny-autoencoder": _tiny_autoencoder,
    "publish": _publish,
}
_EMOJI_VIDEO: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "clips": _clips,
    "teacher": _video_teacher,
    "student": _video_student,
    "publish": _video_publish,
}
_COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "emoji": _emoji,
    "emoji-video": _emoji_video,
    "score": _score,
    "glyphs": _glyphs,
    "score-video": _score_video,
    "wrong-k": _wrong_k,
    "tiny-vae": _tiny_vae,
    "grid": _grid,
    "ablate": _ablate,
    "proof": _proof,
    **MEASURE_COMMANDS,
    **COMMANDS,
}


if __name__ == "__main__":
    sys.exit(main())
