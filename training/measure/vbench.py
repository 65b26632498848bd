"""VBench, the benchmark of text-to-video models (Huang et al. 2024): clips for it, its own package on them, its totals.

VBench needs other versions of torch, numpy and transformers than this project, so its package runs in an interpreter of
its own. `check_ready` looks for its weights first: VBench would download what is missing in the middle of a run.

    OUTPUT/clips/{prompt}-{index}.mp4               clips, under the names that VBench looks for
    OUTPUT/clips.json                               settings of the clips; a later run must have the same
    OUTPUT/results/{dimension}_eval_results.json    what VBench writes
    OUTPUT/scores.json                              dimensions and totals
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.whole_file import write_whole
from training.measure.samples import keep_settings, make_missing, sample_seed

CLIPS_PER_PROMPT = 5
"""Clips that VBench reads for each prompt of its suite."""
MAX_CLIPS_PER_PROMPT = 1000
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0
VIT_B = "clip_model/ViT-B-32.pt", "openaipublic.azureedge.net: CLIP ViT-B-32.pt"
GRIT = "grit_model/grit_b_densecap_objectdet.pth", "datarelease.blob.core.windows.net/grit/models"
VICLIP = (
    ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "huggingface.co/OpenGVLab/VBench_Used_Models"),
    ("ViCLIP/bpe_simple_vocab_16e6.txt.gz", "github.com/openai/CLIP, folder clip"),
)


class Dimension(NamedTuple):
    """A dimension of VBench. Limits, weights and groups are those of VBench's `scripts/constant.py`."""

    group: Literal["quality", "semantic"]
    lowest: float
    """Score that counts as 0."""
    highest: float
    """Score that counts as 1."""
    weights: tuple[tuple[str, str], ...]
    """Files below VBench's cache folder, each with its source (`init_submodules` of vbench 0.1.5)."""
    weight: float = 1.0
    is_for_any_prompt: bool = True
    """Whether it needs no labels of VBench's own prompts."""


DIMENSIONS: Mapping[str, Dimension] = {
    "subject_consistency": Dimension("quality", 0.1462, 1.0, (
        ("dino_model/facebookresearch_dino_main/hubconf.py", "github.com/facebookresearch/dino, the whole repository"),
        ("dino_model/dino_vitbase16_pretrain.pth", "dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain"),
    )),
    "background_consistency": Dimension("quality", 0.2615, 1.0, (VIT_B,)),
    "temporal_flickering": Dimension("quality", 0.6293, 1.0, ()),
    "motion_smoothness": Dimension("quality", 0.706, 0.9975, (
        ("amt_model/amt-s.pth", "huggingface.co/lalala125/AMT"),
    )),
    "aesthetic_quality": Dimension("quality", 0.0, 1.0, (
        ("clip_model/ViT-L-14.pt", "openaipublic.azureedge.net: CLIP ViT-L-14.pt"),
        ("aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth", "github.com/LAION-AI/aesthetic-predictor"),
    )),
    "imaging_quality": Dimension("quality", 0.0, 1.0, (
        ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth", "github.com/chaofengc/IQA-PyTorch, release v0.1-weights"),
    )),
    "dynamic_degree": Dimension("quality", 0.0, 1.0, (
        ("raft_model/models/raft-things.pth", "github.com/princeton-vl/RAFT, models.zip"),
    ), weight=0.5),
    "object_class": Dimension("semantic", 0.0, 1.0, (GRIT,), is_for_any_prompt=False),
    "multiple_objects": Dimension("semantic", 0.0, 1.0, (GRIT,), is_for_any_prompt=False),
    "human_action": Dimension("semantic", 0.0, 1.0, (
        ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth", "huggingface.co/OpenGVLab/VBench_Used_Models"),
    )),
    "color": Dimension("semantic", 0.0, 1.0, (GRIT,), is_for_any_prompt=False),
    "spatial_relationship": Dimension("semantic", 0.0, 1.0, (GRIT,), is_for_any_prompt=False),
    "scene": Dimension("semantic", 0.0, 0.8222, (
        ("caption_model/tag2text_swin_14m.pth", "huggingface.co/spaces/xinyu1205/recognize-anything"),
    ), is_for_any_prompt=False),
    "appearance_style": Dimension("semantic", 0.0009, 0.2855, (VIT_B,), is_for_any_prompt=False),
    "temporal_style": Dimension("semantic", 0.0, 0.364, VICLIP),
    "overall_consistency": Dimension("semantic", 0.0, 0.364, VICLIP),
}  # fmt: skip

