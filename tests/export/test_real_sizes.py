"""Architectures have the published sizes; a random checkpoint can be served and opened by stock pipelines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionPipeline

from benchmarks.backends import stock_arguments, stock_pipeline
from export import real_sizes
from export.real_sizes import RESULTS_FILE, main, table, write_random
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.families.architectures import REAL_SIZES, STOCK_TEXT, empty_model, random_model
from tdm_runtime.model.load import load_with_torch
from tdm_runtime.model.similarity import psnr_db
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

SMALLER: dict[str, dict[str, Any]] = {
    "text_encoder": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "denoiser": {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 16, "attention_head_dim": 2},
    "decoder": {"block_out_channels": (32, 32, 32, 32)},
    "tiny_decoder": {},
}


@pytest.mark.parametrize(
    ("model", "component", "parameters"),
    [
        ("sd15", "text_encoder", 123_060_480),
        ("sd15", "denoiser", 859_520_964 + 256 * 320),  # plus the input for K
        ("sd15", "decoder", 83_653_863),
        ("sd15", "tiny_decoder", 2_445_063),
        ("sdxl", "denoiser", 2_567_463_684 + 256 * 320),
        ("sd3", "denoiser", 2_028_328_000),
        ("pixart", "denoiser", 610_856_096),
        ("cogvideox-2b", "denoiser", 1_693_783_872),
        ("cogvideox-2b", "decoder_first_3", 215_583_907),
        ("wan-1.3b", "denoiser", 1_418_996_800),
    ],
)
def test_architectures_have_the_published_parameters(model: str, component: Any, parameters: int) -> None:
    with init_empty_weights(include_buffers=False):
        empty = empty_model(REAL_SIZES[model][component])
    assert sum(parameter.numel() for parameter in empty.parameters()) == parameters


def test_random_weights_are_reproducible_and_keep_activations_near_one() -> None:
    small = replace(REAL_SIZES["sd15"]["denoiser"], config=REAL_SIZES["sd15"]["denoiser"].config | SMALLER["denoiser"])
    first, second = random_model(small), random_model(small)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    condition = torch.zeros(1, 256)
    with torch.no_grad():
        output = first(torch.randn(1, 4, 16, 16), 500.0, torch.randn(1, 7, 16), timestep_cond=condition).sample
    assert 0.1 < output.std() < 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint with random weights in the published layout, with narrow layers, because the full size takes 2 GB."""
    sizes = {name: replace(one, config=one.config | SMALLER[name]) for name, one in REAL_SIZES["sd15"].items()}
    folder = tmp_path_factory.mktemp("random") / "sd15"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_sizes, "REAL_SIZES", {"sd15": sizes})
        write_random("sd15", folder)
    return folder


def test_random_checkpoint_can_be_opened(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    assert opened.recipe.native_sizes == ((512, 512),)
    assert opened.recipe.step_counts == (1, 2, 3, 4)
    assert opened.has_tiny_vae
    assert opened.load_denoiser().condition_dim == 256
    assert opened.load_tokenizer().max_tokens == 77
    assert opened.load_tiny_vae().config.latent_channels == 4


def test_stock_pipeline_opens_the_random_checkpoint(checkpoint: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        "a red cat", num_inference_steps=1, guidance_scale=2.0, height=128, width=128, output_type="np"
    ).images
    assert pictures.shape == (1, 128, 128, 3)


SMALL_CLIP = SMALLER["text_encoder"] | {"projection_dim": 16}
SMALL_FOLDERS: dict[str, dict[str, dict[str, Any]]] = {
    "sdxl": {
        "denoiser": {
            "block_out_channels": (32, 32, 32),
            "transformer_layers_per_block": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 32,
            "projection_class_embeddings_input_dim": 16 + 6 * 256,
        },
        "decoder": {"block_out_channels": (32, 32, 32, 32)},
    },
    "sd3": {
        "denoiser": {"num_layers": 1, "num_attention_heads": 1, "caption_projection_dim": 64, "joint_attention_dim": 64}
        | {"pooled_projection_dim": 32},
        "decoder": {"block_out_channels": (32, 32, 32, 32)},
    },
}


@pytest.mark.parametrize("model", SMALL_FOLDERS)
def test_a_random_stock_folder_makes_a_picture_here_and_in_the_stock_pipeline(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = SMALL_FOLDERS[model]
    sizes = {name: replace(one, config=one.config | changes[name]) for name, one in REAL_SIZES[model].items()}
    texts = {name: replace(one, config=one.config | SMALL_CLIP) for name, one in STOCK_TEXT[model].items()}
    monkeypatch.setattr(real_sizes, "REAL_SIZES", {model: sizes})
    monkeypatch.setattr(real_sizes, "STOCK_TEXT", {model: texts})
    write_random(model, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    pipeline = stock_pipeline(checkpoint, torch.float32)
    draw = torch.Generator().manual_seed(3)
    arguments = {"width": 128, "height": 64, "generator": draw, "output_type": "np"}
    (theirs,) = pipeline("a red cat", num_inference_steps=4, **arguments, **stock_arguments(checkpoint, 4)).images
    ours = generate(load_with_torch(checkpoint), SamplingParams("a red cat", 3, 4, 128, 64))
    assert psnr_db(ours, (255 * theirs).round().astype(np.uint8)) >= 50


def test_small_shape_differs_from_the_traced_one() -> None:
    for components in REAL_SIZES.values():
        for one in components.values():
            assert one.small["batch"] != one.sizes["batch"]
            assert (one.small["height"], one.small["width"]) != (16, 24)


RESULT = {
    "model": "sd15",
    "component": "tiny_decoder",
    "parameters": 1_220_544,
    "export_s": 3.5,
    "export_cpu_s": 3.4,
    "export_peak_bytes": 2**29,
    "ir_bytes": 2_441_146,
    "relative_l2_f32": 2.9e-3,
    "relative_l2_bf16": 1.5e-2,
    "output_shape": [1, 512, 512, 3],
    "load_s": 0.1,
    "call_s": 0.16,
    "call_cpu_s": 0.3,
    "calls": 5,
    "run_peak_bytes": 2**28,
}


def test_table_has_a_row_for_every_result() -> None:
    header, rule, *rows = table([RESULT, RESULT]).splitlines()
    assert header.count("|") == rule.count("|") == rows[0].count("|")
    assert len(rows) == 2
    assert "| 1.2 |" in rows[0]


def test_a_second_run_keeps_earlier_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def measure(model: str, component: str, output: Path) -> dict[str, Any]:
        measured.append(component)
        return RESULT | {"component": component}

    monkeypatch.setattr(real_sizes, "measure", measure)
    (tmp_path / RESULTS_FILE).write_text(json.dumps(RESULT) + "\n", encoding="utf-8")
    assert main(["sd15", "--output", str(tmp_path)]) == 0
    assert measured == ["text_encoder", "denoiser", "decoder"]
    assert len((tmp_path / RESULTS_FILE).read_text(encoding="utf-8").splitlines()) == 4
    assert main(["sd15", "--output", str(tmp_path)]) == 0
    assert len(measured) == 3
    assert "tiny_decoder" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["sd99", "--output", "x"], ["--checkpoint", "pixart", "x"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
