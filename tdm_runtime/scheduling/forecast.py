"""The choice of samples for a call, and the forecast of when samples finish. No tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tdm_runtime.scheduling.cost_model import CostModel
from tdm_runtime.scheduling.work import NEVER_S, TOLERANCE_S, Urgency, Work

MAX_BACKGROUND_COST = 1.1
"""Factor by which background work may lengthen a call of other work."""
MARGIN = 3.0
"""Reserve of a promise, in mean absolute deviations: 99 of 100 normally distributed times are late by less than 2.9."""
Item = TypeVar("Item", bound=Work)


def choose(ordered: Sequence[Item], costs: CostModel, capacity: int) -> list[Item]:
    """Return the samples of the next call: the most urgent one and, in order, as many of its lane as help.

    Prompts come first, then given pictures: while samples of that batch need theirs, the next call encodes as many as
    help, and the step that they share follows. More urgent samples may come in between, so that a slow text encoder
    delays them by one prompt at most.

    If the most urgent sample is no background work, background work joins only while it hardly lengthens the call.

    Args:
        ordered: At least one sample, most urgent first.
    """
    batch = _mates(ordered, costs, capacity)
    if readers := [item for item in batch if item.needs_text]:
        return readers[: costs.batch_size(readers[0].text, min(capacity, len(readers)))]
    if editors := [item for item in batch if item.needs_image]:
        editors = [item for item in editors if item.image == editors[0].image]
        return editors[: costs.batch_size(editors[0].image, min(capacity, len(editors)))]
    return batch


def _mates(ordered: Sequence[Item], costs: CostModel, capacity: int) -> list[Item]:
    """Return the samples that should share the next step or decode with the most urgent one."""
    lane = ordered[0].lane
    mates = [item for item in ordered if item.lane == lane]
    waited_for = mates if ordered[0].is_background else [item for item in mates if not item.is_background]
    batch = waited_for[: costs.batch_size(lane.kind, min(capacity, len(waited_for)))]
    if len(waited_for) == len(mates):
        return batch
    alone_s, room = costs.seconds(lane.kind, len(batch)), costs.batch_size(lane.kind, min(capacity, len(mates)))
    for item in mates:
        if item.is_background and len(batch) < room:
            if costs.seconds(lane.kind, len(batch) + 1) > MAX_BACKGROUND_COST * alone_s:
                break
            batch.append(item)
    return batch


def call_seconds(batch: Sequence[Work], costs: CostModel) -> float:
    """Return the seconds of one call, with the previews decoded after it."""
    seconds = costs.seconds(batch[0].call_kind, len(batch))
    if not batch[0].is_prepared:
        return seconds
    return seconds + sum(costs.seconds(work.preview) for work in batch if work.is_shown)


@dataclass(frozen=True)
class Forecast:
    """Forecast for a set of samples, if none joins or leaves."""

    finish_s: Mapping[Urgency, float]
    """Time at which each sample finishes, monotonic; only samples that the forecast followed to their end."""
    broken: Urgency | None
    """Urgency of the first promise that is missed. The forecast stops there."""
    margin_s: float = 0.0
    """Reserve of the first missed promise, for the deviations of the calls before it."""


def forecast(
    works: Sequence[Work],
    costs: CostModel,
    capacity: int,
    now_s: float,
    watched: Collection[Urgency] = (),
    margin: float = MARGIN,
    *,
    together: bool = False,
) -> Forecast:
    """Run the scheduler ahead of time, on copies, until every promise and every watched sample is decided.

    This is the schedulability test. It makes the choices that the engine will make, so it is exact for the known costs.
    A promise holds if its reserve covers the deviations of all calls before it. Calls deviate independently, so the
    squares add up.

    Args:
        capacity: Most samples in one call.
        now_s: When the first call begins, monotonic.
        watched: Samples to follow beside those with a promise.
        margin: Reserve in mean absolute deviations.
        together: Whether newcomers wait until all that have started are done.
    """
    finish_s: dict[Urgency, float] = {}
    variance = 0.0
    open_ends = {work.urgency for work in works if work.promised_s < NEVER_S or work.urgency in watched}
    live = sorted((work.copy() for work in works), key=lambda work: work.urgency) if open_ends else []
    while open_ends:
        ready = [work for work in live if work.has_started] if together else []
        batch = choose(ready or live, costs, capacity)
        seconds = call_seconds(batch, costs)
        now_s += seconds
        variance += (costs.deviation(batch[0].call_kind) * seconds) ** 2
        for work in batch:
            if not work.advance():
                continue
            live.remove(work)
            open_ends.discard(work.urgency)
            finish_s[work.urgency] = now_s
            margin_s = margin * math.sqrt(variance)
            if now_s + margin_s > work.promised_s + TOLERANCE_S:
                return Forecast(finish_s, work.urgency, margin_s)
    return Forecast(finish_s, None)