FIND = """
import importlib.util
found = importlib.util.find_spec("vbench")
print(found.submodule_search_locations[0] if found else "")
"""
EVALUATE = """
import sys
from vbench import VBench
info, clips, output, device, mode, dimension = sys.argv[1:]
VBench(device, info, output).evaluate(clips, dimension, dimension_list=[dimension], local=True, mode=mode)
"""


@dataclass(frozen=True)
class ClipSettings:
    """What the clips of a folder have in common."""

    num_inference_steps: int
    width: int
    height: int
    frames: int
    fps: int
    seed: int
    """Seed of the run; each clip has its own, drawn from this one, its prompt and its index."""
    digest: str
    """Digest of the checkpoint."""
    prompts: str = ""
    """sha256 of prompts from a file, all of whose clips are scored; empty for VBench's own."""


def run_vbench(
    output: Path,
    checkpoint: Path,
    dimensions: Sequence[str] | None,
    prompts_file: Path | None,
    *,
    clips_per_prompt: int = CLIPS_PER_PROMPT,
    steps: int | None = None,
    seed: int = 0,
    python: str = sys.executable,
    device: str = "cpu",
) -> VBenchScores:
    """Make the clips, score them and write the scores.

    Args:
        output: Folder of clips and scores.
        dimensions: Dimensions to score; None takes all that the prompts allow.
        prompts_file: Text file, one prompt a line; None takes VBench's own suite.
        python: Interpreter that has VBench's package.
        device: Device of VBench's models, "cpu" or "cuda".

    Raises:
        ValueError, FileNotFoundError: Package, weights, prompts or settings are wrong; the message names the remedy.
        TDMError: The checkpoint cannot be served.
    """
    is_suite = prompts_file is None
    if not 1 <= clips_per_prompt <= MAX_CLIPS_PER_PROMPT or (is_suite and clips_per_prompt < CLIPS_PER_PROMPT):
        least = CLIPS_PER_PROMPT if is_suite else 1
        raise ValueError(f"the clips of each prompt are {clips_per_prompt}; take {least} to {MAX_CLIPS_PER_PROMPT}")
    if dimensions is None:
        dimensions = [name for name, dimension in DIMENSIONS.items() if is_suite or dimension.is_for_any_prompt]
    info_file = package_folder(python) / "VBench_full_info.json"
    check_ready(dimensions, is_suite)
    prompts = suite_prompts(info_file, dimensions) if prompts_file is None else file_prompts(prompts_file)
    model = load_model(checkpoint)
    settings = clip_settings(model, steps, seed)
    if not is_suite:
        settings = replace(settings, prompts=hashlib.sha256("\n".join(prompts).encode()).hexdigest())
    make_clips(output, model, settings, prompts, clips_per_prompt)
    evaluate(output, python, info_file, dimensions, is_suite, device)
    scores = read_results(output / "results")
    write_scores(output, scores, asdict(settings))
    return scores


# -- clips -----------------------------------------------------------------------------------------


def suite_prompts(info_file: Path, dimensions: Sequence[str]) -> list[str]:
    """Return the prompts of some dimensions from VBench's `VBench_full_info.json`, each once.

    Raises:
        ValueError: The file has another layout, or no prompt of a dimension.
    """
    try:
        rows = [(str(row["prompt_en"]), frozenset(row["dimension"])) for row in json.loads(info_file.read_bytes())]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{info_file} is no VBench_full_info.json ({error!r}); take the one in the package") from None
    for dimension in dimensions:
        if not any(dimension in names for _, names in rows):
            raise ValueError(f"{info_file} has no prompt for {dimension}; take the file of the installed package")
    return list(dict.fromkeys(prompt for prompt, names in rows if names & set(dimensions)))


