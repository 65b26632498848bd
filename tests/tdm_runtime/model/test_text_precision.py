"""Text encoders of stock pipelines in less than float32, on a device of their own, and shared between models."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.lora.lora_file import read_lora
from tdm_runtime.checkpoint.stock.text_precision import TEXT_PRECISIONS, TextConfig, TextPool
from tdm_runtime.errors import BackendError, CheckpointError
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_checkpoint
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.lora import LoraBase
from tdm_runtime.model.text_encoder import PipelineEncoder, PromptKey
from tests.lora_files import draw_weights, write_diffusers
from tests.stock_checkpoints import CASES, save_checkpoint, stock_pipeline
from tests.stock_pictures import MIN_PSNR_DB, picture, psnr_db, stock_picture

PROMPT = "A red Fox"
PRECISE = {"fp32": MIN_PSNR_DB, "bf16": MIN_PSNR_DB, "int8": 40.0, "fp8": 34.0}
"""Least similarity of a tiny model's picture with that of the stock pipeline in float32."""


def load(folder: Path, pool: TextPool | None = None, text: TextConfig = TextConfig()) -> LoadedModel:
    return load_checkpoint(open_checkpoint(folder, texts=pool), BackendConfig(device="cpu", text=text))


def pipeline_of(model: LoadedModel) -> Any:
    encoder = model.text_encoder.encoder
    assert isinstance(encoder, PipelineEncoder)
    return encoder


def embeds(model: LoadedModel, prompt: str = PROMPT) -> torch.Tensor:
    key = model.text_encoder.key(prompt, model.recipe.lora_scale or 1.0)
    return model.text_encoder.encode_all([key])[0].conditioning.prompt_embeds


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(CASES["FLUX.1 schnell"], tmp_path_factory.mktemp("flux") / "folder")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(CASES["SDXL-Lightning"], tmp_path_factory.mktemp("sdxl") / "folder")


@pytest.mark.parametrize("name", ["SD 3.5 Turbo", "FLUX.1 schnell", "FLUX.2 klein", "SANA-Sprint"])
def test_pictures_stay_close_to_those_of_the_stock_pipeline_at_every_precision(name: str, tmp_path: Path) -> None:
    """CLIP, T5, Qwen3 and Gemma2 each run at every precision."""
    case, found = CASES[name], {}
    folder, steps = save_checkpoint(case, tmp_path / "folder"), case.steps[-1]
    options = dict(case.options) | ({"intermediate_timesteps": None} if case.family == "sana" else {})
    theirs = stock_picture(stock_pipeline(case), PROMPT, num_inference_steps=steps, **options)
    for precision in TEXT_PRECISIONS:
        ours = picture(folder, PROMPT, steps, tmp_path, "--text-encoder-precision", precision)
        found[precision] = psnr_db(ours, theirs)
    assert all(found[precision] >= PRECISE[precision] for precision in found), found


def test_each_precision_holds_fewer_bytes_and_embeds_in_float32(flux: Path) -> None:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    plain = embeds(load(flux))
    for precision, dtype in dtypes.items():
        model = load(flux, text=TextConfig(precision))  # type: ignore[arg-type]
        t5 = pipeline_of(model).module("text_encoder_2")
        assert t5.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == dtype
        assert embeds(model).dtype == torch.float32
        assert torch.equal(embeds(model), plain) == (precision == "fp32")
    t5 = pipeline_of(load(flux, text=TextConfig("int8"))).module("text_encoder_2")
    assert t5.encoder.block[0].layer[0].SelfAttention.q.weight().dtype == torch.qint8


def test_int8_is_refused_off_the_cpu_and_a_missing_device_too() -> None:
    with pytest.raises(BackendError, match="int8 run on the CPU only, not on meta; choose bf16 or fp8"):
        TextConfig("int8").on(torch.device("meta"))
    with pytest.raises(BackendError, match="is cuda:99 and this machine has"):
        TextConfig("bf16", "cuda:99").on(torch.device("cpu"))
    assert TextConfig("bf16", "cpu").on(torch.device("meta")) == torch.device("cpu")


