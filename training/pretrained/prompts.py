"""Prompt files and their embeddings on disk. Prompts are encoded once and read by number in training.

A folder of embeddings holds `index.json`, `empty.safetensors` (the empty prompt) and shards
`prompts-00000.safetensors` with the fields of `Conditioning`; row n is line n of the prompt file. For methods that
learn from data it also holds shards `latents-00000.safetensors` (`training.pretrained.latents`).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.stock.pipeline_folder import family_of
from tdm_runtime.errors import TDMError
from tdm_runtime.families import Conditioning, current_name
from tdm_runtime.whole_file import write_whole
from training.pretrained.base_model import BaseModel, encode_prompts
from training.run.loop import step_generator

INDEX_FILE = "index.json"
EMPTY_FILE = "empty.safetensors"
INDEX_FORMAT = 1
SMALL_FILE = 2**20
"""Files up to this size, in bytes, go into the fingerprint of the text encoders whole; larger ones with their size."""
MAX_CHARACTERS = 20_000
"""Longest prompt of a file. Text encoders read at most 512 tokens of it."""

StoredType = Literal["fp16", "bf16", "fp32"]
STORED_TYPES: Mapping[StoredType, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class PromptError(TDMError):
    """A prompt file, or a folder of embeddings or latents, cannot be used; the message names it and the remedy."""


@dataclass(frozen=True)
class PromptRow:
    """A line of a prompt file."""

    prompt: str
    image: str | None = None
    """Path of the prompt's picture, relative to the prompt file."""


def read_prompt_file(file: Path) -> list[PromptRow]:
    """Read lines of JSON: `{"prompt": "..."}` with an optional "image"; other fields are ignored.

    Raises:
        PromptError: the file is missing or empty, or a line does not have that form.
    """
    try:
        lines = file.read_bytes().split(b"\n")  # not splitlines: JSON strings may hold other line ends
    except OSError as error:
        raise PromptError(
            f'{file} cannot be read ({error.strerror}); give a file of lines {{"prompt": "..."}}'
        ) from None
    if lines[-1].strip() == b"":
        lines.pop()
    if not lines:
        raise PromptError(f'{file} is empty; give a line {{"prompt": "..."}} for each prompt')
    return [_parse_row(f"{file}, line {number}", line) for number, line in enumerate(lines, start=1)]


def _parse_row(place: str, line: bytes) -> PromptRow:
    remedy = 'write {"prompt": "..."}, or remove the line'
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{place} is not JSON ({error}): {_shown(line)}; {remedy}") from None
    prompt = raw.get("prompt") if isinstance(raw, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError(f"{place} has no prompt: {_shown(line)}; {remedy}")
    if len(prompt) > MAX_CHARACTERS:
        raise PromptError(
            f"{place} has {len(prompt)} characters; at most {MAX_CHARACTERS} are read, shorten the prompt"
        )
    image = raw.get("image")
    if image is not None and not isinstance(image, str):
        raise PromptError(f"{place}: image is {image!r}; it must be a path, relative to the file")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{place} is no text: {error.reason} at character {error.start}; correct the prompt"
        ) from None
    return PromptRow(prompt, image)


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


# ---- the folder ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddingIndex:
    """Content of `index.json`: what a folder of embeddings was made of. Only a run with an equal index resumes it."""

    family: str
    """Name of the base's family."""
    width: int
    """Width of the pictures, in pixels."""
    height: int
    """Height of the pictures, in pixels."""
    count: int
    """Number of prompts."""
    shard_size: int
    """Prompts in a shard; the last shard may hold fewer."""
    stored_type: StoredType
    prompts_sha256: str
    text_encoders: str
    """Fingerprint of the base's text encoders and tokenizers."""

    def shards(self, stem: str, folder: Path) -> list[tuple[Path, range]]:
        """Return each shard's file and the rows that it holds."""
        starts = range(0, self.count, self.shard_size)
        return [
            (folder / f"{stem}-{n:05d}.safetensors", range(start, min(start + self.shard_size, self.count)))
            for n, start in enumerate(starts)
        ]


def read_index(folder: Path) -> EmbeddingIndex:
    """Read `folder/index.json`.

    Raises:
        PromptError: the file is missing, damaged, or of another version.
    """
    file = folder / INDEX_FILE
    try:
        raw: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PromptError(f"{file} cannot be read ({error}); make embeddings with `tdm-train embed`") from None
    if not isinstance(raw, dict) or raw.pop("format", None) != INDEX_FORMAT:
        raise PromptError(f"{file} is not of format {INDEX_FORMAT}; embed the prompts anew, into another folder")
    if strangers := sorted({f.name for f in fields(EmbeddingIndex)} ^ set(raw)):
        raise PromptError(f"{file}: {strangers} are missing or unknown; embed the prompts anew, into another folder")
    return EmbeddingIndex(**raw | {"family": current_name(raw["family"])})


