"""Learning rates: the projection of K learns faster than the rest, under every rate of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.training.tiny_runs import UNIFY, iterate, tiny_distiller


def test_the_projection_of_k_has_its_roles_rate_times_its_scale() -> None:
    """In the second of four iterations of warm-up: half of the student's 1e-3 and of the fake score's 2e-3."""
    config = replace(UNIFY, condition_lr_scale=7.0, warmup_steps=4)
    distiller = tiny_distiller("stable_diffusion", config)
    iterate(distiller, 2)
    for role, expected in (("student", 0.5e-3), ("fake", 1e-3)):
        rates = {id(p): group["lr"] for group in distiller.optimizers[role].param_groups for p in group["params"]}
        for name, parameter in distiller.roles.module(role).named_parameters():  # type: ignore[arg-type]
            assert rates[id(parameter)] == pytest.approx(expected * (7.0 if "cond_proj" in name else 1.0)), name


def test_adams_first_step_moves_the_projection_of_k_by_its_rate() -> None:
    """Without momentum a first step of AdamW is the learning rate times the sign of the gradient."""
    distiller = tiny_distiller("stable_diffusion", replace(UNIFY, condition_lr_scale=7.0))
    parameters = dict(distiller.roles.module("student").named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    iterate(distiller, 1)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in parameters.items()}
    (of_k,) = (step for name, step in moved.items() if "cond_proj" in name)
    others = max(step for name, step in moved.items() if "cond_proj" not in name)
    assert (of_k, others) == (pytest.approx(7e-3, rel=1e-2), pytest.approx(1e-3, rel=1e-2))
