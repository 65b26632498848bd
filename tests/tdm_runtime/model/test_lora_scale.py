"""The scale of a LoRA belongs to the request: pictures equal the stock pipeline's after `set_adapters`."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.lora.lora_file import read_lora
from tdm_runtime.checkpoint.recipe import Adapter, load_recipe
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.media.image_file import describe_parameters
from tdm_runtime.media.receipt import receipt_of
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_checkpoint
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.lora import LoraBase
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.lora_files import draw_weights, write_diffusers
from tests.stock_checkpoints import CASES, save_checkpoint, stock_pipeline
from tests.stock_pictures import HEIGHT, MIN_PSNR_DB, SEED, WIDTH, psnr_db, stock_picture

SERVED_AT = 0.7
SCALES = (0.5, 1.0, 1.3, 0.0, -0.4)
PROMPT = "a red fox"


@pytest.fixture(params=["SDXL-Lightning", "FLUX.1 schnell"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipeline(name: str) -> Any:
    return stock_pipeline(CASES[name])


@pytest.fixture
def lora_file(name: str, pipeline: Any, tmp_path: Path) -> Path:
    """A LoRA on the denoiser and on the text encoders."""
    return write_diffusers(pipeline, tmp_path / "lora", draw_weights(pipeline, CASES[name].family, 1))


@pytest.fixture
def lora(name: str, lora_file: Path, tmp_path: Path) -> LoadedModel:
    checkpoint = open_checkpoint(save_checkpoint(CASES[name], tmp_path / "folder"))
    on = LoraBase(checkpoint, load_checkpoint(checkpoint, BackendConfig("torch", "fp32", threads=1, device="cpu")))
    return on.attach(on.prepare("changed", [(read_lora(lora_file, checkpoint.family), SERVED_AT)]))


def test_requests_at_several_scales_share_calls_and_equal_the_stock_pipeline(
    name: str, pipeline: Any, lora_file: Path, lora: LoadedModel
) -> None:
    case = CASES[name]
    params = SamplingParams(PROMPT, SEED, case.steps[-1], WIDTH, HEIGHT)
    sizes: list[int] = []
    engine = DiffusionEngine(lora, observe_batch=lambda size, seconds: sizes.append(size))
    scales = (*SCALES, None)
    futures: list[Future[Any]] = [engine.submit(replace(params, lora_scale=scale)) for scale in scales]
    with engine:
        made = [future.result(60).pixels for future in futures]
    assert max(sizes) == len(scales)

    call = {"num_inference_steps": case.steps[-1], **case.call, **case.options}
    plain = stock_picture(pipeline, PROMPT, **call)
    pipeline.load_lora_weights(lora_file.parent, weight_name=lora_file.name, adapter_name="changed")
    for scale, picture in zip(scales, made, strict=True):
        pipeline.set_adapters(["changed"], [SERVED_AT if scale is None else scale])
        theirs = stock_picture(pipeline, PROMPT, **call)
        assert psnr_db(picture / 255.0, theirs) >= MIN_PSNR_DB, scale
        assert (psnr_db(picture / 255.0, plain) >= MIN_PSNR_DB) == (scale == 0.0)


def test_the_loop_the_receipt_and_the_metadata_have_the_scale_of_the_request(lora: LoadedModel) -> None:
    params = SamplingParams(PROMPT, SEED, lora.recipe.default_steps, WIDTH, HEIGHT)
    usual, same, other = (generate(lora, replace(params, lora_scale=scale)) for scale in (None, SERVED_AT, 1.3))
    assert np.array_equal(usual, same) and not np.array_equal(usual, other)
    strong = replace(params, lora_scale=1.3)
    assert receipt_of(lora, params, usual, True).lora_scale == SERVED_AT
    receipt = receipt_of(lora, strong, other, True)
    assert receipt.lora_scale == 1.3 and np.array_equal(generate(lora, receipt.to_params()), other)
    assert describe_parameters(strong, lora.recipe, lora.digest).endswith("Model: changed, LoRA scale: 1.3")
    assert describe_parameters(params, lora.recipe, lora.digest).endswith("LoRA scale: 0.7")


@pytest.mark.parametrize("scale", [4.01, -5.0, float("nan"), float("inf")])
def test_a_scale_beyond_the_limits_is_refused(scale: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"lora_scale is .*; it must be from -4 to 4"):
        SamplingParams(PROMPT, SEED, 1, WIDTH, HEIGHT, lora_scale=scale)


@pytest.mark.parametrize(
    ("adapters", "why"),
    [
        ((), "tdm-emoji has no LoRA"),
        ((Adapter("a.safetensors"),), "the LoRAs of tdm-emoji are merged into its weights"),
    ],
)
def test_a_model_without_a_lora_of_its_own_refuses_the_scale(
    tiny_checkpoint: Path, adapters: tuple[Adapter, ...], why: str
) -> None:
    recipe = replace(load_recipe(tiny_checkpoint), adapters=adapters)
    params = SamplingParams(PROMPT, SEED, 1, 16, 16, lora_scale=0.5)
    with pytest.raises(InvalidRequestError, match=rf"lora_scale is 0\.5; {why}: leave it out, or name a model"):
        params.check_against(recipe)


def test_a_scale_needs_no_call_of_its_own_in_bfloat16() -> None:
    """The factor of a row is rounded to the dtype of the output, not the output to the dtype of the factor."""
    from torch import nn

    from tdm_runtime.checkpoint.lora.lora_file import LoraLayer
    from tdm_runtime.checkpoint.lora.merged_lora import update_of
    from tdm_runtime.model.lora import added

    layer = nn.Linear(6, 5).to(torch.bfloat16)
    drawn = LoraLayer(torch.randn(2, 6), torch.randn(5, 2), 1.0, torch.rand(5), None)
    inputs = torch.randn(3, 4, 6, dtype=torch.bfloat16)
    update = update_of(drawn, layer).to(torch.bfloat16)
    assert added(layer, inputs, layer(inputs), update, torch.tensor([0.5, 1.0, 1.3])).dtype == torch.bfloat16
