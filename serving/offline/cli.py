"""`tdm-render`: makes the pictures and clips of a file of prompts."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from serving.command.arguments import add_model_arguments, model_sources
from serving.command.checks import check_artifacts
from serving.command.cli import prepare_environment
from serving.config import ServerConfig
from serving.offline.estimate import count, measure
from serving.offline.lines import STDIN, InputFormat, find_sources
from serving.offline.names import NUMBERS, TEXTS, NameTemplate
from serving.offline.outputs import OutputKind
from serving.offline.plan import Model, Planner, PlanOptions, check_defaults, find_models
from serving.offline.progress import Progress
from serving.offline.records import MANIFEST, Known, gather
from serving.offline.run import LOCAL, RayOptions, RunOptions, finish, open_output, render_here
from serving.offline.storage import Storage
from serving.schema.batch_line import FIELDS
from serving.telemetry.logs import set_up_logging
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.cli import add_backend_arguments, add_provenance_arguments, backend_config, provenance_config
from tdm_runtime.engine.engine import EngineConfig
from tdm_runtime.errors import TDMError
from tdm_runtime.media.provenance import Provenance
from tdm_runtime.safety import Safety

SOME_FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130
MAX_LIVE = 192
"""Pictures in the engine at once: enough for full batches of several sizes."""
CHUNK_PICTURES, SHARD_PICTURES = 64, 256
EXAMPLES = """
examples:
  tdm-render prompts.txt -o out                                  one prompt a line
  tdm-render requests.jsonl -o out --name '{model}/{id}-{seed}'  any request field a line
  tdm-render prompts.txt -o out --checkpoint WAN_FOLDER --set num_frames=33 --set output_format=webm
  tdm-render prompts.txt -o out --sweep num_inference_steps=1,2,4 --grid
  tdm-render 'sets/*.csv' -o s3://bucket/out --format webdataset --ray auto --workers 8
  generate-prompts | tdm-render - -o out --set size=64x64 --set num_inference_steps=2
  tdm-render requests.jsonl -o out --dry-run

Start a run that was stopped again, and it continues: pictures in the output folder are not made twice.
Exit status: 0, all pictures were made; 1, some lines failed (see manifest.jsonl); 2, the run could not be made.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        config, options = _config(given), _run_options(given)
        set_up_logging(config)
        Safety.load(config.blocked_words, config.safety_checker)
        Provenance(config.provenance)
        models = find_models(config)
        check_defaults(options.plan, models)
        if given.dry_run:
            return _estimate(config, models, options)
        return _render(given, config, models, options)
    except ImportError as error:
        print(f"tdm-render: {error}; pip install 'tdm-serve[render]' has Parquet and Ray Data", file=sys.stderr)
        return USAGE_ERROR
    except (TDMError, ValueError, OSError, RuntimeError) as error:
        print(f"tdm-render: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("tdm-render: stopped; start it again to continue", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tdm-render",
        description="Make the pictures and clips of a file of prompts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", help="file, glob or URL of .txt, .jsonl, .csv or .parquet; - is standard input")
    parser.add_argument("-o", "--output", required=True, help="folder or URL of the pictures and manifest.jsonl")
    _add_input_arguments(parser)
    _add_output_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check all lines, estimate time and bytes, write nothing"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help='Ray cluster, "auto" for this machine\'s; "local" starts one')
    parser.add_argument("--workers", type=int, default=1, help="engines on the cluster (%(default)s)")
    parser.add_argument("--gpus-per-worker", type=float, default=0.0, help="(%(default)s)")
    add_model_arguments(parser)
    add_backend_arguments(parser)
    parser.add_argument("--max-batch-size", type=int, default=EngineConfig.max_batch_size, help="(%(default)s)")
    parser.add_argument("--blocked-words", type=Path, help="file of words that prompts must not contain, one a line")
    parser.add_argument("--safety-checker", metavar="MODULE:FACTORY", help="see docs/security.md")
    add_provenance_arguments(parser)
    return parser


def _add_input_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input-format", choices=get_args(InputFormat), help="by default by the suffix; txt for -")
    parser.add_argument(
        "--seed", type=int, default=0, help="seeds of lines without one are drawn from this and their id (%(default)s)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="FIELD=VALUE",
        help="field of lines that do not have it, such as size=64x64; may be given several times",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        type=_sweep,
        metavar="FIELD=V1,V2",
        help="make each line with each value; two sweeps make a matrix",
    )
    parser.add_argument(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="let pictures share calls where that changes bits (torch); a second run may differ by 2 levels of 255",
    )


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=get_args(OutputKind), default="files", help="form of the output (%(default)s)"
    )
    fields = ", ".join(NUMBERS + TEXTS)
    parser.add_argument(
        "--name",
        metavar="TEMPLATE",
        help=f"names of pictures, such as '{{model}}/{{line:06d}}{{variant}}'; fields: {fields}",
    )
    parser.add_argument(
        "--shard-size",
        type=int,
        metavar="N",
        help=f"pictures in a shard ({SHARD_PICTURES}), or in what a worker takes at once ({CHUNK_PICTURES})",
    )
    parser.add_argument(
        "--grid", action="store_true", help="also write grid.png, a contact sheet of the first pictures"
    )


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    known = dict.fromkeys(itertools.chain.from_iterable(FIELDS.values()))
    if not equals or name not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE; fields are {', '.join(known)}")
    return name, _value(value)


