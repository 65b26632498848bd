"""Commands of `tdm-train` that distil a pretrained model: preset, plan, embed, encode, finetune, distill."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.config import DistillConfig, config_as_toml, load_config
from training.pretrained.presets import PRESETS, PUBLISHED_BASES, as_dmd2, as_lcm, as_tcd
from training.run.finetune import FinetuneConfig

_METHODS: Mapping[str, Callable[[DistillConfig], DistillConfig]] = {
    "tdm": lambda config: config,
    "dmd2": as_dmd2,
    "lcm": as_lcm,
    "tcd": as_tcd,
}


def add_commands(commands: Any) -> None:
    """Add the parsers of the commands to argparse's sub-parsers."""
    preset = commands.add_parser("preset", help="print a preset with every setting, as TOML")
    preset.add_argument("name", choices=sorted(PRESETS))

    planned = commands.add_parser("plan", help="print the memory of a preset at the published size of its model")
    planned.add_argument("--preset", choices=sorted(PRESETS), required=True)
    planned.add_argument("--config", type=Path, help="TOML file of settings that differ from the preset")
    planned.add_argument("--processes", type=int, default=1, help="GPUs that share the batch (%(default)s)")

    embed = commands.add_parser("embed", help="encode the prompts of a file once")
    embed.add_argument("--prompts", type=Path, required=True, help='JSONL file, {"prompt": ...} on each line')
    encode = commands.add_parser(
        "encode", help="encode a picture or clip for each prompt, for methods that learn from data"
    )
    encode.add_argument("--images", type=Path, required=True, help='folder, or JSONL file with "image" on each line')
    for command in (embed, encode):
        command.add_argument("--base", type=Path, required=True, help="diffusers folder of the base model")
        command.add_argument("--output", type=Path, required=True, help="folder of the embeddings")
        command.add_argument("--preset", choices=sorted(PRESETS), required=True, help="preset that sets the size")
        command.add_argument("--config", type=Path, help="TOML file of the run, if it changes size or frames")

    finetune = commands.add_parser("finetune", help="fine-tune a teacher before its distillation (TDM-unify-SFT)")
    finetune.add_argument("--base", type=Path, required=True, help="diffusers folder of the teacher")
    finetune.add_argument("--embeddings", type=Path, required=True, help="folder that `embed` and `encode` wrote")
    finetune.add_argument("--output", type=Path, required=True, help="folder of the run; the result is base/ in it")
    finetune.add_argument("--steps", type=int, default=FinetuneConfig.steps)
    finetune.add_argument("--learning-rate", type=float, default=FinetuneConfig.learning_rate)

    distil = commands.add_parser("distill", help="distil a diffusers model")
    distil.add_argument("--preset", choices=sorted(PRESETS), required=True)
    distil.add_argument("--config", type=Path, help="TOML file of settings that differ from the preset")
    distil.add_argument("--base", type=Path, required=True, help="diffusers folder of the teacher")
    texts = distil.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompts", type=Path, help="JSONL file; it is encoded once, into embeddings/ of the run")
    texts.add_argument("--embeddings", type=Path, help="folder that `embed` wrote")
    distil.add_argument("--method", choices=_METHODS, default="tdm", help="what makes the student (%(default)s)")
    distil.add_argument(
        "--student", type=Path, help="folder of a student to start from: model/ of an earlier run, or an LCM"
    )
    distil.add_argument("--output", type=Path, required=True, help="folder of the run; the result is model/ in it")


def _preset(given: argparse.Namespace) -> None:
    print(config_as_toml(PRESETS[given.name]), end="")


def _plan(given: argparse.Namespace) -> None:
    from training.pretrained.plan import PUBLISHED, plan

    config = load_config(PRESETS[given.preset], given.config)
    print(plan(config, PUBLISHED[PUBLISHED_BASES[given.preset]], given.processes))


def _embed(given: argparse.Namespace) -> None:
    from training.pretrained.prompts import embed_prompts

    config = load_config(PRESETS[given.preset], given.config)
    embed_prompts(given.base, given.prompts, given.output, config.width, config.height)


def _encode(given: argparse.Namespace) -> None:
    from training.pretrained.latents import encode_latents

    config = load_config(PRESETS[given.preset], given.config)
    encode_latents(given.base, given.images, given.output, config.width, config.height, config.frames)


def _finetune(given: argparse.Namespace) -> None:
    from training.pretrained.train import finetune_backbone

    config = FinetuneConfig(steps=given.steps, learning_rate=given.learning_rate)
    finetune_backbone(given.output, given.base, given.embeddings, config)


def _distill(given: argparse.Namespace) -> None:
    from training.pretrained.prompts import embed_once
    from training.pretrained.train import train_backbone

    config = _METHODS[given.method](load_config(PRESETS[given.preset], given.config))
    embeddings = given.embeddings or given.output / "embeddings"
    if given.prompts:
        embed_once(given.base, given.prompts, embeddings, config.width, config.height)
    model = train_backbone(given.output, given.base, embeddings, config, student_folder=given.student)
    print(f"the student is {model}")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "preset": _preset,
    "plan": _plan,
    "embed": _embed,
    "encode": _encode,
    "finetune": _finetune,
    "distill": _distill,
}
"""Name on the command line -> function that runs the command."""
