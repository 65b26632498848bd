"""`DiffusionEngine`: many requests, one denoiser, one thread.

A step is schedule, run, advance. Samples with different step counts, at different steps, share the
call; finished ones leave and waiting ones join between any two steps.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from tdm_runtime.errors import CancelledError, GenerationError, NotFiniteError, OverloadedError, TDMError
from tdm_runtime.loaded_model import LoadedModel
from tdm_runtime.noise import initial_noise
from tdm_runtime.params import Delivery, SamplingParams
from tdm_runtime.sample import Picture, Sample
from tdm_runtime.sampler import apply_step, gather_rows
from tdm_runtime.step_scheduler import StepScheduler

logger = logging.getLogger(__name__)

Stepped = tuple[Tensor, Tensor]
"""A sample's next latents and its denoised estimate, [C, H, W] each."""


@dataclass(frozen=True)
class EngineConfig:
    """Bounds of the engine."""

    max_batch_size: int = 8
    """Samples in one denoiser call."""
    max_live: int = 128
    """Samples accepted and not yet answered; beyond, submissions are refused."""
    patience_s: float = 30.0
    """Deadline, after arrival, of samples that have none of their own: only an order, nothing is dropped at it."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_live"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


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
    step_s: float = 0.0
    """Moving average of one denoiser call."""


class DiffusionEngine:
    """Accepts requests from any thread, runs them on its own.

    A caller cancels through the future; it takes effect at the next step boundary.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig = EngineConfig(),
        observe_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self.model = model
        self.config = config
        self.stats = EngineStats()
        self._observe_batch = observe_batch
        """Told size and seconds of every denoiser call."""
        self._scheduler: StepScheduler[Sample] = StepScheduler(config.max_batch_size)
        self._arrivals: list[Sample] = []
        self._order = itertools.count()
        self._unanswered: set[Sample] = set()
        self._wake = threading.Condition()
        """Guards `_arrivals`, `_unanswered` and what is counted of them."""
        self._is_closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run_forever, name="diffusion-engine", daemon=True)
        self._decoding = ThreadPoolExecutor(1, "decode", initializer=torch.set_num_threads, initargs=(1,))

    # -- called from any thread ---------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def close(self) -> None:
        """Finish what was accepted, then stop. Submissions are refused from here on."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self._decoding.shutdown(wait=True)
        self._fail_unanswered("the engine was closed before it started; send the request to another replica")

    def __enter__(self) -> DiffusionEngine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's thread runs and takes requests."""
        return self._thread.is_alive() and self._failure is None and not self._is_closing

    @property
    def num_live(self) -> int:
        """Samples accepted and not yet answered."""
        return len(self._unanswered)

    def submit(self, params: SamplingParams, delivery: Delivery = Delivery()) -> Future[Picture]:
        """Accept one picture.

        Args:
            delivery: an earlier deadline is served first.

        Returns:
            A future: `cancel()` stops the work at the next step boundary.

        Raises:
            InvalidRequestError: the checkpoint does not serve these parameters.
            OverloadedError: `max_live` samples wait already.
        """
        return self.submit_all([params], delivery)[0]

    def submit_all(self, requests: Sequence[SamplingParams], delivery: Delivery = Delivery()) -> list[Future[Picture]]:
        """Accept several pictures or, where they do not all fit, none of them. As `submit`."""
        for params in requests:
            self.model.check(params)
        now_s = time.monotonic()
        budget_ms = delivery.latency_budget_ms
        due_s = now_s + (self.config.patience_s if budget_ms is None else 1e-3 * budget_ms)
        samples = [self._to_sample(params, now_s, due_s) for params in requests]
        with self._wake:
            if self._is_closing or self._failure is not None:
                raise OverloadedError("the engine is stopping; send the request to another replica", retry_after_s=1.0)
            if self.num_live + len(samples) > self.config.max_live:
                self.stats.refused += len(samples)
                raise OverloadedError(
                    f"{self.num_live} pictures are queued and at most {self.config.max_live} may be; "
                    f"{len(samples)} more do not fit, retry later or ask for fewer",
                    retry_after_s=self._seconds_to_drain(),
                )
            self._unanswered.update(samples)
            self._arrivals.extend(samples)
            self._wake.notify()
        return [sample.future for sample in samples]

    def _to_sample(self, params: SamplingParams, now_s: float, due_s: float) -> Sample:
        return Sample(
            params=params,
            table=self.model.recipe.step_tables[params.num_inference_steps],
            bucket=self.model.latent_shape(params),
            urgency=(due_s, next(self._order)),
            waiting_since_s=now_s,
        )

    def _seconds_to_drain(self) -> float:
        """Expected time until half of the queue is served."""
        steps_each = max(self.model.recipe.step_counts)
        calls = self.num_live * steps_each / self.config.max_batch_size
        return max(0.1, 0.5 * calls * self.stats.step_s)

    # -- the engine's thread ------------------------------------------------------------------

    def step(self) -> None:
        """Take one denoiser step: schedule, run, advance."""
        batch = self._schedule()
        if batch:
            started_s = time.monotonic()
            outcomes = self._run(batch)
            self._advance(batch, outcomes, started_s)

    def _run_forever(self) -> None:
        torch.set_num_threads(1)  # this thread's own setting: a backend that wants more says so in its calls
        try:
            while self._wait_for_work():
                self.step()
        except BaseException as error:
            logger.exception("the engine's thread died")
            with self._wake:
                self._failure = error
            self._fail_unanswered("the engine stopped unexpectedly; retry on another replica")

    def _wait_for_work(self) -> bool:
        """Block until there is a sample to run. False when closing and none is left."""
        with self._wake:
            while not self._arrivals and not len(self._scheduler):
                if self._is_closing:
                    return False
                self._wake.wait()
            return True

    def _schedule(self) -> list[Sample]:
        with self._wake:
            arrivals, self._arrivals = self._arrivals, []
        for sample in arrivals:
            self._scheduler.add(sample)
        for sample in self._scheduler.live():
            if sample.future.cancelled():
                self._leave(sample)
                self._answer(sample, CancelledError("cancelled by the caller"))
        return [sample for sample in self._scheduler.schedule() if self._prepare(sample)]

    def _prepare(self, sample: Sample) -> bool:
        """Encode the prompt and draw the noise, once. False where that failed: the sample has left."""
        if sample.prompt is not None:
            return True
        started_s = time.monotonic()
        sample.timings.queue_ms = 1e3 * (started_s - sample.waiting_since_s)
        try:
            sample.prompt = self.model.text_encoder.encode(sample.params.prompt)
            noise = initial_noise(sample.params.seed, sample.bucket)
            sample.latents = (sample.table.initial_scale * noise).to(self.model.denoiser.device)
            sample.denoised = torch.zeros_like(sample.latents)
        except Exception as error:
            self._leave(sample)
            self._answer(sample, _as_tdm_error(error))
            return False
        sample.waiting_since_s = time.monotonic()
        sample.timings.text_ms = 1e3 * (sample.waiting_since_s - started_s)
        return True

    def _run(self, batch: list[Sample]) -> list[Stepped | TDMError]:
        """Compute each sample's step. Where that fails each is tried once alone, so that only the culprit fails."""
        try:
            return self._compute(batch)
        except Exception as error:
            if len(batch) == 1:
                return [_as_tdm_error(error)]
            logger.warning("a batch of %d failed (%s); each is tried alone", len(batch), type(error).__name__)
            return [self._run([sample])[0] for sample in batch]

    @torch.inference_mode()
    def _compute(self, batch: list[Sample]) -> list[Stepped | TDMError]:
        """One denoiser call and one fused solver update."""
        device = self.model.denoiser.device
        rows = gather_rows([(s.table, s.step_index) for s in batch], device)
        step_counts = torch.tensor([s.params.num_inference_steps for s in batch], device=device)
        prompt_embeds = torch.stack([s.prompt.prompt_embeds for s in batch if s.prompt is not None])
        latents = _stacked([s.latents for s in batch])
        model_output = self.model.denoiser(latents, rows[:, 0], step_counts, prompt_embeds)
        latents, denoised = apply_step(rows, latents, model_output, _stacked([s.denoised for s in batch]))
        is_finite = torch.isfinite(latents).flatten(1).all(1).tolist()
        return [
            (latents[n], denoised[n])
            if is_finite[n]
            else NotFiniteError("the model produced NaN or infinity; no picture was made")
            for n in range(len(batch))
        ]

    def _advance(self, batch: list[Sample], outcomes: list[Stepped | TDMError], started_s: float) -> None:
        """Move each sample on; the finished and the failed leave."""
        seconds = time.monotonic() - started_s
        finished = []
        for sample, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, TDMError):
                self._leave(sample)
                self._answer(sample, outcome)
                continue
            sample.latents, sample.denoised = outcome
            sample.step_index += 1
            sample.timings.queue_ms += 1e3 * (started_s - sample.waiting_since_s)
            sample.timings.steps_ms.append(1e3 * seconds)
            sample.waiting_since_s = started_s + seconds
            if sample.is_finished:
                self._leave(sample)
                finished.append(sample)
        self._count_step(len(batch), seconds)
        for decoder in dict.fromkeys(sample.params.decoder for sample in finished):
            self._decoding.submit(self._decode, [s for s in finished if s.params.decoder == decoder])

    def _leave(self, sample: Sample) -> None:
        self._scheduler.remove(sample)

    def _count_step(self, size: int, seconds: float) -> None:
        self.stats.steps += 1
        self.stats.sample_steps += size
        self.stats.step_s = seconds if self.stats.step_s == 0 else 0.9 * self.stats.step_s + 0.1 * seconds
        self._observe_batch(size, seconds)

    # -- the decoder's thread -----------------------------------------------------------------

    def _decode(self, samples: list[Sample]) -> None:
        """Turn latents of one shape into pictures, by one decoder, and answer.

        Where that fails each sample is tried once alone.
        """
        try:
            pixels = self.model.decoders[samples[0].params.decoder].decode(_stacked([s.latents for s in samples]))
        except Exception as error:
            if len(samples) == 1:
                self._answer(samples[0], _as_tdm_error(error))
                return
            logger.warning("decoding %d failed (%s); each is tried alone", len(samples), type(error).__name__)
            for sample in samples:
                self._decode([sample])
            return
        ended_s = time.monotonic()
        for sample, picture in zip(samples, pixels, strict=True):
            assert sample.prompt is not None
            sample.timings.decode_ms = 1e3 * (ended_s - sample.waiting_since_s)
            self._answer(
                sample,
                Picture(sample.params, picture, sample.timings, sample.prompt),
            )

    # -- any of the engine's threads ----------------------------------------------------------

    def _answer(self, sample: Sample, outcome: Picture | TDMError) -> None:
        """Resolve a sample's future, exactly once: whoever comes second is ignored."""
        with self._wake:
            if sample not in self._unanswered:
                return
            self._unanswered.remove(sample)
            is_wanted = sample.future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
            if not is_wanted:
                self.stats.cancelled += 1
            elif isinstance(outcome, Picture):
                self.stats.finished += 1
            else:
                self.stats.failed += 1
        if not is_wanted:
            return
        if isinstance(outcome, Picture):
            sample.future.set_result(outcome)
        else:
            sample.future.set_exception(outcome)

    def _fail_unanswered(self, message: str) -> None:
        with self._wake:
            samples = list(self._unanswered)
        for sample in samples:
            self._answer(sample, GenerationError(message))


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([tensor for tensor in tensors if tensor is not None])


def _as_tdm_error(error: Exception) -> TDMError:
    if isinstance(error, TDMError):
        return error
    logger.error("generation failed", exc_info=error)
    return GenerationError(f"generation failed ({type(error).__name__}); the request was not at fault, retry it")
