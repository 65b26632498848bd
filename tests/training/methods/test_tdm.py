"""TDM-unify on the emoji modules, before and after the first update."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from training.emoji.data.text import build_text_encoder
from training.emoji.stages.student import EMOJI, build_distiller
from training.emoji.stages.teacher import build_unet, save_teacher
from training.methods.trajectory import advance, draw_places, roll_out, sample
from training.run.distill import Distiller

CONFIG = replace(EMOJI, batch_size=6)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    save_teacher(folder, build_unet(), build_text_encoder(tokenizer), tokenizer)
    return folder


@pytest.fixture(scope="module")
def distiller(teacher_folder: Path) -> Distiller:
    return build_distiller(CONFIG, teacher_folder)


def test_student_and_fake_score_start_as_the_teacher_for_every_k(distiller: Distiller) -> None:
    """The projection of K starts at zero (sec. 3.2)."""
    x = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    timesteps, prompts = torch.tensor([999.0, 749, 499, 10]), distiller.run.prompts.conditioning(range(4))
    with torch.no_grad():
        teacher = distiller.roles.teacher(x, timesteps, prompts, None)
        for estimate in (distiller.roles.student, distiller.roles.fake):
            assert torch.equal(estimate(x, timesteps, prompts, torch.tensor([1, 2, 3, 4])), teacher)


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_a_rollout_is_deterministic_and_ends_before_each_samples_step(teacher_folder: Path, solver: str) -> None:
    distiller = build_distiller(replace(CONFIG, solver=solver, precision="fp32"), teacher_folder)
    student, trajectories, generator = distiller.roles.student, distiller.trajectories, torch.Generator().manual_seed(1)
    places = draw_places(trajectories, 6, generator)
    noise, prompts = torch.randn(6, 4, 16, 16, generator=generator), distiller.run.prompts.conditioning(range(6))
    first, second = (roll_out(student, trajectories, noise, places, prompts).x for _ in range(2))
    assert torch.equal(first, second)
    unmoved = (places.row == 0).nonzero().flatten()
    assert torch.equal(first[unmoved], noise[unmoved])
    for n in (places.row > 0).nonzero().flatten().tolist():
        one = slice(n, n + 1)
        x, previous = noise[one], torch.zeros_like(noise[one])
        for row in range(int(places.row[n])):
            here = places[one].at_row(row, trajectories)
            with torch.no_grad():
                x, previous = advance(
                    student, trajectories, x, here, prompts[one], previous, step_counts=places.step_counts[one]
                )
        torch.testing.assert_close(first[one], x, rtol=1e-3, atol=1e-3)


def test_a_stochastic_rollout_renoises_the_clean_estimate(distiller: Distiller) -> None:
    """With zero noise the rollout ends at alpha x_0."""
    places = draw_places(distiller.trajectories, 6, torch.Generator().manual_seed(1))
    noise, prompts = torch.randn(6, 4, 16, 16), distiller.run.prompts.conditioning(range(6))
    start = roll_out(
        distiller.roles.student, distiller.trajectories, noise, places, prompts, renoise=torch.zeros(6, 4, 4, 16, 16)
    )
    moved = (places.row > 0).nonzero().flatten()
    alphas, _ = distiller.run.coordinates.levels(places.timestep[moved], noise)
    torch.testing.assert_close(start.x[moved], alphas * start.previous[moved])


def test_one_iteration_moves_student_and_fake_score_and_not_the_teacher(teacher_folder: Path) -> None:
    distiller = build_distiller(CONFIG, teacher_folder)
    roles = distiller.roles
    modules = {"student": roles.module("student"), "fake": roles.module("fake"), "teacher": roles.teacher.denoiser}
    before = {name: [p.detach().clone() for p in module.parameters()] for name, module in modules.items()}
    numbers = distiller.train_step(0, torch.Generator().manual_seed(0))
    moved = {
        name: any(not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True))
        for name, module in modules.items()
    }
    assert moved == {"student": True, "fake": True, "teacher": False}
    assert all(torch.isfinite(torch.tensor(value)) for value in numbers.values())
    for role in ("student", "fake"):
        weight = modules[role].timestep_embedding.cond_proj.weight
        assert weight.abs().max() > 0, "the projection of K must change in the first update"


def test_captions_are_a_function_of_their_number(distiller: Distiller) -> None:
    prompts = distiller.run.prompts
    assert torch.equal(prompts.conditioning(range(5, 7)).prompt_embeds, prompts.conditioning(range(5, 7)).prompt_embeds)
    assert prompts.captions(range(5, 8)) == prompts.captions(range(8))[5:]  # type: ignore[attr-defined]
    assert len(set(prompts.captions(range(20)))) > 10  # type: ignore[attr-defined]


def test_the_averaged_student_is_swapped_in_and_out(teacher_folder: Path) -> None:
    distiller = build_distiller(CONFIG, teacher_folder)
    for step in range(2):
        distiller.train_step(step, torch.Generator().manual_seed(step))
    student = distiller.roles.module("student")
    before = [p.detach().clone() for p in student.parameters()]
    noise, prompts = torch.randn(2, 4, 16, 16), distiller.run.prompts.conditioning(range(2))
    averaged = distiller.sample(noise, 4, prompts)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    current = sample(distiller.roles.student, distiller.trajectories, noise, 4, prompts)
    assert not torch.equal(averaged, current)