def file_prompts(file: Path) -> list[str]:
    """Return the prompts of a text file, one a line. They become names of files, from which VBench reads them.

    Raises:
        ValueError: A prompt cannot be a name, or there is none.
    """
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not (prompt := line.strip()):
            continue
        if "/" in prompt or len(prompt.encode()) > 240:
            raise ValueError(f"{file}, line {number}: VBench's clips are named by prompt; no / and at most 240 bytes")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{file} holds no prompt; write one a line")
    return list(dict.fromkeys(prompts))


def clip_settings(model: LoadedModel, steps: int | None, seed: int) -> ClipSettings:
    """Return the settings of a checkpoint's default clips.

    Args:
        steps: Steps of each clip; None takes the most.

    Raises:
        ValueError: The checkpoint makes pictures.
    """
    recipe = model.recipe
    if recipe.frames is None or recipe.fps is None:
        raise ValueError(f"{recipe.name} makes pictures; VBench scores clips: name a clip checkpoint")
    width, height = recipe.native_sizes[0]
    steps = recipe.default_steps if steps is None else steps
    return ClipSettings(steps, width, height, recipe.frames.default, recipe.fps, seed, model.digest)


def make_clips(output: Path, model: LoadedModel, settings: ClipSettings, prompts: Sequence[str], each: int) -> int:
    """Make the clips that OUTPUT/clips lacks; a killed run continues. Return how many were made.

    Args:
        each: Clips of each prompt.

    Raises:
        ValueError: The folder holds clips of other settings.
        InvalidRequestError: The checkpoint refuses a prompt or a setting.
    """
    keep_settings(output / "clips.json", asdict(settings))
    wanted = {
        f"{prompt}-{index}.mp4": SamplingParams(
            prompt, sample_seed(settings.seed, prompt, index), settings.num_inference_steps,
            settings.width, settings.height, frames=settings.frames, fps=settings.fps,
        )
        for prompt in prompts
        for index in range(each)
    }  # fmt: skip
    return make_missing(output / "clips", model, wanted, "mp4")


# -- VBench's package ------------------------------------------------------------------------------


