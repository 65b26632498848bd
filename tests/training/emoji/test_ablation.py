"""The ablation table: each row is trained once, measured with every sampler, and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from tests.training.run.killed import needs_font
from training.emoji.data.text import build_text_encoder
from training.emoji.report import ablation
from training.emoji.report.ablation import (
    VARIANTS,
    Judge,
    Variant,
    prepare_teachers,
    print_ablation,
    run_ablation,
    run_variant,
)
from training.emoji.stages import curated
from training.emoji.stages.autoencoder import build_autoencoder
from training.emoji.stages.student import load_denoiser
from training.emoji.stages.teacher import build_unet, save_teacher

SMALL = {"PICTURES": 4, "DIVERSE_PROMPTS": 2, "DIVERSE_SEEDS": 2, "TEACHER_STEPS": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """A run with two teachers of random weights, an autoencoder and a few latents."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    for name in ("teacher", ablation.OTHER_BASE):
        save_teacher(run / name, build_unet(), build_text_encoder(tokenizer), tokenizer)
    build_autoencoder().save_pretrained(run / "autoencoder" / "vae")
    np.save(run / "teacher" / "latents.npy", np.random.default_rng(0).normal(size=(8, 4, 16, 16)).astype(np.float16))
    return run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train every variant for one iteration of two samples, and measure it on a few pictures."""
    for name, value in SMALL.items():
        monkeypatch.setattr(ablation, name, value)
    variants = {
        name: replace(variant, config=replace(variant.config, steps=1, batch_size=2))
        for name, variant in VARIANTS.items()
    }
    monkeypatch.setattr(ablation, "VARIANTS", variants)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_every_kind_of_row_is_measured_with_the_samplers_of_the_paper(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = Judge(run)
    labels = {
        name: set(run_variant(name, 0, judge, run, tmp_path).measured)
        for name in ("unify-GAN", "4 steps, LCM", "4 steps, TDM from that LCM", "4 steps, LoRA rank 16")
    }
    assert labels["unify-GAN"] == {"1", "2", "4"}
    assert labels["4 steps, LCM"] == {"1", "2", "4", "4 dpmsolver++", "4 deterministic"}
    assert "4 on another base" in labels["4 steps, LoRA rank 16"]
    print_ablation(run, tmp_path)
    table = capsys.readouterr().out
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()]
    assert rows.count("4 steps, LCM") == 1
    assert {"4 steps, LCM: deterministic", "teacher, guidance 3", "another base, 3 steps"} <= set(rows)
    assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.usefixtures("small")
def test_a_finished_row_is_read_and_not_trained_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(run)
    first = run_variant("TDM-unify", 0, judge, run, tmp_path)
    monkeypatch.setattr(ablation, "build_distiller", None)
    assert run_variant("TDM-unify", 0, judge, run, tmp_path) == first


@needs_font
@pytest.mark.usefixtures("small")
def test_the_teacher_is_fine_tuned_when_a_row_needs_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curated, "CURATED", replace(curated.CURATED, steps=1, batch_size=2))
    monkeypatch.setattr(curated, "CURATED_SCENES", 4)
    bare, results = tmp_path / "run", tmp_path / "results"
    for part in ("teacher", "autoencoder"):
        copytree(run / part, bare / part)
    prepare_teachers(bare, ["TDM-unify", "4 steps, LCM"])
    assert not (bare / ablation.OTHER_BASE).exists()
    run_ablation(bare, results, [0], ["unify-SFT"])
    assert (results / "unify-SFT-0.json").is_file()
    before, after = (load_denoiser(bare / name / "unet").state_dict() for name in ("teacher", ablation.OTHER_BASE))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_rows_share_the_batch_size_and_no_two_have_equal_settings() -> None:
    for name, variant in VARIANTS.items():
        assert isinstance(variant, Variant)
        same = variant.config.batch_size == VARIANTS["TDM-unify"].config.batch_size
        assert same, f"{name} has another batch size"
    configs = [
        variant.config for variant in VARIANTS.values() if variant.teacher == "teacher" and not variant.starts_from
    ]
    assert len(set(map(repr, configs))) == len(configs)
