"""`tdm-train user-study make`: a page that shows pairs of pictures or clips and asks which one is better.

As in the user study of the TDM paper (App. G, Fig. 13), people see two anonymous samples of one prompt.

    OUTPUT/page/    index.html and media/: a static folder without a sign of which side is which, to publish or to send
    OUTPUT/key.json which side is which; keep it for `tdm-train user-study tally`
    OUTPUT/a, b     samples that a checkpoint made
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

from tdm_runtime.media.image_file import encode_image
from tdm_runtime.media.video_file import is_video
from tdm_runtime.model.choice import load_model
from tdm_runtime.whole_file import write_whole
from training.measure.samples import given_files, is_checkpoint, made_files, read_picture
from training.pretrained.latents import CLIP_SUFFIXES, IMAGE_SUFFIXES
from training.pretrained.prompts import read_prompt_file

TEMPLATE = Path(__file__).with_name("user_study.html")
PLACEHOLDER = "STUDY"
QUESTION = "Considering quality and how well it fits the prompt, which one is better?"
"""The paper's question, for pictures and clips."""
SUFFIXES = tuple(dict.fromkeys(IMAGE_SUFFIXES + CLIP_SUFFIXES))


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    source: Path
    """Checkpoint, folder of pictures or clips sorted by name, or JSONL file with "image" on each line."""
    steps: int | None = None
    """Steps of a checkpoint's samples; None takes its default."""


def make_study(
    output: Path, a: Side, b: Side, prompts_file: Path, questions: Sequence[str] | None = None, seed: int | None = None
) -> Path:
    """Write the page and its key. Return the page.

    Both sides' samples have the same seeds. Order and sides are random, and each side comes first in half of the pairs.

    Args:
        questions: Asked of each pair, one after the other; None asks the paper's.
        seed: Seed of order, sides and samples. None draws order and sides, which raters then cannot work out, and makes
            samples with seed 0.

    Raises:
        ValueError, FileNotFoundError: Files and prompts do not pair, a file cannot be read, or the page exists.
        TDMError: The prompt file or a checkpoint cannot be used.
    """
    page = output / "page" / "index.html"
    if page.exists():
        raise ValueError(f"{page} exists, and answers to it may too; name another output folder, or remove this one")
    prompts = [row.prompt for row in read_prompt_file(prompts_file)]
    files = {name: _files(output, name, side, prompts, seed or 0) for name, side in (("a", a), ("b", b))}
    drawn = secrets.randbits(64) if seed is None else seed
    rng = random.Random(drawn)
    order = list(range(len(prompts)))
    rng.shuffle(order)
    firsts = ["a", "b"] * (len(order) // 2) + [rng.choice("ab")] * (len(order) % 2)
    rng.shuffle(firsts)
    contents: dict[str, bytes] = {}
    pairs = []
    for number, first in zip(order, firsts, strict=True):
        pair: dict[str, Any] = {"prompt": prompts[number]}
        kinds = []
        for position, name in (("first", first), ("second", "b" if first == "a" else "a")):
            content, suffix = without_metadata(files[name][number])
            pair[position] = f"media/{rng.getrandbits(64):016x}{suffix}"
            contents[pair[position]] = content
            kinds.append(is_video(content))
        if len(set(kinds)) > 1:
            raise ValueError(f"a and b of {prompts[number]!r} are a video and a picture file; give one kind")
        pairs.append(pair | {"video": kinds[0]})
    shown = {"questions": list(dict.fromkeys(questions or [QUESTION])), "pairs": pairs}
    study = hashlib.sha256(b"".join([json.dumps(shown).encode(), *contents.values()])).hexdigest()[:16]
    key = {
        "study": study, "seed": drawn, "a": _described(a), "b": _described(b), "questions": shown["questions"],
        "pairs": [{"prompt": prompts[n], "first": first} for n, first in zip(order, firsts, strict=True)],
    }  # fmt: skip
    (page.parent / "media").mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (page.parent / name).write_bytes(content)
    write_whole(output / "key.json", json.dumps(key, indent=2, ensure_ascii=False).encode())
    embedded = json.dumps({"id": study, **shown}).replace("<", "\\u003c")  # a prompt must not end the script
    write_whole(page, TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, embedded, 1).encode())
    print(f"{page} asks about {len(pairs)} pairs; publish or send {page.parent}, and keep {output / 'key.json'}")
    return page


def _files(output: Path, name: str, side: Side, prompts: Sequence[str], seed: int) -> list[Path]:
    if is_checkpoint(side.source):
        return made_files(output, name, load_model(side.source), prompts, side.steps, seed)
    if side.steps is not None:
        raise ValueError(f"{side.source} is no checkpoint, so --steps-{name} has no meaning; leave it out")
    return given_files(side.source, prompts, SUFFIXES)


def _described(side: Side) -> str:
    return str(side.source) if side.steps is None else f"{side.source} at {side.steps} steps"


def without_metadata(file: Path) -> tuple[bytes, str]:
    """Return the same pixels in a file without receipts, comments and dates, and its suffix.

    Videos keep their compressed frames. A picture becomes a PNG, an animation a lossless WebP.

    Raises:
        ValueError: The file cannot be read.
    """
    content = file.read_bytes()
    if is_video(content):
        return _bare_video(content, file)
    try:
        with Image.open(io.BytesIO(content)) as animation:
            frames = [
                (frame.convert("RGB"), frame.info.get("duration", 100)) for frame in ImageSequence.Iterator(animation)
            ]
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read ({error}); replace it or remove its prompt") from None
    if len(frames) == 1:
        return encode_image(read_picture(file), "png"), ".png"
    pictures, shown_ms = zip(*frames, strict=True)
    stream = io.BytesIO()
    pictures[0].save(
        stream, "WEBP", lossless=True, save_all=True, append_images=pictures[1:], duration=list(shown_ms), loop=0
    )
    return stream.getvalue(), ".webp"


def _bare_video(content: bytes, file: Path) -> tuple[bytes, str]:
    import av  # FFmpeg's libraries: heavy, and only clips need them

    container_format = "mp4" if content[4:8] == b"ftyp" else "webm"
    stream = io.BytesIO()
    try:
        with (
            av.open(io.BytesIO(content), "r") as source,
            av.open(stream, "w", format=container_format, options={"fflags": "+bitexact"}) as target,
        ):
            track = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:  # the last one, which only ends the stream, has none
                    packet.stream = track
                    target.mux(packet)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a clip ({error}); replace it or remove its prompt") from None
    return stream.getvalue(), f".{container_format}"