def test_models_with_the_same_files_share_encoders_and_prompts(
    flux: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, pool = Path(shutil.copytree(flux, tmp_path / "other")), TextPool()
    with caplog.at_level(logging.INFO):
        one, two = load(flux, pool), load(other, pool)
    assert one.text_encoder is two.text_encoder
    assert load(flux).text_encoder is not one.text_encoder, "without a common pool nothing is shared"
    assert f"{other} shares its prompts with {flux}" in caplog.text
    embeds(one)
    assert not two.text_encoder.expect(PromptKey(PROMPT))
    lower = load(flux, pool, TextConfig("bf16"))
    assert pipeline_of(lower).module("text_encoder_2") is not pipeline_of(one).module("text_encoder_2")


def test_families_share_the_encoders_that_both_have(
    flux: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The T5 of FLUX is the first encoder of PixArt and its second of FLUX; tokens and prompts differ."""
    pixart, pool = save_checkpoint(CASES["PixArt-alpha"], tmp_path / "pixart"), TextPool()
    with caplog.at_level(logging.INFO):
        one, two = load(flux, pool), load(pixart, pool)
    assert pipeline_of(one).module("text_encoder_2") is pipeline_of(two).module("text_encoder")
    assert one.text_encoder is not two.text_encoder
    assert f"{pixart} shares its text_encoder with {flux}, which saves" in caplog.text
    assert torch.equal(embeds(two), embeds(load(pixart)))
    assert torch.equal(embeds(one), embeds(load(flux)))


@pytest.mark.parametrize("file", ["text_encoder/model.safetensors", "tokenizer/tokenizer_config.json"])
def test_a_changed_file_ends_the_sharing_of_prompts(file: str, tmp_path: Path, flux: Path) -> None:
    other, pool = Path(shutil.copytree(flux, tmp_path / "other")), TextPool()
    (other / "tdm_recipe.json").unlink()  # which has the hashes
    changed = other / file
    content = bytearray(changed.read_bytes())
    if file.endswith(".json"):
        content += b"\n"
    else:
        content[-1] ^= 1
    changed.write_bytes(bytes(content))
    assert load(flux, pool).text_encoder is not load(other, pool).text_encoder


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_lora_on_a_shared_encoder_does_not_change_the_other_model(precision: Any, sdxl: Path, tmp_path: Path) -> None:
    pool, text = TextPool(), TextConfig(precision)
    other = Path(shutil.copytree(sdxl, tmp_path / "other"))
    checkpoint = open_checkpoint(sdxl, texts=pool)
    base = load_checkpoint(checkpoint, BackendConfig(device="cpu", text=text))
    two = load(other, pool, text)
    assert two.text_encoder is base.text_encoder
    pipeline = stock_pipeline(CASES["SDXL-Lightning"])
    lora = read_lora(write_diffusers(pipeline, tmp_path / "lora", draw_weights(pipeline, "sdxl", 1)), base.family)
    bank = LoraBase(checkpoint, base)
    half, full = (bank.attach(bank.prepare(name, [(lora, scale)])) for name, scale in (("half", 0.5), ("full", 1.0)))
    changed = {name: embeds(model) for name, model in (("half", half), ("full", full))}
    alone = embeds(load(sdxl, text=text))
    assert torch.equal(embeds(two), alone) and torch.equal(embeds(base), alone)
    apart = [float((changed[name] - alone).norm()) for name in ("half", "full")]
    assert 0 < apart[0] < apart[1], "each scale has prompts of its own"


def test_a_lora_cannot_change_a_text_encoder_at_int8(sdxl: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sdxl)
    base = load_checkpoint(checkpoint, BackendConfig(device="cpu", text=TextConfig("int8")))
    pipeline = stock_pipeline(CASES["SDXL-Lightning"])
    lora = read_lora(write_diffusers(pipeline, tmp_path / "lora", draw_weights(pipeline, "sdxl", 1)), base.family)
    with pytest.raises(CheckpointError, match="runs at int8 and takes no LoRA; serve it with --text-encoder-precision"):
        LoraBase(checkpoint, base).prepare("lora", [(lora, 1.0)])