def write_json(file: Path, raw: Mapping[str, object]) -> None:
    """Write JSON; a reader never sees half of it."""
    write_whole(file, (json.dumps(raw, indent=2) + "\n").encode())


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors through a temporary file, so that a reader never sees half of it."""
    partial = file.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, file)


def to_stored(name: str, tensor: Tensor, stored_type: StoredType) -> Tensor:
    """Return a tensor in the type that it is stored in, on the CPU.

    Raises:
        PromptError: a value is out of that type's range.
    """
    narrow = tensor.to(STORED_TYPES[stored_type]).cpu()
    if not narrow.isfinite().all():
        raise PromptError(f"{name} reaches {tensor.abs().max():g}, which {stored_type} cannot hold; store bf16 or fp32")
    return narrow


# ---- prompts -> embeddings -----------------------------------------------------------------------


def embed_prompts(
    base_folder: Path,
    prompt_file: Path,
    output_folder: Path,
    width: int,
    height: int,
    *,
    stored_type: StoredType = "fp16",
    shard_size: int = 1024,
    batch_size: int = 16,
    device: str | None = None,
) -> EmbeddingIndex:
    """Encode a prompt file with a base's text encoders. A killed run continues with the missing shards.

    Args:
        width, height: size of the pictures in pixels, which SDXL reads.
        stored_type: type on disk; an error asks for bf16 if fp16 is too narrow.
        shard_size: prompts per file. A kill costs the work of at most one file.
        device: device of the text encoders; by default CUDA if there is a CUDA device.

    Raises:
        PromptError: the prompt file is damaged, or the folder was begun with another index.
        CheckpointError: the base cannot be read.
    """
    if stored_type not in get_args(StoredType):
        raise PromptError(f"stored_type is {stored_type!r}; it must be one of {', '.join(get_args(StoredType))}")
    if shard_size < 1:
        raise PromptError(f"shard_size is {shard_size}; it must be at least 1")
    prompts = [row.prompt for row in read_prompt_file(prompt_file)]
    index = EmbeddingIndex(
        family=family_of(base_folder).name,
        width=width,
        height=height,
        count=len(prompts),
        shard_size=shard_size,
        stored_type=stored_type,
        prompts_sha256=file_sha256(prompt_file),
        text_encoders=_fingerprint(base_folder),
    )
    output_folder.mkdir(parents=True, exist_ok=True)
    _settle_index(output_folder, index)
    pending = [(output_folder / EMPTY_FILE, [""])]
    pending += [(file, prompts[rows.start : rows.stop]) for file, rows in index.shards("prompts", output_folder)]
    pending = [(file, texts) for file, texts in pending if not file.is_file()]
    if not pending:
        return index
    texts = [text for _, shard in pending for text in shard]
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batches = encode_prompts(base_folder, texts, batch_size=batch_size, width=width, height=height, device=place)
    bar = tqdm(total=len(texts), desc="embed", unit="prompt", disable=None)
    rows = (batch[n : n + 1] for batch in batches for n in range(len(batch)))
    for file, shard in pending:
        write_tensors(file, _stacked(rows, len(shard), stored_type))
        bar.update(len(shard))
    bar.close()
    return index


def embed_once(base_folder: Path, prompt_file: Path, output_folder: Path, width: int, height: int) -> None:
    """Encode a prompt file in the first of the processes that train together; the others wait for the files.

    They have not met yet: an encoding may take longer than processes wait for each other. Arguments and errors are
    those of `embed_prompts`.
    """
    if os.environ.get("RANK", "0") == "0":
        embed_prompts(base_folder, prompt_file, output_folder, width, height)
        return
    while True:
        with suppress(PromptError):
            EmbeddedPrompts(output_folder, seed=0)
            return
        time.sleep(1)


def _settle_index(folder: Path, index: EmbeddingIndex) -> None:
    """Write the index of a fresh folder, or check that the folder was begun with the same one."""
    if not (folder / INDEX_FILE).exists():
        write_json(folder / INDEX_FILE, {"format": INDEX_FORMAT, **asdict(index)})
        return
    there = asdict(read_index(folder))
    differing = [f"{name} {there[name]} (now {value})" for name, value in asdict(index).items() if there[name] != value]
    if differing:
        raise PromptError(
            f"{folder} was begun with {', '.join(differing)}; resume with the same, or use another folder"
        )


def _stacked(rows: Iterator[Conditioning], count: int, stored_type: StoredType) -> dict[str, Tensor]:
    """Return the next rows as tensors by field name. Sizes and masks are whole numbers and stay exact."""
    taken = [dict(zip(_FIELDS, row.tensors(), strict=True)) for row in islice(rows, count)]
    stacked: dict[str, Tensor] = {}
    for name in _FIELDS:
        parts = [tensor for row in taken if (tensor := row[name]) is not None]
        if parts:
            joined = torch.cat(parts)
            stacked[name] = _STORED[name](joined) if name in _STORED else to_stored(name, joined, stored_type)
    return stacked


_FIELDS = tuple(field.name for field in fields(Conditioning))
_STORED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "attention_mask": lambda mask: mask.to(torch.uint8).cpu(),
    "time_ids": lambda ids: ids.float().cpu(),
    "guidance": lambda scales: scales.float().cpu(),
}


def _fingerprint(base_folder: Path) -> str:
    """Return a hash that changes with the text encoders, without reading gigabytes of weights."""
    digest = hashlib.sha256()
    files = (f for part in ("tokenizer*", "text_encoder*") for f in base_folder.glob(f"{part}/**/*") if f.is_file())
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(base_folder)}:{size}\n".encode())
        if size <= SMALL_FILE:
            digest.update(file.read_bytes())
    return digest.hexdigest()


# ---- embeddings -> training ----------------------------------------------------------------------


class EmbeddedPrompts:
    """`PromptSource` of a folder of embeddings. Each epoch visits every prompt once, in its own order."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Open a folder and read the empty prompt; other prompts are read when they are needed.

        Raises:
            PromptError: the folder is incomplete.
        """
        self.folder, self.seed, self.index = folder, seed, read_index(folder)
        self._prompts = ShardedRows(self.index, "prompts", folder)
        has_latents = any(folder.glob("latents-*.safetensors"))
        self._latents = ShardedRows(self.index, "latents", folder) if has_latents else None
        if not (folder / EMPTY_FILE).is_file():
            raise PromptError(f"{folder / EMPTY_FILE} is missing; run `tdm-train embed` again, it resumes")
        self._empty = _conditioning(load_file(folder / EMPTY_FILE))
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def require(self, base: BaseModel, width: int, height: int) -> None:
        """Check that the embeddings were made for a base and a size.

        Raises:
            PromptError: they were made for another base or size.
        """
        index = self.index
        if index.family != base.family.name:
            raise PromptError(
                f"{self.folder} holds embeddings for {index.family}, the base model is {base.family.name}; "
                "embed the prompts with this base"
            )
        if (index.width, index.height) != (width, height):
            raise PromptError(
                f"{self.folder} holds embeddings for {index.width}x{index.height} pixels, the config trains "
                f"{width}x{height}; embed the prompts for that size, or set width and height"
            )

    def rows(self, numbers: range) -> list[int]:
        """Return lines of the prompt file, counted from 0: a permutation per epoch that depends on the seed only."""
        count = self.index.count
        return [int(self._order(number // count)[number % count]) for number in numbers]

    def conditioning(self, numbers: range) -> Conditioning:
        """Return the prompts of these numbers, float32."""
        return _conditioning(self._prompts.read(self.rows(numbers)))

    def empty(self) -> Conditioning:
        """Return the empty prompt, a batch of 1."""
        return self._empty

    def latents(self, numbers: range) -> Tensor | None:
        """Return the latents of the same prompts' pictures, float32 [B, C, H, W]; None if the folder has none."""
        return None if self._latents is None else self._latents.read(self.rows(numbers))["latents"].float()

    def _draw_order(self, epoch: int) -> Tensor:
        return torch.randperm(self.index.count, generator=step_generator(self.seed, "prompts", epoch))


