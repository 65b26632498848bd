"""From lines to chunks of pictures and clips. Makes nothing, and gives the same chunks wherever it runs."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from serving.command.checks import check_models
from serving.config import ServerConfig
from serving.errors import APIError, from_exception, invalid, unknown_model
from serving.offline.given_pictures import Folder
from serving.offline.lines import Line, Source, read_lines
from serving.offline.names import DEFAULT_TEMPLATE, DEFAULT_TEMPLATE_OF_FILES, NameTemplate, safe
from serving.offline.records import Entry, Fields, Known, key_of, place_of
from serving.schema.batch_line import FIELDS, RequestLine, background_order, read_request_line, url_of, urls_of
from serving.schema.order import DeliveryOptions, ImageOrder
from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.params import MAX_SEED

IDS, NAMES = 0, 1
GRID = "grid"
"""Name of the contact sheet, without suffix."""


@dataclass(frozen=True)
class PlanOptions:
    """What is asked of all lines."""

    sources: tuple[Source, ...]
    seed: int = 0
    """Each line without a seed gets one that is drawn from this and its id."""
    sweep: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Field -> its values. Each line is made with every combination."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """Fields of lines that do not have them. One that only clips have, or only pictures, is for those lines."""
    name: str | None = None
    """Template of names; None for `DEFAULT_TEMPLATE`, or `DEFAULT_TEMPLATE_OF_FILES` if there are several."""
    strict: bool = True
    """See `DeliveryOptions.strict`."""
    chunk_size: int = 64
    """Pictures in a chunk, which is what one worker makes at once, and one shard."""


@dataclass(frozen=True)
class Unit:
    """One picture or clip to make, or one failure to report."""

    place: Fields
    """See `place_of`."""
    line: int
    """Number of its line in its file, from 1."""
    source: str
    """Name of its file; empty if there is only one."""
    order: ImageOrder | None = None
    """None for a failure."""
    name: str = ""
    """Name of the picture in the output, with suffix."""
    key: str = ""
    """See `key_of`."""
    failure: APIError | None = None
    known: Entry | None = None
    """Entry of this picture in an earlier run."""

    def base(self) -> Fields:
        """Return the first fields of its record."""
        return self.place | {"line": self.line} | ({"source": self.source} if self.source else {})


@dataclass(frozen=True)
class Chunk:
    """Pictures that one worker makes and that one shard holds."""

    number: int
    units: tuple[Unit, ...]
    share: float | None
    """Share of the input that is read after it."""


@dataclass(frozen=True)
class Model:
    """What a plan knows of a model."""

    recipe: Recipe
    digest: str

    @property
    def fields(self) -> set[str]:
        """Names of the fields that its requests may have."""
        return {name for url in urls_of(self.recipe) for name in FIELDS[url]}


def find_models(config: ServerConfig) -> dict[str, Model]:
    """Return the models of a configuration by name, the default first, without loading them.

    Raises:
        CheckpointError: a model cannot be used.
    """
    models: dict[str, Model] = {}
    for source, checkpoint in zip(config.models, check_models(config), strict=True):
        name = source.name or checkpoint.recipe.name
        models[name] = Model(replace(checkpoint.recipe, name=name), checkpoint.digest)
    first = next(iter(models))
    for lora in config.loras:
        base = models[lora.base or first]
        files = sorted(file for file in lora.path.rglob("*") if file.is_file()) if lora.path.is_dir() else [lora.path]
        facts = "".join([base.digest, str(lora.scale), *map(file_sha256, files)])
        digest = hashlib.sha256(facts.encode()).hexdigest()
        models[lora.name] = Model(replace(base.recipe, name=lora.name), digest)
    return models


def check_defaults(options: PlanOptions, models: Mapping[str, Model]) -> None:
    """
    Raises:
        ValueError: a default is of a field that no model reads.
    """
    fields = {name for model in models.values() for name in model.fields}
    if unread := [name for name, _ in options.defaults if name not in fields]:
        message = f"--set {unread[0]} has no use: {', '.join(models)} read {', '.join(sorted(fields))}"
        raise ValueError(f"{message}; leave it out")


class Planner:
    """Makes the chunks of a run, in the order of the input."""

    def __init__(self, options: PlanOptions, models: Mapping[str, Model], known: Known) -> None:
        self._options = options
        self._models = models
        self._known = known
        template = DEFAULT_TEMPLATE if len(options.sources) == 1 else DEFAULT_TEMPLATE_OF_FILES
        self._template = NameTemplate(options.name or template)
        self._defaults = dict(options.defaults)
        self._folders = {source.name: Folder.of(source) for source in options.sources}
        names = [name for name, _ in options.sweep]
        values = itertools.product(*(values for _, values in options.sweep))
        self._combinations: list[Fields] = [dict(zip(names, row, strict=True)) for row in values]
        known.take(NAMES, GRID)

    def chunks(self) -> Iterator[Chunk]:
        """Yield all chunks.

        Raises:
            OSError, ValueError: the input cannot be read.
        """
        numbers, units, share = itertools.count(), list[Unit](), None
        for line in read_lines(list(self._options.sources)):
            for unit in self.units(line):
                if len(units) == self._options.chunk_size:
                    yield Chunk(next(numbers), tuple(units), share)
                    units = []
                units.append(unit)
            share = line.share
        if units:
            yield Chunk(next(numbers), tuple(units), 1.0)

    def units(self, line: Line) -> Iterator[Unit]:
        """Yield the pictures of a line, or its failure."""
        line_id = f"{line.source}:{line.number}" if line.source else str(line.number)
        try:
            if isinstance(line.content, APIError):
                raise line.content
            read = read_request_line(line.content)
            if read.id is not None and self._known.take(IDS, read.id):
                line_id = read.id
            elif read.id is not None or not self._known.take(IDS, line_id):
                taken = read.id or line_id
                raise invalid(f"the id {taken!r} appears twice; give each line its own", "id", "invalid_value")
        except APIError as error:
            yield Unit(place_of(line_id, 0, {}), line.number, line.source, failure=error)
            return
        for sweep in self._combinations:
            yield from self._pictures(line, line_id, read, sweep)

    def _pictures(self, line: Line, line_id: str, read: RequestLine, sweep: Fields) -> Iterator[Unit]:
        try:
            given = self._defaults | read.body | sweep
            name = given.get("model")
            url = read.url or url_of(self._recipe_of(name if isinstance(name, str) else None), given)
            defaults = {name: value for name, value in self._defaults.items() if name in FIELDS[url]}
            body = defaults | read.body | sweep
            if read.url is None:
                body = self._folders[line.source].with_pictures(body)
            order = background_order(url, body, self._recipe_of, self._seed_of(line_id), line.is_text)
        except (APIError, InvalidRequestError) as error:
            yield Unit(place_of(line_id, 0, sweep), line.number, line.source, failure=from_exception(error))
            return
        strict = self._options.strict or order.delivery.strict
        delivery = DeliveryOptions(strict=strict, is_background=True)  # no client waits, so there is no time limit
        for index, params in enumerate(order.pictures):
            one = replace(order, pictures=(params,), delivery=delivery)
            unit = Unit(place_of(line_id, index, sweep), line.number, line.source, one)
            try:
                name = self._name(unit, len(order.pictures), sweep)
            except APIError as error:
                yield replace(unit, order=None, failure=error)
                continue
            key = key_of(one, self._models[one.model].digest)
            yield replace(unit, name=name, key=key, known=self._known.find(unit.place, key))

    def _recipe_of(self, name: str | None) -> Recipe:
        if name is None:
            return next(iter(self._models.values())).recipe
        if name not in self._models:
            raise unknown_model(name, self._models)
        return self._models[name].recipe

    def _seed_of(self, line_id: str) -> int:
        """Return the seed of a line that has none. It does not change if other lines come or go."""
        text = f"{self._options.seed} {line_id}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") % (MAX_SEED + 1)

    def _name(self, unit: Unit, num_pictures: int, sweep: Fields) -> str:
        """Return the name of a picture, which no other one has.

        Raises:
            APIError: 400, the name is too long or taken.
        """
        assert unit.order is not None
        (params,), index = unit.order.pictures, unit.place.get("index", 0)
        swept = "-".join(f"{name}={safe(str(value))}" for name, value in sweep.items())
        numbers = {
            "line": unit.line,
            "index": index,
            "seed": params.seed,
            "steps": params.num_inference_steps,
            "width": params.width,
            "height": params.height,
            "frames": params.frames or 1,
        }
        texts = {
            "id": unit.place["id"],
            "source": unit.source,
            "model": unit.order.model,
            "prompt": params.prompt,
            "sweep": swept,
            "variant": (f"-{swept}" if sweep else "") + (f"-{index}" if num_pictures > 1 else ""),
        }
        name = self._template.path(numbers, texts)
        if not self._known.take(NAMES, name.casefold()):
            message = f"the name {name[:80]!r} is taken; add {{line}}, {{id}} or {{variant}} to --name"
            raise invalid(message, None, "invalid_value")
        return f"{name}.{unit.order.encoding.output_format}"
