"""Architectures have the published sizes; a random checkpoint can be served and opened by stock pipelines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionPipeline

from export import real_sizes
from export.architectures import REAL_SIZES, empty_model, random_model
from export.real_sizes import RESULTS_FILE, main, table, write_random_sd15
from tdm_runtime.checkpoint.folder import open_checkpoint

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
        ("pixart", "denoiser", 610_856_096),
        ("cogvideox-2b", "denoiser", 1_693_783_872),
        ("cogvideox-2b", "decoder", 215_583_907),
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
        write_random_sd15(folder)
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


@pytest.mark.parametrize("arguments", [[], ["sd99", "--output", "x"], ["--checkpoint", "sdxl", "x"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