def _sweep(text: str) -> tuple[str, tuple[Any, ...]]:
    name, value = _setting(text)
    values = [value] if not isinstance(value, str) else text.partition("=")[2].split(",")
    return name, tuple(_value(each) if isinstance(each, str) else each for each in values)


def _value(text: str) -> Any:
    """Return a number, true or false as such, and anything else as text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text


def _config(given: argparse.Namespace) -> ServerConfig:
    return ServerConfig(
        models=model_sources(given, DEFAULT_CHECKPOINT),
        loras=tuple(given.lora),
        blocked_words=given.blocked_words and given.blocked_words.resolve(),
        safety_checker=given.safety_checker,
        provenance=provenance_config(given),
        engine=EngineConfig(max_batch_size=given.max_batch_size, max_live=MAX_LIVE),
        backend=backend_config(given),
    )


def _run_options(given: argparse.Namespace) -> RunOptions:
    chunk_size = given.shard_size
    if chunk_size is None:
        chunk_size = CHUNK_PICTURES if given.format == "files" else SHARD_PICTURES
    if chunk_size < 1 or given.workers < 1:
        raise ValueError(f"--shard-size is {chunk_size} and --workers {given.workers}; both must be at least 1")
    if given.ray is not None and given.input == STDIN:
        raise ValueError("--ray reads the input in another process; save standard input to a file first")
    if given.name is not None:
        NameTemplate(given.name)
    plan = PlanOptions(
        sources=tuple(find_sources(given.input, given.input_format)),
        seed=given.seed,
        sweep=tuple(given.sweep),
        defaults=tuple(given.set),
        name=given.name,
        strict=given.strict,
        chunk_size=chunk_size,
    )
    url = given.output if "://" in given.output else os.path.abspath(given.output)
    return RunOptions(plan, url, given.format, given.grid)


def _render(given: argparse.Namespace, config: ServerConfig, models: Mapping[str, Model], options: RunOptions) -> int:
    storage, progress = Storage(options.url), Progress(what=_what(models))
    with storage.locked():
        _build(config)
        gather(storage)
        try:
            if given.ray is None:
                _render_here(config, models, options, progress)
            else:
                cluster = RayOptions(given.ray, given.workers, given.gpus_per_worker)
                _render_on_ray(config, models, options, cluster, progress)
        finally:
            progress.close()
        finish(options)
    print(_ending(progress, options, _what(models)), flush=True)
    return SOME_FAILED if progress.counts["failed"] else 0


def _render_here(config: ServerConfig, models: Mapping[str, Model], options: RunOptions, progress: Progress) -> None:
    images = _engine(config)
    try:
        chunks = Planner(options.plan, models, Known(Storage(options.url))).chunks()
        progress.start()
        asyncio.run(render_here(chunks, images, options, MAX_LIVE, progress))
    finally:
        images.close()


def _render_on_ray(
    config: ServerConfig, models: Mapping[str, Model], options: RunOptions, cluster: RayOptions, progress: Progress
) -> None:
    if cluster.address == LOCAL:
        prepare_environment()
    from serving.offline.on_ray import render_on_ray

    render_on_ray(config, models, options, cluster, MAX_LIVE, progress)


def _estimate(config: ServerConfig, models: Mapping[str, Model], options: RunOptions) -> int:
    storage, _ = open_output(options)
    estimate = count(Planner(options.plan, models, Known(storage)).chunks(), _what(models))
    if estimate.sample:
        _build(config)
        images = _engine(config)
        try:
            asyncio.run(measure(estimate, images, MAX_LIVE))
        finally:
            images.close()
    print(estimate)
    return SOME_FAILED if estimate.num_failed else 0


def _build(config: ServerConfig) -> None:
    for source in config.models:
        check_artifacts(open_checkpoint(source.folder, config.file_hashes), config.backend)


def _engine(config: ServerConfig) -> Any:
    from serving.images.local import ImageService
    from serving.telemetry.metrics import ServerMetrics

    return ImageService(config, ServerMetrics())


def _what(models: Mapping[str, Model]) -> str:
    """Return the plural of what the models make."""
    makes_clips = {model.recipe.frames is not None for model in models.values()}
    return "pictures and clips" if len(makes_clips) > 1 else "clips" if True in makes_clips else "pictures"


def _ending(progress: Progress, options: RunOptions, what: str) -> str:
    counts = progress.counts
    return (
        f"{counts['made']} {what} made, {counts['kept']} kept, {counts['failed']} failed, "
        f"{progress.pictures_per_s:.1f} {what}/s; {options.url}/{MANIFEST}"
    )


if __name__ == "__main__":
    sys.exit(main())
