"""Prompts are calls of their own: a slow text encoder delays other requests by one prompt at most."""

from __future__ import annotations

import pytest

from tdm_runtime.errors import DeadlineError
from tdm_runtime.scheduling.cost_model import CostModel, Kind
from tdm_runtime.scheduling.scheduler import StepScheduler
from tdm_runtime.scheduling.work import NEVER_S, Lane, Work
from tests.tdm_runtime.scheduling.test_scheduler import Request, run_call

SLOW_TEXT_S, STEP_S = 10.0, 1.0


def costs_with_slow_text() -> CostModel:
    """Return costs of two models: "slow" encodes a prompt in ten steps' time, "quick" in none."""
    costs = CostModel()
    for model, text_s in (("slow", SLOW_TEXT_S), ("quick", 0.1)):
        costs.observe(Kind("text", (), model), 1, text_s, 0.0)
        costs.limit(Kind("text", (), model), 1)
        for size in (1, 2, 4, 8):
            costs.observe(Kind("denoise", (4, 8, 8), model), size, STEP_S, 0.0)
            costs.observe(Kind("decode:full", (4, 8, 8), model), size, STEP_S, 0.0)
    return costs


def sample(model: str, order: int, now_s: float, budget_s: float | None = None) -> Request:
    promised_s = NEVER_S if budget_s is None else now_s + budget_s
    last_s = now_s + 500.0
    return Request(
        denoise=Lane(Kind("denoise", (4, 8, 8), model)),
        decode=Lane(Kind("decode:full", (4, 8, 8), model)),
        text=Kind("text", (), model),
        needs_text=True,
        steps_left=1,
        urgency=(last_s if budget_s is None else promised_s, order),
        promised_s=promised_s,
        asked_s=promised_s,
        unpromised_s=last_s,
    )


def test_a_quick_picture_passes_between_the_prompts_of_a_slow_model() -> None:
    """Eight prompts of ten seconds wait. A budget that has room for one of them, but not for two, is met."""
    scheduler: StepScheduler[Request] = StepScheduler(costs_with_slow_text(), capacity=8)
    slow = [sample("slow", order, 0.0) for order in range(8)]
    scheduler.admit(slow, 0.0)
    batch = scheduler.schedule(0.0)
    assert batch == slow[:1] and batch[0].call_kind.stage == "text"
    quick = sample("quick", 8, 0.5, budget_s=SLOW_TEXT_S + 3 * STEP_S)
    scheduler.admit([quick], 0.5)
    with pytest.raises(DeadlineError):  # the running prompt alone takes as long
        scheduler.admit([sample("quick", 9, 0.5, budget_s=SLOW_TEXT_S)], 0.5)
    scheduler.end_call()
    batch[0].advance()
    now_s = SLOW_TEXT_S
    while len(scheduler):
        _, now_s = run_call(scheduler, now_s)
    assert quick.done_s is not None and quick.done_s <= quick.asked_s
    assert scheduler.num_late == 0
    assert {item.done_s for item in slow} == {now_s}, "the slow pictures still share their step and their decode"


def test_the_forecast_counts_every_waiting_prompt() -> None:
    works: list[Work] = [sample("slow", order, 0.0) for order in range(4)]
    scheduler: StepScheduler[Request] = StepScheduler(costs_with_slow_text(), capacity=8)
    scheduler.admit(works, 0.0)  # type: ignore[arg-type]
    now_s = 0.0
    for work in scheduler.live():
        work.target_s = NEVER_S
    while len(scheduler):
        batch, now_s = run_call(scheduler, now_s)
        if batch and batch[0].steps_left == 0:
            assert batch[0].predicted_s == pytest.approx(4 * SLOW_TEXT_S + 2 * STEP_S)
    assert now_s == pytest.approx(4 * SLOW_TEXT_S + 2 * STEP_S)


def test_prompts_of_an_encoder_that_shares_calls_are_encoded_together() -> None:
    costs = costs_with_slow_text()
    kind = Kind("text", (), "slow")
    for size in (2, 4, 8):
        costs.observe(kind, size, SLOW_TEXT_S, 0.0)
    costs.limit(kind, 8)
    scheduler: StepScheduler[Request] = StepScheduler(costs, capacity=8)
    scheduler.admit([sample("slow", order, 0.0) for order in range(8)], 0.0)
    assert len(scheduler.schedule(0.0)) == 8
