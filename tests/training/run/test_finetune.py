"""Fine-tuning a teacher on latents: it learns, resumes exactly, and its folder can be distilled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

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
def test_it_learns_and_returns_the_average(family: str, tmp_path: Path) -> None:
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


def test_prompts_are_emptied_as_often_as_asked(tmp_path: Path) -> None:
    """With every prompt emptied, what the prompts were makes no difference."""

    class Others(TinyPrompts):
        def conditioning(self, numbers: range):  # type: ignore[no-untyped-def]
            return super().conditioning(range(numbers.start + 3, numbers.stop + 3))

    def both(dropout: float) -> bool:
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

    assert both(1.0) and not both(0.0)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learns from real latents, and the prompts have none; give a set with"):
        finetune(tmp_path, tiny_estimator("stable_diffusion"), TinyPrompts("stable_diffusion"), CONFIG)
    with pytest.raises(ConfigError, match=r"prompt_dropout is 1.5; it must be a share, in \[0, 1\]"):
        replace(CONFIG, prompt_dropout=1.5)
    with pytest.raises(ConfigError, match="batch_size is 0; it must be at least 1"):
        replace(CONFIG, batch_size=0)


def test_a_fine_tuned_base_is_a_folder_to_distil(tmp_path: Path) -> None:
    """TDM-unify-SFT, from pictures to an iteration of the student."""
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
    assert all(torch.equal(before[name], again[name]) for name in before), "the base itself stays"
    distiller = build_backbone_distiller(tuned, embeddings, UNIFY)
    teacher = dict(distiller.roles.teacher.denoiser.named_parameters())
    assert all(torch.equal(teacher[name], after[name]) for name in after)
    iterate(distiller, 1)
