"""Files of a checkpoint folder that are read, and checks that they are there and whole.

They are those that the stock pipeline reads by default: other variants, single-file checkpoints, pickles and parts that
make no picture may lie beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tdm_runtime.checkpoint.lora.lora_file import STEP_CONDITION_FILE
from tdm_runtime.checkpoint.stock.pipeline_folder import MODEL_INDEX, read_json, text_parts
from tdm_runtime.checkpoint.weight_shapes import tensor_shapes
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import Family

TINY_VAE = "tiny_vae"
"""Folder of the tiny autoencoder, which is optional."""
DIFFUSION_WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
"""Names of a part's weights, by the library that saved it. Shards are listed in a file of that name + ".index.json"."""
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",))
"""Files of which a tokenizer's folder must hold one group."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weight_files(folder: Path, family: Family) -> tuple[str, ...]:
    """Return the weight files of a folder, shards and their index too, relative to it. They may be missing."""
    texts = (part for part in family.text_encoders if _is_needed(folder, family, part))
    parts = [(part, TEXT_WEIGHTS) for part in texts]
    parts += [(part, DIFFUSION_WEIGHTS) for part in (*_denoiser_parts(folder, family), "vae", TINY_VAE)]
    there = (part for part in parts if part[0] != TINY_VAE or (folder / TINY_VAE).is_dir())
    condition = (STEP_CONDITION_FILE,) if (folder / STEP_CONDITION_FILE).is_file() else ()
    return (*(file for part, name in there for file in _with_shards(folder, part, name)), *condition)


def other_files(folder: Path, family: Family) -> tuple[str, ...]:
    """Return the other files of a folder beside its recipe, relative to it. They may be missing."""
    texts = [part for part in family.text_encoders if _is_needed(folder, family, part)]
    tokenizers = [part for part in family.tokenizers if _is_needed(folder, family, part)]
    tiny = [TINY_VAE] if (folder / TINY_VAE).is_dir() else []
    configs = (f"{part}/config.json" for part in (*_denoiser_parts(folder, family), "vae", *texts, *tiny))
    return (MODEL_INDEX, *configs, *(file for part in tokenizers for file in _tokenizer_files(folder, part)))


def check_files(folder: Path, family: Family) -> None:
    """Check that every file is there, that JSON can be read and that no weight file is cut short.

    Weights are not read, only their headers.

    Raises:
        CheckpointError: naming the file, the reason and the remedy.
    """
    weights, others = weight_files(folder, family), other_files(folder, family)
    if missing := [name for name in (*weights, *others) if not (folder / name).is_file()]:
        _refuse_pickles(folder, [name for name in missing if name in weights])
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; restore the folder from its source")
    for name in (*weights, *others):
        if name.endswith(".json"):
            read_json(folder / name)
    for name in weights:
        if name.endswith(".safetensors"):
            tensor_shapes(folder / name)


def _refuse_pickles(folder: Path, missing: Sequence[str]) -> None:
    for part in dict.fromkeys(name.partition("/")[0] for name in missing):
        if pickles := sorted(file.name for file in _files(folder / part) if file.suffix.lower() in PICKLE_SUFFIXES):
            raise CheckpointError(
                f"{folder / part} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when read; "
                "convert them to safetensors"
            )


def _files(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _with_shards(folder: Path, part: str, name: str) -> tuple[str, ...]:
    """Return the weight files of a part. Where it has shards and a single file, diffusers reads the shards and
    transformers the single file.
    """
    whole, index = f"{part}/{name}", f"{part}/{name}.index.json"
    if not (folder / index).is_file() or (name == TEXT_WEIGHTS and (folder / whole).is_file()):
        return (whole,)
    shards = read_json(folder / index).get("weight_map")
    if not isinstance(shards, dict) or not all(_is_name(shard) for shard in shards.values()):
        raise CheckpointError(f"{folder / index} has no weight_map of file names; restore the folder from its source")
    return (index, *(f"{part}/{shard}" for shard in sorted(set(shards.values()))))


def _is_name(shard: object) -> bool:
    return isinstance(shard, str) and shard == Path(shard).name


def _tokenizer_files(folder: Path, part: str) -> tuple[str, ...]:
    groups = (group for group in TOKENIZER_FILES if all((folder / part / name).is_file() for name in group))
    return tuple(f"{part}/{name}" for name in (*next(groups, TOKENIZER_FILES[0]), "tokenizer_config.json"))


def _denoiser_parts(folder: Path, family: Family) -> tuple[str, ...]:
    return family.denoiser_parts(read_json(folder / MODEL_INDEX))


def _is_needed(folder: Path, family: Family, part: str) -> bool:
    return part not in family.optional_text or part in text_parts(read_json(folder / MODEL_INDEX), family)
