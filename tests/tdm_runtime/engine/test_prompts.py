"""A slow text encoder does not make another model's budgeted picture late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from tdm_runtime.engine.delivery import Delivery
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.engine.intake import call_kind
from tdm_runtime.engine.warm_up import warm_up
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tests.stock_checkpoints import CASES, stock_pipeline, write_recipe
from tests.tiny_models import TEXT_DIM


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny PixArt with a T5 whose hidden layers are so wide that a prompt takes many times as long as a step."""
    folder = tmp_path_factory.mktemp("slow") / "folder"
    pipeline = stock_pipeline(CASES["PixArt-alpha"])
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=TEXT_DIM, d_kv=4, d_ff=2**17, num_layers=2, num_heads=2)
    pipeline.register_modules(text_encoder=T5EncoderModel(config).eval())
    pipeline.save_pretrained(folder)
    write_recipe(CASES["PixArt-alpha"], folder)
    return load_model(folder, BackendConfig(threads=1), device="cpu")


def test_a_budgeted_picture_passes_between_the_prompts_of_a_slow_encoder(
    slow: LoadedModel, tiny_checkpoint: Path
) -> None:
    quick = load_model(tiny_checkpoint, BackendConfig(threads=1), device="cpu")
    engine = DiffusionEngine(quick)
    text = call_kind(slow, "text")
    engine.observe(text, 1, 5.0)  # as warm-up learns it; more than the machine takes, so that budgets are generous
    engine.limit(text, 1)
    waiting = [engine.submit(SamplingParams(f"fox {n}", n, 2, 32, 32), model=slow) for n in range(4)]
    engine.step()
    assert slow.text_encoder.cache_misses == 1, "a call encodes one prompt"
    width, height = quick.recipe.native_sizes[0]
    params = SamplingParams("a red heart", 7, quick.recipe.default_steps, width, height)
    hurried = engine.submit(params, Delivery(latency_budget_ms=60_000.0))
    while not hurried.done():
        engine.step()
    assert slow.text_encoder.cache_misses == 1 and engine.num_late == 0
    while engine.num_live:
        engine.step()
    assert slow.text_encoder.cache_misses == 4
    assert [future.result(0).timings.text_ms > 0 for future in waiting] == [True] * 4
    engine.close()


def test_warm_up_learns_what_a_prompt_costs(slow: LoadedModel) -> None:
    """The T5 takes longer than a step, so the smallest budget that works is more than the steps and the decode."""
    with DiffusionEngine(slow) as engine:
        warm_up(engine)
        shape = slow.latent_shape(SamplingParams("a fox", 0, 2, *slow.recipe.native_sizes[0]))
        assert engine.call_seconds(call_kind(slow, "text")) > engine.call_seconds(call_kind(slow, "denoise", shape))
        assert engine.costs.batch_size(call_kind(slow, "text"), 8) == 1


def test_pictures_of_one_prompt_encode_it_once(slow: LoadedModel) -> None:
    engine = DiffusionEngine(slow)
    engine.observe(call_kind(slow, "text"), 1, 0.5)
    engine.limit(call_kind(slow, "text"), 1)
    before = slow.text_encoder.cache_misses
    futures = engine.submit_all([SamplingParams("two foxes", seed, 2, 32, 32) for seed in range(4)])
    engine.step()
    engine.step()
    assert slow.text_encoder.cache_misses == before + 1
    assert engine.stats.steps == 1, "the second call is a step of all four"
    while engine.num_live:
        engine.step()
    assert all(future.done() for future in futures)
    engine.close()
