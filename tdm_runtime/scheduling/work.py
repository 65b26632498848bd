"""`Work`: a sample as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tdm_runtime.scheduling.cost_model import CostModel, Kind

TEXT = Kind("text")
"""Default kind of a text call. The engine gives each model its own."""
NO_CALL = Kind("")
"""Kind of calls that are never made, such as the preview of a sample without previews; it costs nothing."""
NEVER_S = float("inf")
BACKGROUND_PATIENCE = 50.0
"""Patience of background work, in patiences of other work. Afterwards it is as urgent as new arrivals, so it is done in
the end."""
TOLERANCE_S = 1e-7
"""Lateness that counts as in time, because sums of seconds are not exact."""
Urgency = tuple[float, int]
"""(deadline in monotonic seconds, order of arrival). Unique among live samples; the smallest goes first."""


class Lane(NamedTuple):
    """Lane: samples of one lane can share a call."""

    kind: Kind
    alone: int | None = None
    """Unique number of a sample that shares no call; None for the others."""
    references: tuple[tuple[int, ...], ...] = ()
    """Shapes of the latents of reference pictures, which are the same in every sample of a call."""


@dataclass(eq=False, kw_only=True)
class Work:
    """A sample as the scheduler sees it: a prompt and given pictures unless they are cached, denoiser steps, then a
    decode in calls."""

    denoise: Lane
    """Lane of its denoiser steps."""
    decode: Lane
    """Lane of its decode's calls."""
    steps_left: int
    """Denoiser steps still to take."""
    urgency: Urgency
    decodes_left: int = 1
    """Calls of its decode still to make."""
    open_steps: tuple[int, ...] = ()
    """Step counts to choose from, ascending; empty once one is chosen. Until then `steps_left` is the first."""
    promised_s: float = NEVER_S
    """Promised end, monotonic; `NEVER_S` without a promise."""
    elapsed_s: float = 0.0
    """Part of its budget used up before its submission."""
    hand_over_s: float = 0.0
    """Part of its budget reserved for the hand-over of its picture, which takes longer under load."""
    encoding_s: float = 0.0
    """Part of its budget reserved for encoding its file."""
    target_s: float = NEVER_S
    """Latest end that an "auto" step count is chosen for, monotonic."""
    unpromised_s: float = 0.0
    """Deadline that replaces a missed promise, monotonic."""
    needs_text: bool = False
    """Whether its prompt must be encoded before its first step. That is a call of its own."""
    text: Kind = TEXT
    """Kind of that call."""
    needs_image: bool = False
    """Whether given pictures must be encoded before its first step, after its prompt. That is a call of its own."""
    image: Kind = NO_CALL
    """Kind of that call."""
    preview: Kind = NO_CALL
    """Kind of the preview call."""
    previews_left: int = 0
    """Previews still to show, one after each step but the last."""
    unseen_steps: int = 0
    """Number of its next steps that have no preview."""
    is_background: bool = False
    """Whether it only takes the time that other samples leave. Such work does not count as demand."""
    has_started: bool = False
    """Whether its first step was made."""
    predicted_s: float = 0.0
    """Predicted end when its first step was due, monotonic."""

    @property
    def lane(self) -> Lane:
        """Lane of its next step or decode."""
        return self.denoise if self.steps_left else self.decode

    @property
    def call_kind(self) -> Kind:
        """Kind of its next call."""
        if self.needs_text:
            return self.text
        return self.image if self.needs_image else self.lane.kind

    @property
    def is_prepared(self) -> bool:
        """Whether its next call is a step or a decode."""
        return not (self.needs_text or self.needs_image)

    @property
    def is_shown(self) -> bool:
        """Whether its next call is a step that a preview follows."""
        return self.previews_left > 0 and self.steps_left > 1 and not self.unseen_steps

    def share_no_call(self) -> None:
        """Make this sample share no call."""
        order = self.urgency[1]
        self.denoise, self.decode = self.denoise._replace(alone=order), self.decode._replace(alone=order)

    def set_deadlines(
        self, costs: CostModel, submitted_s: float, budget_s: float | None, patience: float, auto_stretch: float
    ) -> None:
        """Set its promise, its target and its place in the order, with `steps_left` at the most steps.

        Args:
            submitted_s: Time of its submission, monotonic.
            budget_s: Its latency budget; None sets no promise.
            patience, auto_stretch: See `EngineConfig`.
        """
        unloaded_s = self.seconds_left(costs)
        self.unpromised_s = submitted_s + patience * (BACKGROUND_PATIENCE if self.is_background else 1.0) * unloaded_s
        if budget_s is None:
            deadline_s = self.unpromised_s
            self.target_s = submitted_s + auto_stretch * unloaded_s
        else:
            deadline_s = submitted_s + budget_s - (self.elapsed_s + self.hand_over_s + self.encoding_s)
            self.target_s = self.promised_s = deadline_s
        self.urgency = (deadline_s, self.urgency[1])

    def settle(self, steps: int) -> None:
        """Fix the step count, before the first step."""
        assert not self.has_started
        self.steps_left = steps
        self.open_steps = ()

    def copy(self) -> Work:
        """Return a copy of its progress, without the fields of subclasses."""
        return Work(
            denoise=self.denoise,
            decode=self.decode,
            steps_left=self.steps_left,
            urgency=self.urgency,
            decodes_left=self.decodes_left,
            promised_s=self.promised_s,
            needs_text=self.needs_text,
            text=self.text,
            needs_image=self.needs_image,
            image=self.image,
            is_background=self.is_background,
            has_started=self.has_started,
            preview=self.preview,
            previews_left=self.previews_left,
            unseen_steps=self.unseen_steps,
        )

    def advance(self) -> bool:
        """Move past its next call. Return True if that was its last."""
        if self.needs_text:
            self.needs_text = False
            return False
        if self.needs_image:
            self.needs_image = False
            return False
        self.has_started = True
        if not self.steps_left:
            self.decodes_left -= 1
            return not self.decodes_left
        self.previews_left -= self.is_shown
        self.steps_left -= 1
        self.unseen_steps = max(0, self.unseen_steps - 1)
        return False

    def seconds_shared(self, costs: CostModel, steps: int, capacity: int) -> float:
        """Return its share of the machine's time with this many steps, in batches of the best size."""
        before_s = self._seconds_before(costs)
        shares_s = [
            costs.seconds(kind, size) / size
            for kind in (self.denoise.kind, self.decode.kind)
            if (size := costs.batch_size(kind, capacity))
        ]
        return before_s + steps * shares_s[0] + self.decodes_left * shares_s[1]

    def _seconds_before(self, costs: CostModel) -> float:
        """Return the seconds of the calls before its first step."""
        seconds = costs.seconds(self.text) if self.needs_text else 0.0
        return seconds + costs.seconds(self.image) if self.needs_image else seconds

    def seconds_left(self, costs: CostModel, size: int = 1) -> float:
        """Return the seconds until it is done, if each step is a call of `size` samples and nothing comes between."""
        seconds = self.steps_left * costs.seconds(self.denoise.kind, size)
        seconds += self.decodes_left * costs.seconds(self.decode.kind)
        seconds += self._seconds_before(costs)
        if self.previews_left:
            seconds += max(0, min(self.previews_left, self.steps_left - 1 - self.unseen_steps)) * costs.seconds(
                self.preview
            )
        return seconds
