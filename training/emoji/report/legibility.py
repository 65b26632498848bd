"""How legible glyphs are, alone and in pairs: the shares of whole glyphs and of parts that `reader` names.

Whole glyphs are easily named: with 183 to choose from, a soft spot of the right colours is enough. So a glyph is also
read in nine parts, each seen alone and without colours. Counted are the parts that the reader names in drawings.
Drawings through the autoencoder show what the latents lose, and the student's pictures what the student loses.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from training.emoji.data.glyphs import Glyph, load_glyphs
from training.emoji.data.scenes import BACKGROUNDS, Relation, Scene, caption, sample_jitter
from training.emoji.report.reader import GlyphReader, cut_out, load_reader, parts, without_colours
from training.emoji.report.samplers import (
    STUDENT,
    TEACHER_STEPS,
    Sampler,
    pictures_with_k,
    samplers,
    student_name,
    teacher_name,
    teacher_of,
)
from training.emoji.report.score import Scorer
from training.emoji.report.tiny_report import Autoencoders, load_autoencoders
from training.emoji.stages.autoencoder import to_pixels
from training.emoji.stages.tiny_autoencoder import to_bytes

Source = Callable[[Sequence[Scene]], list[Pixels]]
"""Scenes -> their pictures, uint8 [H, W, 3]."""
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
COLOURED_FORMS = ("heart", "circle", "square", "book", "apple")
"""Glyphs that exist in several colours. Without colours all hearts are one, and so on."""
KNOWN_SHARE, KNOWN_SEEDS = 0.9, 8
"""Share of drawings in which a part must be named to count, and the number of these drawings."""
JITTER_SEEDS = (0, 1)
"""Seeds of the jitter of the drawings that choose the parts, and of those in the table."""
DRAWINGS, THROUGH_AUTOENCODER = "drawings", "drawings through the autoencoder"
WORST = 20


@dataclass(frozen=True)
class Readings:
    """Numbers of glyphs in the list: asked for in a caption, and read in its picture."""

    asked: NDArray[np.int64]
    """[N]"""
    whole: NDArray[np.int64]
    """Reading of the whole glyph in colour, [N]."""
    parts: NDArray[np.int64]
    """Readings of its parts without colours, [N, 9]."""

    @property
    def whole_right(self) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.whole == self.asked
        return right

    @property
    def parts_right(self) -> NDArray[np.bool_]:
        forms = np.array([form_of(glyph) for glyph in load_glyphs()])
        right: NDArray[np.bool_] = forms[self.parts] == forms[self.asked][:, None]
        return right

    def parts_by_glyph(self) -> NDArray[np.float64]:
        """Return the share of drawings in which each part is named, [glyphs, 9]."""
        right = self.parts_right
        return np.stack([right[self.asked == n].mean(axis=0) for n in range(len(load_glyphs()))])

    def shares(self, known: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the share of the known parts, bool [glyphs, 9], that is named in each picture, [N]; NaN if none is."""
        counted = known[self.asked]
        named, count = (self.parts_right & counted).sum(axis=1), counted.sum(axis=1)
        found: NDArray[np.float64] = np.divide(named, count, out=np.full(len(count), np.nan), where=count > 0)
        return found


def form_of(glyph: Glyph) -> str:
    """Return the name of a glyph, without the colour if only the colour tells it from another."""
    noun = glyph.name.rpartition(" ")[2]
    return noun if noun in COLOURED_FORMS and glyph.name != f"broken {noun}" else glyph.name


def alone(seeds: int) -> list[Scene]:
    """Return every glyph alone, with the plainest caption, once for each seed."""
    return [Scene((glyph,)) for _ in range(seeds) for glyph in load_glyphs()]


