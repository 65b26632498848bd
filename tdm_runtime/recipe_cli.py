"""`tdm-recipe`: print or write the recipe of a stock diffusers folder, or list the built-in ones."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tdm_runtime.checkpoint.folder import weight_hashes
from tdm_runtime.checkpoint.lora.lora_file import read_lora
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.checkpoint.stock.absent_recipes import ABSENT
from tdm_runtime.checkpoint.stock.implied_recipe import (
    guidance_scale,
    implied_recipe,
    native_clip,
    native_size,
    size_rule,
)
from tdm_runtime.checkpoint.stock.pipeline_folder import family_of
from tdm_runtime.checkpoint.stock.published_recipes import PUBLISHED, published_recipe
from tdm_runtime.cli import add_lora_argument
from tdm_runtime.errors import RecipeError, TDMError
from tdm_runtime.params import parse_size
from tdm_runtime.whole_file import write_whole


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 2 on an error."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.list == (given.folder is not None):
        parser.error("give a folder, or --list, and not both")
    try:
        if given.list:
            print_published()
            return 0
        recipe = recipe_for(given)
        if given.output is None:
            print(recipe.to_json(), end="")
            return 0
        recipe = placed(recipe, given.folder, given.output)
        write_whole(given.output, recipe.to_json().encode())
        print(f"{given.output}: {recipe.name}, {recipe.solver}, steps {', '.join(map(str, recipe.step_counts))}")
        return 0
    except (TDMError, OSError) as error:
        print(f"tdm-recipe: {error}", file=sys.stderr)
        return 2


def recipe_for(given: argparse.Namespace) -> Recipe:
    """Return the recipe that the arguments ask for.

    Raises:
        TDMError: an argument or a file is wrong; the message names it and the remedy.
    """
    family = family_of(given.folder)
    for adapter in given.lora:
        read_lora(Path(adapter.file), family)
    if given.recipe is None:
        implied = implied_recipe(
            family,
            given.folder,
            given.steps,
            given.timesteps,
            given.sigmas,
            given.guidance,
            eta=given.eta or 0.0,
            name=given.name,
        )
        return _sized(replace(implied, adapters=tuple(given.lora)), given.native_size)
    for option in ("steps", "timesteps", "sigmas", "eta"):
        if getattr(given, option) is not None:
            raise RecipeError(f"--{option} and --recipe {given.recipe} both say the schedule; leave one of them out")
    entry = published_recipe(given.recipe)
    if entry.family != family.name:
        raise RecipeError(f"recipe {entry.name} is for {entry.family}, and {given.folder} is of {family.name}")
    recipe = entry.recipe(
        given.name or given.folder.resolve().name,
        native_size(family, given.folder),
        clip=native_clip(family, given.folder),
    )
    scale = 1.0 if entry.lora_scale is None else entry.lora_scale
    adapters = tuple(replace(one, scale=scale) if one.scale == 1.0 else one for one in given.lora)
    guidance = entry.guidance_scale if given.guidance is None else given.guidance
    recipe = replace(
        recipe,
        size_rule=size_rule(family, given.folder),
        adapters=adapters,
        guidance_scale=guidance_scale(family, given.folder, guidance),
    )
    return _sized(recipe, given.native_size)


def _sized(recipe: Recipe, sizes: Sequence[tuple[int, int]] | None) -> Recipe:
    """Return the recipe with native sizes, (width, height) in pixels; None keeps its own.

    Raises:
        RecipeError: the size rule does not allow a size.
    """
    rule = recipe.size_rule
    for width, height in sizes or ():
        if rule is not None and not rule.allows(width, height):
            nearest = "x".join(map(str, rule.nearest(width, height)))
            raise RecipeError(f"--native-size has {width}x{height}; {recipe.name} makes {rule}: take {nearest}")
    return recipe if sizes is None else replace(recipe, native_sizes=tuple(sizes))


def placed(recipe: Recipe, base: Path, file: Path) -> Recipe:
    """Return the recipe as a file has it: with paths relative to the file, and with the hashes of weights beside it."""
    folder = file.resolve().parent
    adapters = tuple(replace(one, file=os.path.relpath(one.file, folder)) for one in recipe.adapters)
    recipe = replace(recipe, adapters=adapters)
    if folder != base.resolve():
        return replace(recipe, base=os.path.relpath(base.resolve(), folder))
    return replace(recipe, files=weight_hashes(base))


def print_published() -> None:
    """Print the built-in recipes: names, step counts, what their source states and what was inferred."""
    for entry in PUBLISHED.values():
        scale = "" if entry.lora_scale is None else f", LoRA at scale {entry.lora_scale:g}"
        steps = ", ".join(map(str, entry.steps))
        print(f"{entry.name}: {entry.family}, steps {steps} ({entry.checkpoint}{scale})")
        if entry.stated:
            print(f"    stated: {entry.stated}")
        if entry.inferred:
            print(f"    inferred: {entry.inferred}")
    for name, why in ABSENT.items():
        print(f"no recipe for {name}: {why}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tdm-recipe", description="Print or write the recipe by which a stock diffusers folder is sampled."
    )
    parser.add_argument("folder", nargs="?", type=Path, help="folder in diffusers layout")
    parser.add_argument("--list", action="store_true", help="list the built-in recipes of published checkpoints")
    parser.add_argument("--steps", type=_whole_numbers, help="step counts to serve, such as 1,2,4")
    parser.add_argument("--timesteps", type=_numbers, help="timesteps as the stock pipeline takes them")
    parser.add_argument("--sigmas", type=_numbers, help="sigmas as the stock pipeline takes them, before any shift")
    parser.add_argument("--eta", type=float, help="eta as the stock pipeline takes it; read by TCD")
    parser.add_argument("--guidance", type=float, help="guidance scale that the model reads as an input")
    parser.add_argument(
        "--native-size",
        type=_sizes,
        metavar="WxH[,WxH]",
        help="sizes in pixels that it was trained at, the default first; that of the folder's configs when absent",
    )
    add_lora_argument(parser)
    parser.add_argument("--recipe", metavar="NAME", help="a built-in recipe of --list")
    parser.add_argument("--name", help="name of the model in requests; the folder's name by default")
    parser.add_argument(
        "-o", "--output", type=Path, help="file to write; in another folder than the weights it names their folder"
    )
    return parser


def _sizes(text: str) -> list[tuple[int, int]]:
    try:
        return list(dict.fromkeys(parse_size(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:32]!r} is no list of sizes, such as 1024x1024,1344x768") from None


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 1,2,4") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, such as 999,749,499,249") from None


if __name__ == "__main__":
    sys.exit(main())