def package_folder(python: str) -> Path:
    """Return the folder of VBench's package in another interpreter.

    Raises:
        FileNotFoundError: There is no such interpreter, or it lacks VBench.
    """
    try:
        found = subprocess.run([python, "-c", FIND], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise FileNotFoundError(f"{python} does not run ({error}); name an interpreter with --python") from None
    if not found:
        raise FileNotFoundError(
            f"{python} has no package vbench; install vbench==0.1.5 in an environment of its own and name its "
            "interpreter with --python"
        )
    return Path(found)


def check_ready(dimensions: Sequence[str], is_suite: bool) -> None:
    """Check that VBench can score these dimensions without a download.

    Args:
        is_suite: Whether the prompts are VBench's own.

    Raises:
        ValueError: A dimension is unknown, or needs VBench's own prompts.
        FileNotFoundError: Weights are missing. The message names the file, its place and its source.
    """
    for name in dimensions:
        if (dimension := DIMENSIONS.get(name)) is None:
            raise ValueError(f"{name!r} is no dimension of VBench; known are {', '.join(DIMENSIONS)}")
        if not is_suite and not dimension.is_for_any_prompt:
            raise ValueError(f"{name} needs the labels of VBench's own prompts; leave out --prompts, or {name}")
        for file, source in dimension.weights:
            if not (cache_folder() / file).is_file():
                raise FileNotFoundError(
                    f"{cache_folder() / file} is missing, which {name} needs; get {Path(file).name} from {source} and "
                    "put it there (VBENCH_CACHE_DIR moves the folder)"
                )


def cache_folder() -> Path:
    """Return the folder where VBench looks for weights."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


def evaluate(
    output: Path, python: str, info_file: Path, dimensions: Sequence[str], is_suite: bool, device: str
) -> None:
    """Run VBench's package on OUTPUT/clips, once for each dimension: one that fails loses no other.

    Args:
        info_file: `VBench_full_info.json`; read for VBench's own prompts only.
        device: Device of VBench's models, "cpu" or "cuda".

    Raises:
        ValueError: VBench failed. The message has its last line.
    """
    results = output / "results"
    results.mkdir(exist_ok=True)
    mode = "vbench_standard" if is_suite else "custom_input"
    for name in dimensions:
        print(f"VBench: {name}", flush=True)
        paths = [str(path.resolve()) for path in (info_file, output / "clips", results)]
        done = subprocess.run(
            [python, "-c", EVALUATE, *paths, device, mode, name], capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            (results / f"{name}.log").write_text(done.stdout + done.stderr)
            last = (done.stderr.strip().splitlines() or ["it wrote no message"])[-1]
            raise ValueError(f"VBench failed on {name}: {last} (all of it is in {results / f'{name}.log'})")


# -- scores ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VBenchScores:
    """Scores of a model, 0..1. A total is None while one of its dimensions has no score."""

    dimensions: Mapping[str, float]
    """As VBench measures them."""
    num_clips: Mapping[str, int]
    """Number of scored clips by dimension."""
    quality: float | None = None
    semantic: float | None = None
    total: float | None = None


def read_results(folder: Path) -> VBenchScores:
    """Read what VBench has written in a folder, and compute its totals.

    Raises:
        ValueError: A file has another layout, or VBench scored no clip.
    """
    scores: dict[str, float] = {}
    counts: dict[str, int] = {}
    for file in sorted(folder.glob("*_eval_results.json")):
        for name, score, count in _read(file):
            scores[name], counts[name] = score, count
    return with_totals(VBenchScores(scores, counts))


def _read(file: Path) -> Iterator[tuple[str, float, int]]:
    try:
        found = [(name, float(score), len(clips)) for name, (score, clips) in json.loads(file.read_bytes()).items()]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no result of VBench ({error}); delete it and run again") from None
    for name, score, count in found:
        if name not in DIMENSIONS or not count or not math.isfinite(score):
            raise ValueError(f"{file}: {name} is {score} from {count} clips; delete the file and run again")
        yield name, score, count


def with_totals(scores: VBenchScores) -> VBenchScores:
    """Return scores with VBench's Quality, Semantic and Total (`scripts/cal_final_score.py`)."""
    quality, semantic = (_group_score(scores.dimensions, group) for group in ("quality", "semantic"))
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return replace(scores, quality=quality, semantic=semantic, total=total)


def _group_score(scores: Mapping[str, float], group: str) -> float | None:
    members = {name: dimension for name, dimension in DIMENSIONS.items() if dimension.group == group}
    if not members.keys() <= scores.keys():
        return None
    weighted = (d.weight * (scores[name] - d.lowest) / (d.highest - d.lowest) for name, d in members.items())
    return sum(weighted) / sum(dimension.weight for dimension in members.values())


def write_scores(output: Path, scores: VBenchScores, settings: Mapping[str, Any]) -> None:
    """Write OUTPUT/scores.json, and print it as a Markdown table in percent."""
    write_whole(output / "scores.json", json.dumps({**asdict(scores), "clips": dict(settings)}, indent=2).encode())
    print("| dimension | score | clips |\n|---|---|---|")
    for name, score in scores.dimensions.items():
        print(f"| {name} | {score:.2%} | {scores.num_clips[name]} |")
    for name in ("quality", "semantic", "total"):
        score = getattr(scores, name)
        print(f"| **{name}** | {'-' if score is None else f'{score:.2%}'} | |")
