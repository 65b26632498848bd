"""Results on their way out of the engine: futures, previews, and the pictures that are kept for repeats."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tdm_runtime.engine.delivery import Preview
from tdm_runtime.engine.result_cache import ResultCache
from tdm_runtime.engine.sample import Picture, Sample
from tdm_runtime.errors import GenerationError, TDMError
from tdm_runtime.model.loaded_model import LoadedModel

logger = logging.getLogger(__name__)


@dataclass
class EngineStats:
    """Counters since the start. A picture is counted before its future is resolved."""

    steps: int = 0
    """Denoiser calls."""
    sample_steps: int = 0
    """Samples in those calls, summed."""
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    out_of_memory: int = 0
    """Calls that did not fit into memory."""


class Replies:
    """Resolves the future of each accepted sample, exactly once. Any thread may call it."""

    def __init__(self, stats: EngineStats, result_cache_bytes: int, lock: threading.Condition) -> None:
        """
        Args:
            stats: Counters of finished, failed and cancelled samples, which this class advances.
            result_cache_bytes: see `EngineConfig`.
            lock: The engine's lock, re-entrant; guards stats, open samples and cache.
        """
        self._stats = stats
        self._results = ResultCache(result_cache_bytes)
        self._open: set[Sample] = set()
        """Samples that were accepted and not yet answered."""
        self._lock = lock

    @property
    def num_open(self) -> int:
        """Number of samples accepted and not yet answered."""
        return len(self._open)

    @property
    def cache_hits(self) -> int:
        """Number of pictures that came from the result cache."""
        return self._results.hits

    def is_used(self, model: LoadedModel) -> bool:
        """Whether a sample of this model is accepted and not yet answered."""
        with self._lock:
            return any(sample.model is model for sample in self._open)

    def expect(self, samples: Iterable[Sample]) -> None:
        """Accept samples; each must be answered later."""
        with self._lock:
            self._open.update(samples)

    def cached(self, sample: Sample) -> Picture | None:
        """Return the cached picture of a sample, or None; with an open step count, the picture of the most steps."""
        params, strict, digest = sample.params, sample.delivery.strict, sample.model.digest
        with self._lock:
            for steps in reversed(sample.open_steps or (params.num_inference_steps,)):
                if picture := self._results.get(digest, replace(params, num_inference_steps=steps), strict):
                    return picture
        return None

    def answer(self, sample: Sample, outcome: Picture | TDMError) -> None:
        """Resolve the future of a sample. A second answer to the same sample is ignored."""
        with self._lock:
            if sample not in self._open:
                return
            self._open.remove(sample)
            is_wanted = sample.future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
            if sample.draft_of is None:
                self._count(outcome if is_wanted else None)
            if isinstance(outcome, Picture):
                self._results.put(sample.model.digest, outcome)
        if sample.draft_of is not None:
            self._show_draft(sample.draft_of, outcome)
        if not is_wanted:
            return
        if isinstance(outcome, TDMError):
            sample.future.set_exception(outcome)
        else:
            sample.future.set_result(outcome)

    def _show_draft(self, sample: Sample, outcome: Picture | TDMError) -> None:
        """Show the draft of a sample, unless it failed, and then the previews that waited for it.

        A sample may share a second step with others while its draft waits to be decoded.
        """
        held, sample.held = sample.held or [], None
        if isinstance(outcome, Picture):
            self.show(sample, Preview(outcome.params, outcome.pixels, 1, is_draft=True))
        for preview in held:
            self.show(sample, preview)

    def show(self, sample: Sample, preview: Preview) -> None:
        """Hand a preview to the listener of a sample, unless the sample is answered already. A draft goes first."""
        if sample.delivery.on_preview is None or sample.future.done():
            return
        if sample.held is not None:
            sample.held.append(preview)
            return
        try:
            sample.delivery.on_preview(preview)
        except Exception:
            logger.exception("a listener to previews failed; its picture is still made")

    def fail_all(self, message: str) -> None:
        """Answer every open sample with a `GenerationError`."""
        with self._lock:
            samples = list(self._open)
        for sample in samples:
            self.answer(sample, GenerationError(message))

    def _count(self, outcome: Picture | TDMError | None) -> None:
        if outcome is None:
            self._stats.cancelled += 1
        elif isinstance(outcome, Picture):
            self._stats.finished += 1
        else:
            self._stats.failed += 1
