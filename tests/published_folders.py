"""Tiny pipeline folders in the layouts in which publishers ship them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = [("c", "a"), ("ca", "t"), ("o", "n</w>"), ("f", "o"), ("fo", "x</w>")]
CLIP_TOKENS = 12


def edit_json(file: Path, **values: Any) -> None:
    """Set values of a JSON object; None removes one."""
    raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    raw = {key: value for key, value in {**raw, **values}.items() if value is not None}
    file.write_text(json.dumps(raw), encoding="utf-8")


def rename_weights(file: Path, rename: Callable[[str], str], **more: Tensor) -> None:
    """Rename the tensors of a file and add others."""
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file({**tensors, **more}, file, metadata={"format": "pt"})


def clip_vocabulary() -> dict[str, int]:
    """Return a vocabulary in CLIP's order: "!" is 0, each byte alone and at a word's end, merges, start and end."""
    letters = sorted(ByteLevel.alphabet(), key=ord)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in CLIP_MERGES), START, END]
    return {token: number for number, token in enumerate(tokens)}


def write_clip_tokenizer(folder: Path, pad_token: str = END) -> None:
    """Write a tokenizer as the SD 1.5 and SDXL repositories have it: no tokenizer.json."""
    for file in folder.iterdir():
        file.unlink()
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary()), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in CLIP_MERGES)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")

    def special(content: str) -> dict[str, Any]:
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    edit_json(
        folder / "special_tokens_map.json",
        bos_token=special(START),
        eos_token=special(END),
        unk_token=special(END),
        pad_token=pad_token,
    )
    edit_json(
        folder / "tokenizer_config.json",
        add_prefix_space=False,
        bos_token={"__type": "AddedToken", **special(START)},
        do_lower_case=True,
        eos_token={"__type": "AddedToken", **special(END)},
        errors="replace",
        model_max_length=CLIP_TOKENS,
        name_or_path="openai/clip-vit-large-patch14",
        pad_token=pad_token,
        special_tokens_map_file="./special_tokens_map.json",
        tokenizer_class="CLIPTokenizer",
        unk_token={"__type": "AddedToken", **special(END)},
    )


def write_t5_tokenizer(folder: Path) -> None:
    """Write a tokenizer as PixArt-alpha, CogVideoX and SD3 have it: spiece.model, and no tokenizer.json."""
    for file in folder.iterdir():
        file.unlink()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red fox", "two cats on a hill", "The quick brown fox jumps over the lazy dog"] * 9),
        model_writer=model,
        vocab_size=48,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    extra = [f"<extra_id_{n}>" for n in range(100)]
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    edit_json(folder / "special_tokens_map.json", additional_special_tokens=extra, **names)
    edit_json(
        folder / "tokenizer_config.json",
        additional_special_tokens=extra,
        extra_ids=100,
        legacy=True,
        model_max_length=512,
        sp_model_kwargs={},
        tokenizer_class="T5Tokenizer",
        **names,
    )


def old_clip_weights(folder: Path) -> None:
    """Put the tensors of a CLIP below `text_model.`, with `position_ids`, as in files of before 2023."""
    positions = {"text_model.embeddings.position_ids": torch.arange(CLIP_TOKENS)[None]}

    def below(name: str) -> str:
        return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"

    rename_weights(folder / "model.safetensors", below, **positions)


def old_vae_weights(folder: Path) -> None:
    """Give the attention of a VAE its names of 2022."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(name: str) -> str:
        for new, former in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        return name

    rename_weights(folder / "diffusion_pytorch_model.safetensors", old)


def as_hub_snapshot(folder: Path) -> None:
    """Move all files into a folder of blobs beside it and leave links, as the hub's cache has them."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(each for each in folder.rglob("*") if each.is_file())):
        file.rename(blobs / f"{number:04}")
        file.symlink_to(blobs / f"{number:04}")
