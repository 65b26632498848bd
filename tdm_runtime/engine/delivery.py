"""How a picture is to be served, beside what it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tdm_runtime.errors import InvalidRequestError, shown
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.params import SamplingParams


@dataclass(frozen=True)
class Preview:
    """What is to be seen of a picture before it is done."""

    params: SamplingParams
    """Of the picture to come; of a draft, its own: the same with one step."""
    pixels: Pixels
    """uint8 [H, W, 3]."""
    num_steps_taken: int
    is_draft: bool
    """A picture of one step from the same noise; otherwise, what a step of the picture itself expects (x_0)."""


@dataclass(frozen=True)
class Delivery:
    """How soon a picture is wanted and what may be given up for it; what a step count makes is not changed by it.

    Raises:
        InvalidRequestError: naming the value, the limit and the remedy.
    """

    latency_budget_ms: float | None = None
    """From arrival to file, a promise: a request that cannot keep it is refused at once. None promises nothing. What
    `elapsed_ms`, `hand_over_ms` and `encoding_ms` leave of it is the engine's, from submission to pixels."""
    min_inference_steps: int | None = None
    """The engine takes as many steps as the budget allows, from these to `SamplingParams.num_inference_steps`, and
    says how many. None takes exactly `num_inference_steps`."""
    strict: bool = False
    """The same bits alone and in any company, on one backend; on some, at the price of sharing no calls."""
    on_preview: Callable[[Preview], None] | None = None
    """Told of drafts and previews, on the engine's thread: it must return at once."""
    num_previews: int = 0
    """So many of the first steps are shown; not the last, which is the picture, nor the first beside a draft."""
    is_background: bool = False
    """Nobody waits for it at this moment: whatever others ask for comes first, for a long while."""
    draft: bool = False
    """Also make the picture of one step from the same noise and tell `on_preview` of it first."""
    elapsed_ms: float = 0.0
    """Time of the budget that had passed before the submission, because of other requests."""
    hand_over_ms: float = 0.0
    """Expected time from the pixels until the caller has them, which takes longer under load."""
    encoding_ms: float = 0.0
    """Expected time of encoding the file."""

    def __post_init__(self) -> None:
        budget_ms = self.latency_budget_ms
        is_number = isinstance(budget_ms, int | float) and not isinstance(budget_ms, bool)
        if budget_ms is not None and not (is_number and 0 < budget_ms < float("inf")):
            raise InvalidRequestError(
                f"latency_budget_ms is {shown(budget_ms)}; it must be a positive number of milliseconds",
                param="latency_budget_ms",
            )
        if (self.draft or self.num_previews) and self.on_preview is None:
            raise ValueError("drafts and previews are told to on_preview, which is None; give a function")

    def open_step_counts(self, params: SamplingParams, step_counts: tuple[int, ...]) -> tuple[int, ...]:
        """The step counts that the engine may choose from, ascending; empty where there is no choice.

        Args:
            step_counts: the checkpoint's, ascending.

        Raises:
            InvalidRequestError: `min_inference_steps` is none of them, or more than `num_inference_steps`.
        """
        fewest, most = self.min_inference_steps, params.num_inference_steps
        if fewest is None:
            return ()
        if type(fewest) is not int or fewest not in step_counts or fewest > most:
            counts = ", ".join(str(count) for count in step_counts if count <= most)
            raise InvalidRequestError(
                f"min_inference_steps is {shown(fewest)}; it must be one of {counts}", param="min_inference_steps"
            )
        return tuple(count for count in step_counts if fewest <= count <= most)