def _conditioning(tensors: Mapping[str, Tensor]) -> Conditioning:
    mask = tensors.get("attention_mask")
    of_float = {
        name: tensors[name].float() if name in tensors else None for name in _FIELDS if name != "attention_mask"
    }
    return Conditioning(**of_float, attention_mask=None if mask is None else mask.long())  # type: ignore[arg-type]


class ShardedRows:
    """Rows of tensors in shards, read one at a time through a memory map."""

    def __init__(self, index: EmbeddingIndex, stem: str, folder: Path) -> None:
        """Check that all shards exist; they are opened when a row of them is needed.

        Raises:
            PromptError: a shard is missing.
        """
        self._size = index.shard_size
        self._files = [file for file, _ in index.shards(stem, folder)]
        if missing := [file.name for file in self._files if not file.is_file()]:
            raise PromptError(
                f"{folder} lacks {len(missing)} of {len(self._files)} shards ({missing[0]}, ...); "
                "run the command that made it again, it resumes"
            )
        self._open: dict[int, Any] = {}

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the tensors of these rows, [len(rows), ...], in the type that they are stored in.

        Raises:
            PromptError: a shard is damaged.
        """
        parts = [self._read_row(row) for row in rows]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _read_row(self, row: int) -> dict[str, Tensor]:
        number, place = divmod(row, self._size)
        try:
            if number not in self._open:
                self._open[number] = safe_open(self._files[number], framework="pt")
            shard = self._open[number]
            return {name: shard.get_slice(name)[place : place + 1] for name in shard.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise PromptError(f"{self._files[number]} is damaged ({error}); remove it and embed again") from None
