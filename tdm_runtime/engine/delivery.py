"""Delivery options of a picture: its latency budget, previews and other things that do not change what it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tdm_runtime.errors import InvalidRequestError, shown
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.params import SamplingParams


@dataclass(frozen=True)
class Preview:
    """A look at a picture before it is finished."""

    params: SamplingParams
    """Parameters of the picture to come. A draft has the same parameters with one step."""
    pixels: Pixels
    """uint8 [H, W, 3]; of a clip its first frame, [1, H, W, 3]. A draft of a clip is a clip."""
    num_steps_taken: int
    """Number of steps taken so far."""
    is_draft: bool
    """True for a one-step picture from the same noise; False for the denoised estimate (x_0) of a step."""


@dataclass(frozen=True)
class Delivery:
    """Delivery options of a picture. They never change the pixels that a step count makes.

    Raises:
        InvalidRequestError: The latency budget is not a positive number.
        ValueError: Drafts or previews are requested without `on_preview`.
    """

    latency_budget_ms: float | None = None
    """Longest time from arrival to encoded file. The engine accepts it as a promise or refuses the request at once. The
    engine's own share, from submission to pixels, is the budget less `elapsed_ms`, `hand_over_ms` and `encoding_ms`.
    None: no promise."""
    min_inference_steps: int | None = None
    """Fewest steps under "auto": the engine takes as many as the budget allows, from this number up to
    `SamplingParams.num_inference_steps`. None: exactly `num_inference_steps`."""
    strict: bool = False
    """Whether the bits must be the same alone and in any batch. On some backends such a picture shares no call."""
    on_preview: Callable[[Preview], None] | None = None
    """Called with each draft and preview on the engine's thread; it must return at once."""
    num_previews: int = 0
    """Number of first steps to preview. The last step has no preview, nor has the first step beside a draft."""
    is_background: bool = False
    """Whether no client waits for it right now. For a long time all other requests go first."""
    draft: bool = False
    """Whether to make a one-step picture from the same noise too, and pass it to `on_preview` first."""
    elapsed_ms: float = 0.0
    """Part of the budget that other requests had used up before the submission."""
    hand_over_ms: float = 0.0
    """Expected time to hand the pixels to the caller. It is longer under load."""
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
            raise ValueError("drafts and previews are passed to on_preview, which is None; give a function")

    def open_step_counts(self, params: SamplingParams, step_counts: tuple[int, ...]) -> tuple[int, ...]:
        """Return the step counts that the engine may choose from, ascending; empty if there is no choice.

        Args:
            step_counts: Step counts of the checkpoint, ascending.

        Raises:
            InvalidRequestError: `min_inference_steps` is not one of them, or is more than `num_inference_steps`.
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
