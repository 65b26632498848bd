"""Contact sheet: the first pictures of a run in one PNG file, a row for each line and a column for each variant.

A clip is shown by its first frame.
With two sweeps, a line has a row for each value of the first one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from serving.offline.outputs import Output
from serving.offline.records import Entry, Fields
from tdm_runtime.media.video_file import read_frames

MAX_PICTURES = 400
MAX_SIDE = 192
"""Longest side of a picture on the sheet, in pixels."""
MIN_SIDE = 64
GAP = 6
LABEL = 16
"""Height of a line of text, in pixels."""
PER_ROW = 8
"""Pictures in a row where each line has one only."""
BACKGROUND, TEXT = (250, 250, 250), (40, 40, 40)


def contact_sheet(entries: Iterator[Entry], output: Output) -> bytes | None:
    """Return the sheet as a PNG file; None if no picture was made. A failed picture is an empty place."""
    records = [entry.record for entry in islice(entries, MAX_PICTURES)]
    made = [record for record in records if record["status"] == "completed"]
    if not made:
        return None
    pictures = dict(zip(map(_place, made), map(_opened, output.pictures(made)), strict=True))
    rows = [list(group) for _, group in groupby(records, key=_row)]
    titled = max(map(len, rows)) > 1
    if not titled:
        rows = [records[start : start + PER_ROW] for start in range(0, len(records), PER_ROW)]
    columns = max(map(len, rows))
    sizes = [picture.size for picture in pictures.values() if picture is not None] or [(MIN_SIDE, MIN_SIDE)]
    side = max(MIN_SIDE, max(map(max, sizes)))
    cell, title = side + GAP, LABEL if titled else 0
    height = title + side + GAP + LABEL
    sheet = Image.new("RGB", (GAP + columns * cell, GAP + len(rows) * height), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for y, row in enumerate(rows):
        if titled:
            title_of_row = _fitting(draw, font, _title(row), columns * cell - GAP)
            draw.text((GAP, GAP + y * height), title_of_row, TEXT, font)
        for x, record in enumerate(row):
            left, top = GAP + x * cell, GAP + y * height + title
            if (picture := pictures.get(_place(record))) is not None:
                sheet.paste(picture, (left, top))
            draw.text((left, top + side + 1), _fitting(draw, font, _label(record, titled), side), TEXT, font)
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def _place(record: Fields) -> tuple[str, int, str]:
    return record["id"], record.get("index", 0), str(record.get("sweep"))


def _opened(content: bytes | None) -> Image.Image | None:
    if content is None:
        return None
    picture = Image.fromarray(next(read_frames(content)))
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


def _row(record: Fields) -> tuple[str, list[str]]:
    """Return what the pictures of a row share: the line, and the values of all sweeps but the last."""
    return record["id"], _swept(record)[:-1]


def _swept(record: Fields) -> list[str]:
    values = record.get("sweep", {}).items()
    return [f"{name.replace('num_inference_steps', 'steps')}={value}" for name, value in values]


def _title(row: list[Fields]) -> str:
    prompts = [_prompt(record) for record in row if record["status"] == "completed"]
    return ", ".join([*_swept(row[0])[:-1], *prompts[:1]])


def _label(record: Fields, titled: bool) -> str:
    if record["status"] != "completed":
        return "failed"
    if not titled:
        return _prompt(record)
    return (_swept(record) or [f"seed={record['seed']}"])[-1]


def _prompt(record: Fields) -> str:
    return str(record["receipt"]["prompt"])


def _fitting(draw: ImageDraw.ImageDraw, font: Any, text: str, width: int) -> str:
    """Return as much of a text as fits into a width, in pixels. What the font cannot draw is left out."""
    text = "".join(character for character in text[:200] if character.isprintable())
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}…", font) > width:
        text = text[:-1]
    return f"{text}…"