def in_pairs(seeds: int) -> list[Scene]:
    """Return pairs in which every glyph stands `seeds` times (an even number), on changing backgrounds."""
    glyphs, colours = load_glyphs(), sorted(BACKGROUNDS)
    return [
        Scene(
            (first, glyphs[(n + 17 + 41 * turn) % len(glyphs)]),
            colours[(n + 3 * turn) % len(colours)],
            relation=RELATIONS[(n + turn) % len(RELATIONS)],
        )
        for turn in range(seeds // 2)
        for n, first in enumerate(glyphs)
    ]


@torch.no_grad()
def read(reader: GlyphReader, pictures: Sequence[Pixels], scenes: Sequence[Scene]) -> Readings:
    """Read every glyph of pictures, uint8 [H, W, 3], one for each scene."""
    numbers = {glyph.name: n for n, glyph in enumerate(load_glyphs())}
    placed = [(picture, p) for picture, scene in zip(pictures, scenes, strict=True) for p in scene.placements()]
    pixels = to_pixels(np.stack([cut_out(picture, placement) for picture, placement in placed]))
    cuts = torch.split(pixels, 64)
    whole = torch.cat([reader(some).argmax(1) for some in cuts])
    read_parts = [reader(parts(without_colours(some)).flatten(0, 1)).argmax(1).view(len(some), -1) for some in cuts]
    asked = np.array([numbers[placement.glyph.name] for _, placement in placed])
    return Readings(asked, whole.numpy(), torch.cat(read_parts).numpy())


def known_parts(reader: GlyphReader, scenes: Sequence[Scene]) -> NDArray[np.bool_]:
    """Return which parts of each glyph the reader names in drawings of scenes, [glyphs, 9]."""
    found: NDArray[np.bool_] = read(reader, drawn(scenes, JITTER_SEEDS[0]), scenes).parts_by_glyph() >= KNOWN_SHARE
    return found


def interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share of `count` glyphs in pictures.

    It is a little wide: only the seeds vary, the glyphs are all there are, and a share of parts varies less than a hit.
    """
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def sources(checkpoint: Path, run: Path, *, damaged: bool) -> dict[str, Source]:
    """Return what is read, by name: drawings, and the student and its teacher at the fewest and the most steps.

    Args:
        damaged: Adds the student with a wrong K and without K, and pictures of other captions.
    """
    model, teacher = load_model(checkpoint), teacher_of(run)
    counts = min(model.recipe.step_counts), max(model.recipe.step_counts)
    both = load_autoencoders(checkpoint)
    sampled = samplers(model, teacher)
    chosen = [student_name(k) for k in counts] + [teacher_name(k) for k in (1, TEACHER_STEPS[-1]) if teacher]
    found: dict[str, Source] = {
        DRAWINGS: partial(drawn, jitter_seed=JITTER_SEEDS[1]),
        THROUGH_AUTOENCODER: partial(through_autoencoder, both),
        **{name: partial(_sampled, sampled[name]) for name in chosen},
    }
    if damaged:
        first = found[student_name(counts[0])]
        found |= {
            f"1 step, K = {counts[1]}": partial(_with_k, model, counts[1]),
            "1 step, no K": partial(_with_k, model, None),
            "1 step, other captions": lambda scenes: first([*scenes[1:], scenes[0]]),
        }
    return found


def drawn(scenes: Sequence[Scene], jitter_seed: int) -> list[Pixels]:
    """Draw scenes with the jitter of training."""
    scorer, rng = Scorer(), random.Random(jitter_seed)
    return [scorer.draw(replace(scene, jitter=sample_jitter(rng))) for scene in scenes]


def through_autoencoder(both: Autoencoders, scenes: Sequence[Scene]) -> list[Pixels]:
    """Draw scenes, encode them (means) and decode them, with the full autoencoder."""
    pixels = both.decode(both.encode(to_pixels(np.stack(drawn(scenes, JITTER_SEEDS[1])))))
    return list(to_bytes(pixels).permute(0, 2, 3, 1).numpy())


def _sampled(sample: Sampler, scenes: Sequence[Scene]) -> list[Pixels]:
    return sample([caption(scene) for scene in scenes], 0)


def _with_k(model: LoadedModel, k: int | None, scenes: Sequence[Scene]) -> list[Pixels]:
    return pictures_with_k(model, [caption(scene) for scene in scenes], 1, k)


@dataclass(frozen=True)
class Legibility:
    """Readings of one source of pictures, alone and in pairs, with the shares of known parts that were named."""

    readings: tuple[Readings, Readings]
    shares: tuple[NDArray[np.float64], NDArray[np.float64]]
    """Of each picture's glyph, [N]; NaN for a glyph without known parts."""

    def by_glyph(self, kind: int) -> NDArray[np.float64]:
        """Return the mean share of each glyph, [glyphs], alone (0) or in pairs (1)."""
        asked = self.readings[kind].asked
        return np.array([self.shares[kind][asked == n].mean() for n in range(len(load_glyphs()))])

    def confusions(self, known: Sequence[NDArray[np.bool_]]) -> Counter[tuple[int, int]]:
        """Count (asked, read) of the known parts that were read wrongly."""
        return Counter(
            (int(found.asked[n]), int(found.parts[n, part]))
            for found, counted in zip(self.readings, known, strict=True)
            for n, part in zip(*np.nonzero(~found.parts_right & counted[found.asked]), strict=True)
        )


def print_legibility(
    checkpoint: Path, run: Path, sheet: Path | None = None, seeds: int = 8, *, damaged: bool = False
) -> None:
    """Print the shares of named glyphs and parts, the worst glyphs and the most frequent confusions as Markdown tables.

    Args:
        run: Folder of a training run; its teacher is read too if it is there.
        sheet: File for a picture of the worst glyphs, drawn and generated.
        seeds: Pictures of each glyph alone, and pictures of pairs in which it stands. An even number.

    Raises:
        FileNotFoundError: The reader is not trained.
        ValueError: `seeds` is odd or below 2.
    """
    if seeds < 2 or seeds % 2:
        raise ValueError(f"{seeds} pictures of a glyph are not an even number from 2 on; choose one with --seeds")
    reader, kinds = load_reader(), (alone(seeds), in_pairs(seeds))
    known = [known_parts(reader, scenes) for scenes in (alone(KNOWN_SEEDS), in_pairs(KNOWN_SEEDS))]
    print(f"known parts of {9 * len(load_glyphs())}: {known[0].sum()} alone, {known[1].sum()} in a pair\n")
    print("| pictures | whole, alone | in a pair | parts, alone | in a pair |\n|---|---|---|---|---|")
    found: dict[str, Legibility] = {}
    shown: dict[str, list[Pixels]] = {}
    for name, source in sources(checkpoint, run, damaged=damaged).items():
        first, second = (source(scenes) for scenes in kinds)
        readings = read(reader, first, kinds[0]), read(reader, second, kinds[1])
        one = Legibility(readings, (readings[0].shares(known[0]), readings[1].shares(known[1])))
        cells = [*(_cell(r.whole_right.astype(np.float64)) for r in readings), *(_cell(s) for s in one.shares)]
        print(f"| {' | '.join((name, *cells))} |", flush=True)
        found[name], shown[name] = one, [*first[: len(load_glyphs())], *second[: len(load_glyphs())]]
    served = {name: one for name, one in found.items() if name.startswith(STUDENT)}
    worst = _print_worst(found[THROUGH_AUTOENCODER], served, known)
    _print_confusions(list(served.values())[-1].confusions(known))
    if sheet:
        _draw_sheet(sheet, worst, {name: shown[name] for name in (DRAWINGS, THROUGH_AUTOENCODER, *served)})


def _cell(values: NDArray[np.float64]) -> str:
    values = values[~np.isnan(values)]
    low, high = interval(float(values.mean()), len(values))
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def _print_worst(
    ceiling: Legibility, served: Mapping[str, Legibility], known: Sequence[NDArray[np.bool_]]
) -> list[int]:
    """Print the worst glyphs of the student, over all step counts. Return their numbers, the worst first."""
    glyphs, columns = load_glyphs(), {**served, THROUGH_AUTOENCODER: ceiling}
    shares = {name: [one.by_glyph(kind) for kind in range(2)] for name, one in columns.items()}
    overall = np.nanmean([share for name in served for share in shares[name]], axis=0)
    confused = sum((one.confusions(known) for one in served.values()), Counter[tuple[int, int]]())
    worst = [int(n) for n in np.argsort(overall, kind="stable")[:WORST]]
    print(f"\n| glyph (alone / in a pair) | {' | '.join(columns)} | parts taken for |\n|{'---|' * (len(columns) + 2)}")
    for n in worst:
        cells = [" / ".join(f"{share[n]:.2f}" for share in both) for both in shares.values()]
        cells = [cell.replace("nan", "-") for cell in cells]
        taken = Counter({wrong: count for (asked, wrong), count in confused.items() if asked == n})
        names = ", ".join(glyphs[wrong].name for wrong, _ in taken.most_common(3))
        print(f"| {glyphs[n].name} | {' | '.join(cells)} | {names} |")
    return worst


def _print_confusions(counts: Counter[tuple[int, int]]) -> None:
    glyphs = load_glyphs()
    print("\n| asked | parts read as | times |\n|---|---|---|")
    for (asked, wrong), count in counts.most_common(WORST):
        print(f"| {glyphs[asked].name} | {glyphs[wrong].name} | {count} |")


def _draw_sheet(file: Path, worst: Sequence[int], shown: Mapping[str, Sequence[Pixels]], scale: int = 2) -> None:
    """Draw glyphs down and sources across, alone and as the first of a pair."""
    glyphs, cell, gap, head = load_glyphs(), 64 * scale, 4, 40
    columns = [(name, kind) for kind in range(2) for name in shown]
    sheet = Image.new("RGB", (len(columns) * (cell + gap), head + len(worst) * (cell + 18)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for column, (name, kind) in enumerate(columns):
        x = column * (cell + gap)
        pen.multiline_text((x, 6), name.replace(" through the ", ",\n").replace(", ", "\n", 1), fill="black", font=font)
        for row, n in enumerate(worst):
            picture = Image.fromarray(shown[name][kind * len(glyphs) + n])
            sheet.paste(picture.resize((cell, cell), Image.Resampling.BICUBIC), (x, head + row * (cell + 18) + 16))
    for row, n in enumerate(worst):
        pen.text((2, head + row * (cell + 18) + 2), glyphs[n].name, fill="black", font=font)
    sheet.save(file)
