"""`CostTable`: how long the calls of one model take on one machine, measured or published."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pydantic

from benchmarks.workload import Size
from tdm_runtime.scheduling.cost_model import CostModel, Kind
from tdm_runtime.whole_file import write_whole

TABLES = Path(__file__).parent / "tables"
"""Folder of the published tables."""

Seconds = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
BatchSeconds = Annotated[
    Mapping[Annotated[int, pydantic.Field(ge=1)], Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]],
    pydantic.Field(min_length=1),
]
"""Samples in a call -> seconds of the call. Larger calls than the largest one are not made."""


@dataclass(frozen=True)
class SizeCosts:
    """Costs of one picture size."""

    denoise_s: BatchSeconds
    """Seconds of one step of the denoiser."""
    decode_s: BatchSeconds


@pydantic.with_config(extra="forbid")
@dataclass(frozen=True)
class CostTable:
    """Costs of one model on one machine."""

    name: str
    machine: str
    source: str
    """Where the numbers are from, and what was assumed beyond them."""
    step_counts: Annotated[tuple[Annotated[int, pydantic.Field(ge=1)], ...], pydantic.Field(min_length=1)]
    """Step counts of the checkpoint, ascending."""
    sizes: Annotated[Mapping[str, SizeCosts], pydantic.Field(min_length=1)]
    """"WIDTHxHEIGHT" -> costs. The first is the default."""
    text_s: BatchSeconds
    """Seconds of a call of the text encoders."""
    encode_s: Seconds = 0.0
    """Seconds of encoding a picture's file, beside the engine."""
    front_s: Seconds = 0.0
    """Seconds of a lone request outside the engine: HTTP, routing, hand-over."""
    overhead_s: Seconds = 0.0
    """Seconds that a picture takes from the calls of others: admission, noise, its file, a client on the same cores."""
    deviation: Seconds = 0.0
    """Mean absolute deviation of a call from its cost, as a share of it."""
    paces: tuple[Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)], ...] = ()
    """Durations of calls in a row under load, as multiples of their costs. Simulated calls take them in this order, so
    that slow moments last. Empty: a log-normal distribution with `deviation`."""
    usd_per_hour: Seconds | None = None
    """Price of one replica; None if it is not known."""
    default_steps: int = 0
    """Step count of requests that name none; 0 is the largest."""

    @property
    def steps(self) -> int:
        """Step count of requests that name none."""
        return self.default_steps or self.step_counts[-1]

    @property
    def text(self) -> Kind:
        """Kind of the calls of the text encoders."""
        return Kind("text", (), self.name)

    def denoise(self, size: Size) -> Kind:
        """Kind of the denoiser's steps."""
        return Kind("denoise", size, self.name)

    def decode(self, size: Size) -> Kind:
        """Kind of the decodes."""
        return Kind("decode:full", size, self.name)

    def size(self, asked: Size | None) -> Size:
        """Return the size of a request.

        Raises:
            ValueError: The table has no costs of this size.
        """
        name = next(iter(self.sizes)) if asked is None else f"{asked[0]}x{asked[1]}"
        if name not in self.sizes:
            raise ValueError(f"{self.name} has no costs of size {name}; it has {', '.join(self.sizes)}")
        return _parsed(name)

    def unloaded_s(self) -> float:
        """Return the seconds of a lone request of the default size and steps, by the way to the server and back."""
        costs = next(iter(self.sizes.values()))
        model_s = self.text_s[1] + self.steps * costs.denoise_s[1] + costs.decode_s[1]
        return self.front_s + model_s + self.encode_s

    def capacity(self, steps: int | None = None) -> float:
        """Return the pictures a second of one replica at the default size, in batches of the best size.

        Args:
            steps: of a picture; the default ones if None.
        """
        costs = next(iter(self.sizes.values()))
        shares_s = [min(seconds / n for n, seconds in one.items()) for one in (costs.denoise_s, costs.decode_s)]
        text_s = min(seconds / n for n, seconds in self.text_s.items())
        return 1 / (self.overhead_s + text_s + (steps or self.steps) * shares_s[0] + shares_s[1])

    def calls(self) -> Iterator[tuple[Kind, BatchSeconds]]:
        """Yield each kind of call with its costs."""
        yield self.text, self.text_s
        for name, costs in self.sizes.items():
            size = _parsed(name)
            yield self.denoise(size), costs.denoise_s
            yield self.decode(size), costs.decode_s

    def with_further_samples(self, share: float) -> CostTable:
        """Return the table of a machine on which each further sample of a call costs this share of the first."""

        def scaled(seconds: BatchSeconds) -> BatchSeconds:
            return {n: seconds[1] * (1 + share * (n - 1)) for n in seconds}

        sizes = {name: SizeCosts(scaled(costs.denoise_s), scaled(costs.decode_s)) for name, costs in self.sizes.items()}
        return replace(self, sizes=sizes, text_s=scaled(self.text_s))

    def write(self, file: Path) -> None:
        """Write the table as JSON."""
        write_whole(file, _ADAPTER.dump_json(self, indent=2, exclude_defaults=True) + b"\n")


_ADAPTER = pydantic.TypeAdapter(CostTable)


def read_table(name: str) -> CostTable:
    """Read a table: a JSON file that `tdm-bench profile` wrote, or a published table by its name.

    Raises:
        ValueError: There is no such table, or the file is none; the message says what is wrong with it.
    """
    file = Path(name) if name.endswith(".json") else TABLES / f"{name}.json"
    try:
        table = _ADAPTER.validate_json(file.read_bytes())
    except OSError as error:
        known = ", ".join(sorted(one.stem for one in TABLES.glob("*.json")))
        raise ValueError(
            f"the cost table {name} cannot be read ({error.strerror}); give a file that `tdm-bench profile` wrote, "
            f"or one of {known}"
        ) from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{name} is no cost table: {where}: {first['msg']}") from None
    for size in table.sizes:
        if not re.fullmatch(r"\d+x\d+", size):
            raise ValueError(f"{name} is no cost table: sizes: {size!r} is not WIDTHxHEIGHT")
    if any(1 not in seconds for _, seconds in table.calls()):
        raise ValueError(f"{name} is no cost table: each call needs the seconds of a batch of 1")
    return table


def cost_model(tables: Sequence[CostTable]) -> CostModel:
    """Return a cost model that has learned these tables."""
    model = CostModel()
    for kind, seconds in itertools.chain.from_iterable(table.calls() for table in tables):
        for batch, cost_s in sorted(seconds.items()):
            model.observe(kind, batch, cost_s, 0.0, is_calm=True)
        model.limit(kind, max(seconds))
    return model


def _parsed(size: str) -> Size:
    width, height = size.split("x")
    return int(width), int(height)
