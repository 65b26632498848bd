"""Colour glyphs of Noto Color Emoji, from which training pictures are composed, and their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT_PATHS = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf"),
)
STRIKE_SIZE_PX = 109
"""The only bitmap size in the font."""
STRIKE_CANVAS_PX = 136
GLYPHS_FILE = Path(__file__).with_name("glyphs.txt")


@dataclass(frozen=True)
class Glyph:
    """One character of the font, and its names in captions."""

    character: str
    names: tuple[str, ...]
    """Names in lower case, the Unicode short name first."""

    @property
    def name(self) -> str:
        return self.names[0]


def load_glyphs(file: Path = GLYPHS_FILE) -> tuple[Glyph, ...]:
    """Read the glyph list in file order, without `#` lines."""
    glyphs = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        character, names = line.split(" ", 1)
        glyphs.append(Glyph(character, tuple(name.strip() for name in names.split(","))))
    return tuple(glyphs)


def find_font(paths: tuple[Path, ...] = FONT_PATHS) -> Path:
    """Return the file of the installed font Noto Color Emoji.

    Raises:
        FileNotFoundError: The font is not installed. The message names the Debian package.
    """
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"NotoColorEmoji.ttf is in none of {', '.join(map(str, paths))}; "
        "install it with `apt-get install fonts-noto-color-emoji`"
    )


def render_glyphs(glyphs: tuple[Glyph, ...], font_file: Path | None = None) -> Mapping[str, Image.Image]:
    """Draw every glyph: name -> square RGBA picture, trimmed to the drawn part and centred.

    Raises:
        FileNotFoundError: The font is not installed.
        ValueError: The font has no picture for a glyph.
    """
    font = ImageFont.truetype(str(font_file or find_font()), STRIKE_SIZE_PX)
    pictures = {}
    for glyph in glyphs:
        canvas = Image.new("RGBA", (2 * STRIKE_CANVAS_PX, 2 * STRIKE_CANVAS_PX), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((40, 40), glyph.character, font=font, embedded_color=True)
        ink = canvas.getbbox()
        if ink is None:
            raise ValueError(
                f"the font has no picture for {glyph.name!r} ({glyph.character!r}); remove it from {GLYPHS_FILE.name}"
            )
        trimmed = canvas.crop(ink)
        side = max(trimmed.size)
        square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        square.paste(trimmed, ((side - trimmed.width) // 2, (side - trimmed.height) // 2))
        pictures[glyph.name] = square
    return pictures
