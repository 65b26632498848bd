"""TDM-unify on the real modules at their start: what must hold before the first update."""

from __future__ import annotations

import pytest
import torch

from training.glyphs import load_glyphs
from training.tdm import TDMConfig, TDMTrainer, advance, draw_places, roll_out
from training.teacher import build_unet, save_teacher
from training.text import build_text_encoder, train_tokenizer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> TDMTrainer:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(load_glyphs())
    save_teacher(folder, build_unet(), build_text_encoder(tokenizer), tokenizer)
    return TDMTrainer(folder, TDMConfig(batch_size=6))


def test_student_and_fake_score_start_as_the_teacher_whatever_k(trainer: TDMTrainer) -> None:
    """The projection of K starts at zero (sec. 3.2)."""
    x = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    timesteps, embeds = torch.tensor([999, 749, 499, 10]), trainer.encode(["a cat"] * 4)
    with torch.no_grad():
        teacher = trainer.teacher(x, timesteps, embeds, None)
        for denoise in (trainer.student, trainer.fake):
            assert torch.equal(denoise(x, timesteps, embeds, torch.tensor([1, 2, 3, 4])), teacher)


def test_a_rollout_is_deterministic_and_stops_where_each_sample_stands(trainer: TDMTrainer) -> None:
    generator = torch.Generator().manual_seed(1)
    places = draw_places(trainer.tables, 6, generator)
    noise = torch.randn(6, 4, 16, 16, generator=generator)
    embeds = trainer.encode(["a dog"] * 6)
    first, second = (roll_out(trainer.student, trainer.tables, noise, places, embeds) for _ in range(2))
    assert torch.equal(first, second)
    unmoved = (places.row == 0).nonzero().flatten()
    assert torch.equal(first[unmoved], noise[unmoved])
    for n in (places.row > 0).nonzero().flatten().tolist():
        x = noise[n : n + 1]
        for row in range(int(places.row[n])):
            with torch.no_grad():
                x, _ = advance(
                    trainer.student, trainer.tables, x, torch.tensor([row]), places.step_counts[n : n + 1], embeds[:1]
                )
        torch.testing.assert_close(first[n : n + 1], x, rtol=0.05, atol=0.05)


def test_one_iteration_moves_student_and_fake_score_and_not_the_teacher(trainer: TDMTrainer) -> None:
    modules = {"student": trainer.student_unet, "fake": trainer.fake_unet, "teacher": trainer.teacher.unet}
    before = {name: [p.detach().clone() for p in module.parameters()] for name, module in modules.items()}
    numbers = trainer.train_step(0, torch.Generator().manual_seed(0))
    moved = {
        name: any(not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True))
        for name, module in modules.items()
    }
    assert moved == {"student": True, "fake": True, "teacher": False}
    assert all(torch.isfinite(torch.tensor(value)) for value in numbers.values())
    for unet in (trainer.student_unet, trainer.fake_unet):
        assert unet.time_embedding.cond_proj.weight.abs().max() > 0, "K must become an input from the first update"


def test_captions_of_an_iteration_are_a_function_of_its_number(trainer: TDMTrainer) -> None:
    assert trainer.captions(5) == trainer.captions(5)
    assert trainer.captions(5) != trainer.captions(6)
