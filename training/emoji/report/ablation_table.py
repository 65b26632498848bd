"""The tables of the ablations: every row, adapters on other bases, and the paper's orderings with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from training.emoji.report.ablation import LCM_START, MEASURED_STEPS, TEACHER, VARIANTS, Result, read_result
from training.emoji.report.judge import TEACHER_STEPS, Measured
from training.emoji.stages.bases import BASES
from training.emoji.stages.student import EMOJI
from training.measure.intervals import half_width, interval

TDM = "TDM, 4 steps"
COLUMNS = (
    "variant",
    "paper",
    *(f"K = {k}" for k in MEASURED_STEPS),
    "to drawn",
    "adherence",
    "PSNR dB",
    "diversity",
    "s / iteration",
    "seeds",
)


@dataclass(frozen=True)
class Side:
    """What an ordering compares: a row, its sampler, and the base that a LoRA was moved to."""

    variant: str
    sampler: str = "4"
    base: str = TEACHER

    def of(self, results: Sequence[Result]) -> dict[int, float]:
        """Return the Frechet distance of each seed to the base's pictures at 25 steps."""
        if self.base == TEACHER:
            return {seed: measured.frechet for seed, measured in self.measured(results).items()}
        rows = (r for r in results if r.variant == self.variant and self.sampler in r.moved.get(self.base, {}))
        return {r.seed: r.moved[self.base][self.sampler] for r in rows}

    def to_drawn(self, results: Sequence[Result]) -> dict[int, float]:
        """Return the Frechet distance of each seed to drawn scenes. A moved LoRA has none."""
        if self.base != TEACHER:
            return {}
        return {seed: measured.frechet_drawn for seed, measured in self.measured(results).items()}

    def measured(self, results: Sequence[Result]) -> dict[int, Measured]:
        """Return the measurements of each seed."""
        rows = (r for r in results if r.variant == self.variant and self.sampler in r.measured)
        return {r.seed: r.measured[self.sampler] for r in rows}


@dataclass(frozen=True)
class Ordering:
    """A comparison of the paper: it finds one side better."""

    claim: str
    better: Side
    worse: Side


ORDERINGS = (
    *(
        Ordering(f"Table 5: K as an input, K = {k}", Side("TDM-unify", k), Side("unify, without K", k))
        for k in ("1", "2", "4")
    ),
    *(
        Ordering(
            f"Table 5: surrogate loss, K = {k}", Side("TDM-unify", k), Side("unify, no surrogate (L2, DMD norm)", k)
        )
        for k in ("1", "2", "4")
    ),
    Ordering("Table 5: unify instead of 4 steps only, 1 step", Side("TDM-unify", "1"), Side(TDM, "1")),
    Ordering("Table 5: unify instead of 4 steps only, 2 steps", Side("TDM-unify", "2"), Side(TDM, "2")),
    Ordering("Table 5: 4 steps only instead of unify, 4 steps", Side(TDM), Side("TDM-unify")),
    Ordering("Table 5: importance sampling", Side(TDM), Side("4 steps, no importance sampling")),
    Ordering("ours: importance target, not weight 1", Side(TDM), Side("4 steps, weight 1")),
    Ordering("ours: importance target, not trajectory score", Side(TDM), Side("4 steps, trajectory score")),
    Ordering("Table 6: test with DPM-Solver++, trained with DDIM", Side(TDM, "4 dpmsolver++"), Side(TDM)),
    Ordering(
        "Table 6: test with DPM-Solver++, trained with it",
        Side("4 steps, DPM-Solver++ rollout", "4 dpmsolver++"),
        Side("4 steps, DPM-Solver++ rollout"),
    ),
    Ordering("Table 6: train with DDIM, test with DDIM", Side(TDM), Side("4 steps, DPM-Solver++ rollout")),
    Ordering("Table 7: match noisy samples", Side(TDM), Side("4 steps, matching clean samples")),
    Ordering("Table 8: Fisher divergence", Side("4 steps, Fisher divergence"), Side(TDM)),
    Ordering("Table 1: TDM, not DMD2", Side(TDM), Side("4 steps, DMD2")),
    Ordering("Table 1: TDM, not LCM", Side(TDM), Side(LCM_START)),
    Ordering("Fig. 8: LCM sampled with noise", Side(LCM_START), Side(LCM_START, "4 deterministic")),
    Ordering("Fig. 8: TDM repairs that LCM", Side("4 steps, LCM, then TDM"), Side(LCM_START, "4 deterministic")),
    Ordering(
        "control: TDM, not as much more LCM",
        Side("4 steps, LCM, then TDM"),
        Side("4 steps, LCM, then more LCM", "4 deterministic"),
    ),
    Ordering("control: TDM from that LCM, not from the teacher", Side("4 steps, LCM, then TDM"), Side(TDM)),
    *(
        Ordering(
            f"Table 2: TDM-LoRA, not {other}-LoRA, on {base}",
            Side("4 steps, TDM-LoRA", base=base),
            Side(f"4 steps, {other}-LoRA", base=base),
        )
        for other in ("LCM", "TCD")
        for base in (TEACHER, *BASES)
    ),
)


