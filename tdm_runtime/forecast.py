"""What shares a call, and when everything will be done. Knows no tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from tdm_runtime.cost_model import CostModel, Kind

TEXT = Kind("text")
NO_PREVIEW = Kind("")
NEVER_S = float("inf")
TOLERANCE_S = 1e-7
"""What is late by less than this is in time: sums of seconds are not exact."""
MAX_BACKGROUND_COST = 1.1
"""Times what a call takes, that it may take with background work besides."""
MARGIN = 3.0
"""Usual deviations that a promise has to spare: 99 of 100 normal ones are late by less than 2.9 of them."""
Urgency = tuple[float, int]
"""(deadline in monotonic seconds, order of arrival): unique among the live, the smallest goes first."""


class Lane(NamedTuple):
    """Samples of one lane fit into one call."""

    kind: Kind
    alone: int | None = None
    """A number of its own for a sample that shares no call."""


@dataclass(eq=False, kw_only=True)
class Work:
    """A sample as the scheduler sees it: some denoiser steps, then its decoding."""

    denoise: Lane
    decode: Lane
    steps_left: int
    urgency: Urgency
    open_steps: tuple[int, ...] = ()
    """Step counts to choose from, ascending; empty once one is settled. Until then `steps_left` is the first."""
    promised_s: float = NEVER_S
    """When it must be done, monotonic; never late where nothing was promised."""
    elapsed_s: float = 0.0
    """Time of its budget that had passed before its submission."""
    hand_over_s: float = 0.0
    """Time kept of its budget for handing its picture over, which takes longer under load."""
    encoding_s: float = 0.0
    """Time kept of its budget for encoding its file."""
    target_s: float = NEVER_S
    """When it should be done at the latest, monotonic: what a step count is chosen by."""
    unpromised_s: float = 0.0
    """Its deadline where its promise cannot be kept, monotonic."""
    needs_text: bool = False
    """Whether its prompt is encoded before its first step."""
    text: Kind = TEXT
    """What that is called."""
    preview: Kind = NO_PREVIEW
    """What steps are followed by while there are `previews_left`, but not the last."""
    previews_left: int = 0
    unseen_steps: int = 0
    """So many of its next steps are followed by none yet."""
    is_background: bool = False
    """Whether it is no sign of how much is asked for: it takes what time others leave."""
    has_started: bool = False
    """Whether a call was made for it."""
    predicted_s: float = 0.0
    """When it is done, as expected when its first call was due, monotonic."""

    @property
    def lane(self) -> Lane:
        """Of its next call."""
        return self.denoise if self.steps_left else self.decode

    @property
    def is_shown(self) -> bool:
        """Whether its next call is a step that a preview follows."""
        return self.previews_left > 0 and self.steps_left > 1 and not self.unseen_steps

    def share_no_call(self) -> None:
        """Be alone in every call."""
        order = self.urgency[1]
        self.denoise, self.decode = self.denoise._replace(alone=order), self.decode._replace(alone=order)

    def settle(self, steps: int) -> None:
        """Take this many steps, none of which was taken yet."""
        assert not self.has_started
        self.steps_left = steps
        self.open_steps = ()

    def copy(self) -> Work:
        """Where it stands, without what it is."""
        return Work(
            denoise=self.denoise,
            decode=self.decode,
            steps_left=self.steps_left,
            urgency=self.urgency,
            promised_s=self.promised_s,
            needs_text=self.needs_text,
            text=self.text,
            is_background=self.is_background,
            preview=self.preview,
            previews_left=self.previews_left,
            unseen_steps=self.unseen_steps,
        )

    def advance(self) -> bool:
        """Move past its next call. True where that was its last."""
        self.has_started = True
        self.needs_text = False
        if not self.steps_left:
            return True
        self.previews_left -= self.is_shown
        self.steps_left -= 1
        self.unseen_steps = max(0, self.unseen_steps - 1)
        return False

    def seconds_shared(self, costs: CostModel, steps: int, capacity: int) -> float:
        """Its share of the machine's time, with so many steps, in batches of the size that gives most a second."""
        text_s = costs.seconds(self.text) if self.needs_text else 0.0
        shares_s = [
            costs.seconds(kind, size) / size
            for kind in (self.denoise.kind, self.decode.kind)
            if (size := costs.batch_size(kind, capacity))
        ]
        return text_s + steps * shares_s[0] + shares_s[1]

    def seconds_left(self, costs: CostModel, size: int = 1) -> float:
        """Until it is done, if every step has `size` samples and nothing comes between."""
        seconds = self.steps_left * costs.seconds(self.denoise.kind, size) + costs.seconds(self.decode.kind)
        if self.needs_text:
            seconds += costs.seconds(self.text)
        if self.previews_left:
            seconds += max(0, min(self.previews_left, self.steps_left - 1 - self.unseen_steps)) * costs.seconds(
                self.preview
            )
        return seconds


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
