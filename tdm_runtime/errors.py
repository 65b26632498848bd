"""The errors of this library.

TDMError
├── InvalidRequestError (ValueError)   a request's value is out of range; names value, limit, remedy
├── CheckpointError                    a checkpoint folder that cannot be served
│   └── RecipeError                    its tdm_recipe.json cannot be honoured
├── BackendError                       a backend that cannot run on this machine
│   └── ArtifactError                  compiled artifacts that are missing, damaged or built for something else
├── GenerationError                    a request that was accepted and failed
│   └── NotFiniteError                 the model produced NaN or infinity
├── CancelledError                     the caller left; the request stopped at a step boundary
└── OverloadedError                    the queue is full; carries retry_after_s
    └── DeadlineError                  a latency budget that cannot be kept now
"""

from __future__ import annotations


class TDMError(Exception):
    """Base of this library's errors."""


class InvalidRequestError(TDMError, ValueError):
    """A value outside its limits."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        """The request field at fault."""
        self.code = code
        """A short machine-readable reason."""


class CheckpointError(TDMError):
    """A checkpoint folder that cannot be served."""


class RecipeError(CheckpointError):
    """A recipe that this library cannot honour."""


class BackendError(TDMError):
    """A backend that cannot run on this machine."""


class ArtifactError(BackendError):
    """Compiled artifacts that are missing, damaged or built for another checkpoint, version or machine."""


class GenerationError(TDMError):
    """A request that was accepted and failed."""


class NotFiniteError(GenerationError):
    """The model produced NaN or infinity for this request."""


class CancelledError(TDMError):
    """The request was cancelled by its caller."""


class OverloadedError(TDMError):
    """The queue is full."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds after which the queue is expected to have room."""


class DeadlineError(OverloadedError):
    """A latency budget that cannot be kept behind, or without harm to, what was promised before."""


def shown(value: object) -> str:
    """Return a value as text for a message, at most 40 characters long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print whole numbers of more than 4300 digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 40 else f"{text[:37]}..."