def print_ablation(folder: Path) -> None:
    """Print the finished rows as Markdown tables, with means over seeds and 95% intervals.

    The K columns are Frechet distances to the teacher's pictures at 25 steps. The columns after them belong to the last
    K. An ordering's difference is of the same seed, so of the same noise and captions.
    """
    results = [read_result(file) for file in sorted(folder.glob("*.json"))]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, variant in VARIANTS.items():
        _print_variant(name, variant.tests, [r for r in results if r.variant == name])
    for result in (r for r in results if r.variant == TEACHER):
        _print_teacher(result)
    _print_moved(results)
    _print_orderings(results)


def _print_variant(name: str, tests: str, rows: Sequence[Result]) -> None:
    measured = {label: [r.measured[label] for r in rows] for r in rows for label in r.measured}
    if not rows:
        return
    seconds, seeds = f"{mean(r.seconds / r.steps for r in rows):.2f}", str(len(rows))
    _print_row(name, tests, [measured.get(str(k), []) for k in MEASURED_STEPS], seconds, seeds)
    for label in [label for label in measured if not label.isdecimal()]:
        _print_row(f"{name}: {label.removeprefix('4 ')}", tests, [[], [], measured[label]], seconds, seeds)


def _print_teacher(result: Result) -> None:
    found = {label: [measured] for label, measured in result.measured.items()}
    few = [found[str(k)] for k in MEASURED_STEPS]
    _print_row(f"teacher, guidance {EMOJI.guidance_scale:g}", "", few, "", "")
    _print_row(f"teacher, {TEACHER_STEPS} steps", "", [[], [], found[str(TEACHER_STEPS)]], "", "")


def _print_row(name: str, paper: str, measured: Sequence[Sequence[Measured]], seconds: str, seeds: str) -> None:
    """Print a row.

    Args:
        measured: For each of `MEASURED_STEPS`, the measurements of all seeds. Empty lists give empty cells.
    """
    cells = [interval([m.frechet for m in of_k]) if of_k else "" for of_k in measured]
    last = measured[-1]
    numbers = (
        f"{mean(m.frechet_drawn for m in last):.2f}",
        f"{mean(m.adherence for m in last):.3f}",
        f"{mean(m.psnr_db for m in last):.1f}",
        f"{mean(m.diversity for m in last):.2f}",
    )
    print(f"| {' | '.join((name, paper, *cells, *numbers, seconds, seeds))} |")


def _print_moved(results: Sequence[Result]) -> None:
    """Print the Frechet distances of LoRA students on their own base and on others, to each base's own pictures."""
    bases = (TEACHER, *BASES)
    rows = [(n, s) for n, v in VARIANTS.items() if v.config.lora_rank for s in v.samplers]
    print(f"\n| 4 steps | {' | '.join(bases)} |\n|{'---|' * (1 + len(bases))}")
    for name, sampler in rows:
        values = [list(Side(name, sampler, base).of(results).values()) for base in bases]
        if any(values):
            print(f"| {name}{sampler[1:].replace(' ', ': ')} | {' | '.join(interval(v) for v in values)} |")
    of_bases: Mapping[str, Result] = {r.variant: r for r in results if r.variant in bases}
    if set(of_bases) == set(bases):
        cells = [f"{of_bases[base].measured['4'].frechet:.2f}" for base in bases]
        print(f"| the base itself, guidance {EMOJI.guidance_scale:g} | {' | '.join(cells)} |")


def _print_orderings(results: Sequence[Result]) -> None:
    head = (
        "the paper finds better",
        "to the teacher, worse - better",
        "here",
        "to drawn, worse - better",
        "here",
        "seeds",
    )
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for ordering in ORDERINGS:
        better, worse = ordering.better, ordering.worse
        pairs = [(better.of(results), worse.of(results)), (better.to_drawn(results), worse.to_drawn(results))]
        to_teacher, to_drawn = ([b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())] for a, b in pairs)
        if to_teacher:
            drawn = (interval(to_drawn), verdict(to_drawn)) if to_drawn else ("", "")
            cells = (ordering.claim, interval(to_teacher), verdict(to_teacher), *drawn, str(len(to_teacher)))
            print(f"| {' | '.join(cells)} |")


def verdict(differences: Sequence[float]) -> str:
    """Return whether an ordering reproduces, from worse - better of each seed."""
    if len(differences) < 2:
        return "one seed"
    middle, width = mean(differences), half_width(differences)
    if abs(middle) <= width:
        return "within noise"
    return "reproduces" if middle > 0 else "the other way round"
