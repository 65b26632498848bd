"""Tables of the cases with a known answer, for `tdm-train proof`. Numbers are means over seeds with 95% intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

from training import colours, gaussian, mixture
from training.config import DistillConfig, FakeTarget
from training.measure.intervals import interval

DIMENSIONS = (1, 16, 1000)
"""Dimensions of the Gaussian case."""
START = "at the start (the teacher at K steps)"


def print_mixture(seeds: Sequence[int], *, is_flow: bool = False, names: Sequence[str] = ()) -> None:
    """Distil the mixture, and print distances to the data.

    Args:
        names: variants; by default all.

    Raises:
        ValueError: a name is unknown.
    """
    variants, coordinates = mixture.VARIANTS, mixture.FLOW if is_flow else mixture.DIFFUSION
    if unknown := sorted(set(names) - set(variants)):
        raise ValueError(f"unknown variants {unknown}; known are {list(variants)}")
    counts = mixture.DEFAULT.step_counts
    inner = [k for k in counts if k > 1]
    _print_row(
        "variant",
        [*(f"K = {k}" for k in counts), *(f"inner steps, K = {k}" for k in inner), "modes lost, K = 4"],
        is_head=True,
    )
    rows: Mapping[str, DistillConfig] = {
        START: replace(mixture.DEFAULT, steps=0),
        **{name: variants[name] for name in names or variants},
    }
    for name, config in rows.items():
        found = [mixture.prove(replace(config, seed=seed), coordinates) for seed in seeds]
        cells = [interval([d[k].data for d in found]) for k in counts]
        cells += [interval([d[k].trajectory for d in found]) for k in inner]
        _print_row(name, [*cells, interval([d[4].modes for d in found])])


def print_gaussian(seeds: Sequence[int], *, is_flow: bool = False) -> None:
    """Print where each target of the fake score leaves an inner step."""
    coordinates = mixture.FLOW if is_flow else gaussian.DIFFUSION
    truth = gaussian.inner_step("clean", 1, 0, coordinates).true_variance
    _print_row(f"fake_target (true variance {truth:.3f})", [f"d = {d}" for d in DIMENSIONS], is_head=True)
    for target in gaussian.TARGETS:
        steps = ([gaussian.inner_step(target, d, seed, coordinates) for seed in seeds] for d in DIMENSIONS)
        _print_row(target, [interval([step.resting_variance() for step in each], 3) for each in steps])


def print_colours(seeds: Sequence[int], names: Sequence[FakeTarget] = get_args(FakeTarget)) -> None:
    """Train transformers and distil each with every target of the fake score, and print distances to the data."""
    counts = colours.STUDENT.step_counts
    _print_row("", [f"{k} NFE" for k in (*counts, colours.MANY_STEPS)], is_head=True)
    teachers = [colours.train_teacher(colours.TeacherConfig(seed=seed)) for seed in seeds]
    samplers = [colours.teacher_sampler(teacher) for teacher in teachers]
    of_teachers = [[colours.distance(each, k) for each in samplers] for k in (*counts, colours.MANY_STEPS)]
    _print_row("teacher", [interval(values) for values in of_teachers])
    for name in names:
        students = [
            colours.distil(teacher, replace(colours.STUDENT, fake_target=name, seed=seed))
            for teacher, seed in zip(teachers, seeds, strict=True)
        ]
        _print_row(name, [*(interval([colours.distance(s.sample, k) for s in students]) for k in counts), ""])


def _print_row(name: str, cells: Sequence[str], *, is_head: bool = False) -> None:
    print(f"| {' | '.join([name, *cells])} |", flush=True)
    if is_head:
        print(f"|{'---|' * (len(cells) + 1)}")
