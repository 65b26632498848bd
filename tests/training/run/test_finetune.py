"""Fine-tuning of a teacher on latents: loss, exact resume, and a folder that can be distilled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_pipelines import build_pipeline
from tests.training.run.killed import assert_resumes
from tests.training.tiny_runs import UNIFY, TinyPrompts, iterate, tiny_base
from training.config import ConfigError
from training.methods.roles import CleanEstimator
from training.methods.trajectory import Coordinates
from training.pretrained.base_model import load_base_model
from training.pretrained.latents import encode_latents
from training.pretrained.prompts import embed_prompts
from training.pretrained.train import build_backbone_distiller, finetune_backbone
from training.run.finetune import FinetuneConfig, finetune
from training.run.loop import LOG_FILE

CONFIG = FinetuneConfig(
    steps=4, batch_size=4, learning_rate=1e-3, warmup_steps=0, precision="fp32", save_every_s=0.0, log_every=1
)


def tiny_estimator(family: str) -> CleanEstimator:
    base = tiny_base(family)
    return CleanEstimator(base.denoiser, Coordinates(base.noise_schedule, base.prediction_type), "fp32")


def train(folder: Path, config: FinetuneConfig = CONFIG, family: str = "stable_diffusion") -> torch.nn.Module:
    return finetune(folder, tiny_estimator(family), TinyPrompts(family, has_latents=True), config)


@pytest.mark.parametrize("family", ["stable_diffusion", "pixart", "sd3", "cogvideox"])
def test_the_loss_falls_and_the_average_is_returned(family: str, tmp_path: Path) -> None:
    estimator = tiny_estimator(family)
    steps = replace(CONFIG, steps=8, ema_decay=0.5)
    average = finetune(tmp_path, estimator, TinyPrompts(family, has_latents=True), steps)
    losses = [json.loads(line)["loss"] for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not average.training and not any(p.requires_grad for p in average.parameters())
    pairs = list(zip(average.parameters(), estimator.denoiser.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_killed_run_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_resumes(lambda folder: train(folder), tmp_path, monkeypatch)


def test_accumulated_parts_train_as_one_batch(tmp_path: Path) -> None:
    whole, parts = train(tmp_path / "1"), train(tmp_path / "2", replace(CONFIG, accumulation=2))
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


def test_prompt_dropout_of_1_ignores_the_prompts_and_0_uses_them(tmp_path: Path) -> None:
    """Train on two sets of prompts and compare the weights."""

    class Others(TinyPrompts):
        def conditioning(self, numbers: range):  # type: ignore[no-untyped-def]
            return super().conditioning(range(numbers.start + 3, numbers.stop + 3))

    def are_equal(dropout: float) -> bool:
        config = replace(CONFIG, steps=1, prompt_dropout=dropout)
        averages = [
            finetune(
                tmp_path / f"{dropout}-{kind.__name__}",
                tiny_estimator("stable_diffusion"),
                kind("stable_diffusion", has_latents=True),
                config,
            )
            for kind in (TinyPrompts, Others)
        ]
        pairs = zip(*(average.parameters() for average in averages), strict=True)
        return all(torch.equal(ours, theirs) for ours, theirs in pairs)

    assert are_equal(1.0) and not are_equal(0.0)


def test_prompts_without_latents_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learns from real latents, and the prompts have none; give a set with"):
        finetune(tmp_path, tiny_estimator("stable_diffusion"), TinyPrompts("stable_diffusion"), CONFIG)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt_dropout", 1.5, r"prompt_dropout is 1.5; it must be a share, in \[0, 1\]"),
        ("steps", 0, "steps is 0; it must be at least 1"),
        ("batch_size", 0, "batch_size is 0; it must be at least 1"),
        ("accumulation", 3, "accumulation is 3; it must be a divisor of batch_size, 4"),
        ("warmup_steps", -1, "warmup_steps is -1; it must be at least 0"),
        ("learning_rate", float("nan"), "learning_rate is nan; it must be a finite number of at least 0"),
        ("final_lr_share", -0.1, "final_lr_share is -0.1; it must be a finite number of at least 0"),
        ("clip_norm", 0.0, "clip_norm is 0.0; it must be above 0"),
        ("ema_decay", 1.0, r"ema_decay is 1.0; it must be in \[0, 1\)"),
        ("betas", (0.9, 1.0), r"betas is \(0.9, 1.0\); it must be two numbers in \[0, 1\)"),
    ],
)
def test_a_config_value_out_of_range_is_rejected(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **{field: value})


def test_a_fine_tuned_base_can_be_distilled(tmp_path: Path) -> None:
    """Run TDM-unify-SFT from pictures to an iteration of the student."""
    from PIL import Image

    base, embeddings, prompts = tmp_path / "stable_diffusion", tmp_path / "e", tmp_path / "p.jsonl"
    build_pipeline("stable_diffusion").save_pretrained(base)
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "red.png")
    prompts.write_text('{"prompt": "red", "image": "red.png"}\n')
    embed_prompts(base, prompts, embeddings, 64, 64, device="cpu")
    encode_latents(base, prompts, embeddings, 64, 64, device="cpu")
    config = replace(CONFIG, steps=1, gradient_checkpointing=True)
    tuned = finetune_backbone(tmp_path / "sft", base, embeddings, config)
    assert finetune_backbone(tmp_path / "sft", base, embeddings, config) == tuned
    before, after = (dict(load_base_model(folder).denoiser.named_parameters()) for folder in (base, tuned))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    again = dict(load_base_model(base).denoiser.named_parameters())
    assert all(torch.equal(before[name], again[name]) for name in before), "fine-tuning must not change the base folder"
    distiller = build_backbone_distiller(tuned, embeddings, UNIFY)
    teacher = dict(distiller.roles.teacher.denoiser.named_parameters())
    assert all(torch.equal(teacher[name], after[name]) for name in after)
    iterate(distiller, 1)
