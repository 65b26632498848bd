"""The pictures the embedded model learns from: colour glyphs of Noto Color Emoji, and their names."""

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
"""The one bitmap size that the font carries."""
STRIKE_CANVAS_PX = 136
GLYPHS_FILE = Path(__file__).with_name("glyphs.txt")


@dataclass(frozen=True)
class Glyph:
    """One character of the font and the names a caption may call it by."""

    character: str
    names: tuple[str, ...]
    """Lower case, the Unicode short name first."""

    @property
    def name(self) -> str:
        return self.names[0]


def load_glyphs(file: Path = GLYPHS_FILE) -> tuple[Glyph, ...]:
    """Read the glyph list, in file order, `#` lines skipped."""
    glyphs = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        character, names = line.split(" ", 1)
        glyphs.append(Glyph(character, tuple(name.strip() for name in names.split(","))))
    return tuple(glyphs)


def find_font(paths: tuple[Path, ...] = FONT_PATHS) -> Path:
    """Return the installed Noto Color Emoji.

    Raises:
        FileNotFoundError: naming the Debian package to install.
    """
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"NotoColorEmoji.ttf is in none of {', '.join(map(str, paths))}; "
        "install it with `apt-get install fonts-noto-color-emoji`"
    )


def render_glyphs(glyphs: tuple[Glyph, ...], font_file: Path | None = None) -> Mapping[str, Image.Image]:
    """Draw every glyph once: name -> square RGBA picture, trimmed to its ink and centred.

    Raises:
        FileNotFoundError: the font is not installed.
        ValueError: the font has no picture for a glyph.
    """
    font = ImageFont.truetype(str(font_file or find_font()), STRIKE_SIZE_PX)
    pictures = {}
    for glyph in glyphs:
        canvas = Image.new("RGBA", (2 * STRIKE_CANVAS_PX, 2 * STRIKE_CANVAS_PX), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((40, 40), glyph.character, font=font, embedded_color=True)
        ink = canvas.getbbox()
        if ink is None:
            raise ValueError(f"the font draws nothing for {glyph.name!r} ({glyph.character!r})")
        trimmed = canvas.crop(ink)
        side = max(trimmed.size)
        square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        square.paste(trimmed, ((side - trimmed.width) // 2, (side - trimmed.height) // 2))
        pictures[glyph.name] = square
    return pictures
