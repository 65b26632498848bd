"""`DiffusionEngine`: serves many requests on one thread.

A step is schedule, run, advance. Samples with different step counts, at different steps, share a call. Between any two
calls finished samples leave and waiting ones join.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from tdm_runtime.engine.calls import ModelCalls, Stepped
from tdm_runtime.engine.delivery import Delivery, Preview
from tdm_runtime.engine.intake import Intake
from tdm_runtime.engine.replies import EngineStats, Replies
from tdm_runtime.engine.sample import Picture, Sample
from tdm_runtime.errors import CancelledError, OverloadedError, TDMError
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.scheduling.cost_model import CostModel, Kind
from tdm_runtime.scheduling.scheduler import StepScheduler

logger = logging.getLogger(__name__)

Outcome = Stepped | Pixels | None | TDMError
"""Of a sample's call: a step, the pixels, None for a decode that goes on, or why it failed."""


@dataclass(frozen=True)
class EngineConfig:
    """Limits and policies of the engine."""

    max_batch_size: int = 32
    """Most samples in one call. Below it, the measured costs decide."""
    max_live: int = 128
    """Most samples that may be accepted and not yet answered. Further submissions are refused."""
    patience: float = 20.0
    """Deadline of a sample without a budget, in its unloaded times after its arrival. It only orders calls."""
    auto_stretch: float = 3.0
    """Target of an "auto" step count without a budget, in unloaded times of the most steps."""
    result_cache_bytes: int = 0
    """Bytes of pixels kept for exact repeats; 0 keeps none."""
    joining: bool = True
    """Whether samples may join between steps. False makes them wait until all that started together are done, for
    benchmarks."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_live", "patience", "auto_stretch"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.result_cache_bytes < 0:
            raise ValueError(f"result_cache_bytes is {self.result_cache_bytes}; give a number of bytes, or 0 for none")


class DiffusionEngine:
    """Accepts requests from any thread and runs them on a thread of its own.

    Cancelling a future takes effect at the next call.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig = EngineConfig(),
        observe_batch: Callable[[int, float], None] = lambda size, seconds: None,
        costs: CostModel | None = None,
    ) -> None:
        """
        Args:
            model: Model of submissions that name none.
            observe_batch: Called with the size and the seconds of every denoiser call.
            costs: Costs of calls that are known already; None starts without any.
        """
        self.model = model
        self.config = config
        self.stats = EngineStats()
        self.costs = CostModel() if costs is None else costs
        self._observe_batch = observe_batch
        self._scheduler: StepScheduler[Sample] = StepScheduler(self.costs, config.max_batch_size, config.joining)
        self._calls = ModelCalls(self._ask_for_fewer_than)
        self._intake = Intake(self.costs, config.patience, config.auto_stretch)
        self._tasks: list[tuple[Callable[[], None], Future[None]]] = []
        self._wake = threading.Condition()
        """Lock of all state above that changes, and of the samples' places in the queue."""
        self._replies = Replies(self.stats, config.result_cache_bytes, self._wake)
        self._is_closing = False
        self._failure: BaseException | None = None
        self._free_s = time.monotonic()
        """Earliest time the next call could begin: the end of the last call, or the arrival of work; monotonic."""
        self._thread = threading.Thread(target=self._run_forever, name="diffusion-engine", daemon=True)

    # -- called from any thread ---------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def close(self) -> None:
        """Finish the accepted samples, then stop. Submissions are refused from now on."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self._replies.fail_all("the engine was closed before it started; send the request to another replica")

    def __enter__(self) -> DiffusionEngine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's thread runs and takes requests."""
        return self._thread.is_alive() and self._failure is None and not self._is_closing

    def is_used(self, model: LoadedModel) -> bool:
        """Whether a sample of this model is accepted and not yet answered."""
        return self._replies.is_used(model)

    @property
    def num_live(self) -> int:
        """Number of samples accepted and not yet answered."""
        return self._replies.num_open

    @property
    def result_cache_hits(self) -> int:
        """Number of pictures that came from the result cache."""
        return self._replies.cache_hits

    @property
    def num_late(self) -> int:
        """Number of promises that were missed."""
        return self._scheduler.num_late

    def call_seconds(self, kind: Kind) -> float:
        """Return the seconds that a promise allows for a call of one sample; 0 for a kind that was never measured."""
        with self._wake:
            self.costs.pass_time(time.monotonic(), len(self._scheduler) + 1)
            return self.costs.seconds(kind)

    def observe(self, kind: Kind, size: int, seconds: float) -> None:
        """Learn the seconds of a call that the engine does not make itself, such as encoding a file."""
        now_s = time.monotonic()
        with self._wake:
            self.costs.observe(kind, size, seconds, now_s, self._scheduler.is_calm(now_s - seconds))

    def limit(self, kind: Kind, size: int) -> None:
        """Learn that more than `size` samples in a call do not help."""
        with self._wake:
            self.costs.limit(kind, size)

    def run_on_thread(self, task: Callable[[], None]) -> None:
        """Run a task between two calls, on the thread that runs the model, and wait for it.

        Raises:
            RuntimeError: The engine was not started, is stopping, or its thread died before the task's turn.
        """
        done: Future[None] = Future()
        with self._wake:
            if not self.is_healthy:
                raise RuntimeError("the engine's thread is not running; start it first")
            self._tasks.append((task, done))
            self._wake.notify()
        done.result()

    def submit(
        self, params: SamplingParams, delivery: Delivery = Delivery(), model: LoadedModel | None = None
    ) -> Future[Picture]:
        """Accept one picture.

        Args:
            model: Model that makes the picture; None is the engine's own. Any number of models share the engine.

        Returns:
            Future of the picture. `cancel()` stops the work at the next call.

        Raises:
            InvalidRequestError: The model does not serve these parameters, or the budget is too small without load.
            DeadlineError: The budget cannot be kept now.
            OverloadedError: `max_live` samples wait already, or the engine is stopping.
        """
        return self.submit_all([params], delivery, model)[0]

    def submit_all(
        self, requests: Sequence[SamplingParams], delivery: Delivery = Delivery(), model: LoadedModel | None = None
    ) -> list[Future[Picture]]:
        """Accept several pictures, or none if one of them does not fit. Arguments and errors are those of `submit`."""
        now_s = time.monotonic()
        with self._wake:
            self.costs.pass_time(now_s, len(self._scheduler) + len(requests))
        wanted = [self._intake.sample(model or self.model, params, delivery, now_s) for params in requests]
        made: list[tuple[Sample, Picture]] = []
        with self._wake:
            if self._is_closing or self._failure is not None:
                raise OverloadedError("the engine is stopping; send the request to another replica", retry_after_s=1.0)
            waiting = []
            for sample in wanted:
                if picture := self._replies.cached(sample):
                    made.append((sample, picture))
                else:
                    waiting += [*self._intake.drafts(sample), sample]
            self._admit(waiting, now_s)
            self._replies.expect([*waiting, *(sample for sample, _ in made)])
            self._wake.notify()
        for sample, picture in made:
            self._replies.answer(sample, picture)
        return [sample.future for sample in wanted]

    def _admit(self, samples: list[Sample], now_s: float) -> None:
        try:
            if self.num_live + len(samples) > self.config.max_live:
                raise OverloadedError(
                    f"{self.num_live} pictures are queued and at most {self.config.max_live} may be queued; "
                    f"{len(samples)} more do not fit, retry later or request fewer",
                    retry_after_s=max(0.1, 0.5 * self._scheduler.backlog_s()),
                )
            self._scheduler.admit(samples, now_s)
        except TDMError:
            self.stats.refused += sum(sample.draft_of is None for sample in samples)
            raise

    # -- the engine's thread ------------------------------------------------------------------

    def step(self) -> None:
        """Make one call: schedule, run, advance."""
        began_s = time.monotonic()
        batch = self._schedule(began_s)
        if batch and not batch[0].is_prepared:
            self._encode(batch, began_s)
            return
        batch, prepared_s = self._prepare(batch)
        if batch:
            outcomes = self._run(batch)
            self._advance(batch, outcomes, began_s, prepared_s)

    def _run_forever(self) -> None:
        torch.set_num_threads(1)  # applies to this thread; a backend that needs more threads sets them in its calls
        try:
            while self._wait_for_work():
                self.step()
        except BaseException as error:
            logger.exception("the engine's thread died")
            with self._wake:
                self._failure = error
            for _, done in self._tasks:
                done.set_exception(RuntimeError("the engine's thread died"))
            self._replies.fail_all("the engine stopped unexpectedly; retry on another replica")

    def _wait_for_work(self) -> bool:
        """Block until there is a sample to run. Return False when the engine is closing and none is left."""
        while True:
            with self._wake:
                tasks, self._tasks = self._tasks, []
                wait_s = self._scheduler.wait_s(time.monotonic()) if len(self._scheduler) else None
                if not tasks and wait_s == 0.0:
                    return True
                if not tasks and self._is_closing and wait_s is None:
                    return False
                if not tasks:
                    self._wake.wait(wait_s)
            for task, done in tasks:
                try:
                    task()
                    done.set_result(None)
                except BaseException as error:
                    done.set_exception(error)
            self._free_s = time.monotonic()

    def _schedule(self, now_s: float) -> list[Sample]:
        with self._wake:
            abandoned = [sample for sample in self._scheduler.live() if sample.is_abandoned]
        self._fail({sample: CancelledError("cancelled by the caller") for sample in abandoned})
        with self._wake:
            return self._scheduler.schedule(now_s)

    def _fail(self, failed: Mapping[Sample, TDMError]) -> None:
        """Remove samples and answer each with its error."""
        if not failed:
            return
        with self._wake:
            for sample in failed:
                self._scheduler.remove(sample)
        for sample, error in failed.items():
            self._replies.answer(sample, error)

    def _encode(self, batch: list[Sample], began_s: float) -> None:
        """Encode prompts or given pictures in one call. Live samples with the same ones need it no more."""
        is_text, kind = batch[0].needs_text, batch[0].call_kind
        outcomes = self._calls.encode(batch) if is_text else self._calls.encode_pictures(batch)
        free_s = self._free_s
        self._free_s = ended_s = time.monotonic()
        failed = {s: error for s, error in zip(batch, outcomes, strict=True) if error is not None}
        encoded = {sample.prompt_key if is_text else sample.picture_key for sample in batch}
        with self._wake:
            is_calm = self._scheduler.is_calm(began_s)
            self._scheduler.end_call()
            self.costs.observe(kind, len(encoded), ended_s - free_s, ended_s, is_calm)
            for sample in self._scheduler.live():
                if sample in batch:
                    sample.timings.wait(1e3 * (began_s - sample.ready_s), before_steps=True)
                    if is_text:
                        sample.timings.text_ms = 1e3 * (ended_s - began_s)
                    else:
                        sample.timings.image_ms = 1e3 * (ended_s - began_s)
                    sample.ready_s = ended_s
                    sample.advance()
                elif is_text and sample.prompt_key in encoded:
                    sample.needs_text = False
                elif not is_text and sample.picture_key in encoded:
                    sample.needs_image = False
        self._fail(failed)

    def _prepare(self, batch: list[Sample]) -> tuple[list[Sample], float]:
        """Draw the noise of samples that take their first step, and look up the prompts of those that were cached.

        Returns:
            Samples that are ready for the call, and the seconds spent here.
        """
        newcomers = [sample for sample in batch if sample.latents is None]
        if not newcomers:
            return batch, 0.0
        started_s = time.monotonic()
        outcomes = self._calls.prepare(newcomers)
        ended_s = time.monotonic()
        for sample in newcomers:
            sample.timings.wait(1e3 * (started_s - sample.ready_s), before_steps=True)
            sample.timings.text_ms += 1e3 * (ended_s - started_s)
            sample.ready_s = ended_s
        failed = {s: error for s, error in zip(newcomers, outcomes, strict=True) if error is not None}
        self._fail(failed)
        return [sample for sample in batch if sample not in failed], ended_s - started_s

    def _run(self, batch: list[Sample]) -> Sequence[Outcome]:
        """Run the next call of samples of one lane: a denoiser step, or a decode or its next part."""
        return self._calls.denoise(batch) if batch[0].steps_left else self._calls.decode(batch)

    def _advance(
        self,
        batch: list[Sample],
        outcomes: Sequence[Outcome],
        began_s: float,
        prepared_s: float,
    ) -> None:
        """Advance each sample. Finished and failed samples leave.

        The cost of the call counts from the end of the previous one, which on a busy machine is more than its own time.

        Args:
            began_s: When scheduling of the call began, monotonic.
            prepared_s: Seconds since then spent on noise, which are not part of the cost.
        """
        started_s, free_s = began_s + prepared_s, self._free_s + prepared_s
        self._free_s = ended_s = time.monotonic()
        kind, is_step = batch[0].lane.kind, batch[0].steps_left > 0
        for sample, outcome in zip(batch, outcomes, strict=True):
            self._note(sample, outcome, started_s, ended_s)
        with self._wake:
            self._scheduler.end_call()
            self.costs.observe(kind, len(batch), ended_s - free_s, ended_s, self._scheduler.is_calm(began_s))
            shown = [sample for sample in batch if sample.is_shown]
            left = [s for s, out in zip(batch, outcomes, strict=True) if s.advance() or isinstance(out, TDMError)]
            for sample in left:
                self._scheduler.remove(sample)
                self._scheduler.answered(sample, ended_s)
            if is_step:
                self.stats.steps += 1
                self.stats.sample_steps += len(batch)
        if is_step:
            self._observe_batch(len(batch), ended_s - started_s)
        for sample, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, TDMError):
                self._replies.answer(sample, outcome)
            elif isinstance(outcome, np.ndarray):
                self._replies.answer(sample, self._to_picture(sample, outcome))
            elif sample in shown:
                self._show(sample)

    def _note(self, sample: Sample, outcome: Outcome, started_s: float, ended_s: float) -> None:
        """Store a sample's new latents and the timings of its call."""
        began_s = max(started_s, sample.ready_s)
        sample.timings.wait(1e3 * (began_s - sample.ready_s))
        if sample.steps_left:
            sample.timings.steps_ms.append(1e3 * (ended_s - began_s))
        else:
            sample.timings.decode_ms += 1e3 * (ended_s - began_s)
        sample.ready_s = ended_s
        if isinstance(outcome, tuple):
            sample.denoised_before = sample.denoised
            sample.latents, sample.denoised = outcome

    def _show(self, sample: Sample) -> None:
        """Decode and show the denoised estimate of the step that was just taken."""
        started_s = time.monotonic()
        pixels = self._calls.preview(sample)
        ended_s = time.monotonic()
        with self._wake:
            self.costs.observe(sample.preview, 1, ended_s - started_s, ended_s, self._scheduler.is_calm(started_s))
        self._free_s += ended_s - started_s
        if not isinstance(pixels, TDMError):
            self._replies.show(sample, Preview(sample.params, sample.shown(pixels), sample.step_index, is_draft=False))

    def _to_picture(self, sample: Sample, pixels: Pixels) -> Picture:
        assert sample.prompt is not None
        predicted_ms = 1e3 * (sample.predicted_s - sample.submitted_s)
        is_strict = sample.delivery.strict or sample.model.is_batch_invariant
        return Picture(sample.params, sample.shown(pixels), sample.timings, sample.prompt, predicted_ms, is_strict)

    def _ask_for_fewer_than(self, size: int) -> None:
        """Halve the batch limit after a call of `size` samples did not fit into memory."""
        self.stats.out_of_memory += 1
        if kind := self._scheduler.running_kind:
            self.limit(kind, size // 2)
