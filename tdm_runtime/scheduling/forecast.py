"""What shares a call, and when everything will be done. Knows no tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tdm_runtime.scheduling.cost_model import CostModel
from tdm_runtime.scheduling.work import NEVER_S, TOLERANCE_S, Urgency, Work

MAX_BACKGROUND_COST = 1.1
"""Times what a call takes, that it may take with background work besides."""
MARGIN = 3.0
"""Usual deviations that a promise has to spare: 99 of 100 normal ones are late by less than 2.9 of them."""


Item = TypeVar("Item", bound=Work)


def choose(ordered: Sequence[Item], costs: CostModel, capacity: int) -> list[Item]:
    """Return the samples of the next call: the most urgent and, in order, as many of its lane as help.

    Where somebody waits for the most urgent, background work fills what room is about free.

    Args:
        ordered: at least one sample, most urgent first.
    """
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
    """Of one call, with the prompts encoded before and the previews decoded after it."""
    return costs.seconds(batch[0].lane.kind, len(batch)) + sum(_beside_s(work, costs) for work in batch)


def _beside_s(work: Work, costs: CostModel) -> float:
    """What a sample adds to its next call that is not shared."""
    text_s = costs.seconds(work.text) if work.needs_text else 0.0
    return text_s + (costs.seconds(work.preview) if work.is_shown else 0.0)


@dataclass(frozen=True)
class Forecast:
    """What becomes of a set of samples if none joins or leaves."""

    finish_s: Mapping[Urgency, float]
    """When samples are done, monotonic; of those that were followed to their end."""
    broken: Urgency | None
    """The first promise that is not kept; what comes after it was not looked at."""
    margin_s: float = 0.0
    """Time that the first broken promise had to spare for the deviation of the calls before it."""


def forecast(
    works: Sequence[Work],
    costs: CostModel,
    capacity: int,
    now_s: float,
    watched: Collection[Urgency] = (),
    margin: float = MARGIN,
) -> Forecast:
    """Run the scheduler ahead of time, on copies, until every promise and the watched samples are decided.

    This is the schedulability test, exact for the costs as they are known: these are the very choices
    that the engine will make. A promise is kept with room for the deviation of all calls before it; they
    deviate on their own, so their squares add up.

    Args:
        watched: samples to be followed besides those that have a promise.
        margin: usual deviations to spare.
    """
    finish_s: dict[Urgency, float] = {}
    variance = 0.0
    open_ends = {work.urgency for work in works if work.promised_s < NEVER_S or work.urgency in watched}
    live = sorted((work.copy() for work in works), key=lambda work: work.urgency) if open_ends else []
    while open_ends:
        batch = choose(live, costs, capacity)
        seconds = call_seconds(batch, costs)
        now_s += seconds
        variance += (costs.deviation(batch[0].lane.kind) * seconds) ** 2
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
