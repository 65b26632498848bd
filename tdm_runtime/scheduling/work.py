"""`Work`: one picture as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tdm_runtime.scheduling.cost_model import CostModel, Kind

TEXT = Kind("text")
NO_PREVIEW = Kind("")
NEVER_S = float("inf")
TOLERANCE_S = 1e-7
"""A sample that is late by less than this is in time, because sums of seconds are not exact."""
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
