"""The ablation table: each row is trained once, measured with every sampler, and kept."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tests.training.run.killed import needs_font
from training.emoji.data.scenes import caption, sample_scene
from training.emoji.data.text import build_text_encoder
from training.emoji.report import ablation, ablation_table, judge
from training.emoji.report.ablation import (
    TEACHER,
    VARIANTS,
    Result,
    Variant,
    prepare_teachers,
    run_ablation,
    run_variant,
)
from training.emoji.report.ablation_table import ORDERINGS, Side, print_ablation, verdict
from training.emoji.report.judge import Judge, Measured
from training.emoji.stages import bases
from training.emoji.stages.autoencoder import build_autoencoder
from training.emoji.stages.bases import BASES, RESTORED, RESTORED_SET, SceneSet, other_palette, restore_teacher
from training.emoji.stages.student import LATENTS_SEED, ScenePrompts, build_distiller, load_denoiser
from training.emoji.stages.teacher import build_unet, save_teacher

SMALL = {"PICTURES": 4, "DIVERSE_PROMPTS": 2, "DIVERSE_SEEDS": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """A run with two teachers of random weights, an autoencoder and a few latents."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    for name in (TEACHER, *BASES):
        save_teacher(run / name, build_unet(), build_text_encoder(tokenizer), tokenizer)
        np.save(run / name / "latents.npy", np.random.default_rng(0).normal(size=(8, 4, 16, 16)).astype(np.float16))
    build_autoencoder().save_pretrained(run / "autoencoder" / "vae")
    return run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train every variant for one iteration of two samples, and measure it on a few pictures."""
    for name, value in SMALL.items():
        monkeypatch.setattr(judge, name, value)
    for module in (judge, ablation, ablation_table):
        monkeypatch.setattr(module, "TEACHER_STEPS", 3)
    variants = {
        name: replace(variant, config=replace(variant.config, steps=1, batch_size=2))
        for name, variant in VARIANTS.items()
    }
    monkeypatch.setattr(ablation, "VARIANTS", variants)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_every_kind_of_row_is_measured_and_printed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["unify-GAN", "4 steps, LCM", "4 steps, LCM, then TDM", "4 steps, TDM-LoRA", "4 steps, TCD-LoRA"]
    run_ablation(run, tmp_path, [0, 1], names)
    capsys.readouterr()
    print_ablation(tmp_path)
    main, moved, orderings = capsys.readouterr().out.split("\n\n")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in main.splitlines()]
    assert {"4 steps, LCM: deterministic", "teacher, guidance 3", "teacher, 3 steps"} <= set(rows)
    assert rows.count("4 steps, LCM") == 1
    assert {"| 4 steps, TDM-LoRA", "| 4 steps, TCD-LoRA: stochastic"} <= {r.split(" | ")[0] for r in moved.splitlines()}
    assert "| Fig. 8: TDM repairs that LCM | " in orderings
    for table in (main, moved, orderings):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1


@pytest.mark.usefixtures("small")
def test_a_finished_row_is_read_and_not_trained_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_run = Judge(run)
    first = run_variant("TDM-unify", 0, lambda _: of_run, run, tmp_path)
    assert set(first.measured) == {"1", "2", "4"}
    monkeypatch.setattr(ablation, "build_distiller", None)
    assert run_variant("TDM-unify", 0, lambda _: of_run, run, tmp_path) == first


@pytest.mark.usefixtures("small")
def test_an_adapter_is_measured_on_every_base_beside_its_own(run: Path, tmp_path: Path) -> None:
    judges = {base: Judge(run, base) for base in (TEACHER, *BASES)}
    found = run_variant("4 steps, LCM-LoRA", 0, judges.__getitem__, run, tmp_path)
    assert list(found.moved) == list(BASES)
    assert all(set(values) == {"4", "4 deterministic"} for values in found.moved.values())
    assert len({value for values in found.moved.values() for value in values.values()}) == 2 * len(BASES)


@needs_font
@pytest.mark.usefixtures("small")
def test_a_run_without_teacher_gets_one_of_the_checkpoint_and_bases_where_a_row_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"steps": 1, "batch_size": 2}
    monkeypatch.setattr(ablation, "restore_teacher", lambda run, source: restore_teacher(run, source, tiny_restored))
    tiny_restored = replace(RESTORED, **tiny)
    monkeypatch.setattr(bases, "RESTORED_SET", replace(RESTORED_SET, count=4))
    monkeypatch.setattr(
        ablation, "finetune_teacher", partial(bases.finetune_teacher, config=replace(bases.BASE, **tiny))
    )
    monkeypatch.setattr(ablation, "BASES", {name: replace(scenes, count=4) for name, scenes in BASES.items()})
    assert prepare_teachers(tmp_path, ["TDM-unify", "4 steps, LCM"]) == [TEACHER]
    student = load_denoiser(DEFAULT_CHECKPOINT / "unet").state_dict()
    start, teacher = (load_denoiser(tmp_path / TEACHER / part).state_dict() for part in ("start/unet", "unet"))
    differing = {name for name in student if not torch.equal(student[name], start[name])}
    assert differing == {name for name in student if "cond_proj" in name}
    assert not any(start[name].any() for name in differing)
    assert any(not torch.equal(start[name], teacher[name]) for name in teacher)
    assert {tensor.dtype for tensor in teacher.values()} == {torch.float32}
    assert prepare_teachers(tmp_path, ["unify-SFT"]) == [TEACHER, "teacher-sft"]
    after = load_denoiser(tmp_path / "teacher-sft" / "unet").state_dict()
    assert any(not torch.equal(after[name], teacher[name]) for name in teacher)


def test_a_teacher_that_was_trained_is_not_replaced(run: Path) -> None:
    with pytest.raises(FileExistsError, match=r"teacher holds a teacher; give another --run to make one from"):
        restore_teacher(run, DEFAULT_CHECKPOINT)


@needs_font
def test_the_scenes_of_a_base_are_drawn_in_its_style(run: Path, tmp_path: Path) -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)
    assert other_palette(red).flatten().tolist() == [-1.0, 1.0, -1.0]
    plain, coloured = (SceneSet(seed=5, count=3, style=style) for style in (lambda x: x, other_palette))
    latents = []
    for n, scenes in enumerate((plain, coloured, plain)):
        scenes.encode(tmp_path / f"{n}.npy", run / "autoencoder")
        latents.append(np.load(tmp_path / f"{n}.npy"))
    assert latents[0].shape == (3, 4, 16, 16)
    assert np.array_equal(latents[0], latents[2]) and not np.allclose(latents[0], latents[1])


def test_captions_belong_to_the_latents_at_every_seed(run: Path) -> None:
    """The latents are of one stream of scenes, so the seed of a row decides where it starts, not the stream."""
    file, config = run / TEACHER / "latents.npy", replace(VARIANTS["4 steps, LCM"].config, steps=1, batch_size=3)
    of_stream = ScenePrompts(run / TEACHER, LATENTS_SEED, file)
    for seed in (0, 1, 2):
        prompts = build_distiller(replace(config, seed=seed), run / TEACHER, latents_file=file).run.prompts
        assert isinstance(prompts, ScenePrompts)
        expected = [sample_scene(prompts.glyphs, LATENTS_SEED, n % 8) for n in range(3 * seed, 3 * seed + 3)]
        assert prompts.captions(range(3)) == [caption(s, random.Random(n)) for n, s in enumerate(expected)]
        latents, shifted = prompts.latents(range(3)), of_stream.latents(range(3 * seed, 3 * seed + 3))
        assert latents is not None and shifted is not None and torch.equal(latents, shifted)


def result(name: str, seed: int, frechet: float) -> Result:
    return Result(
        name,
        seed,
        1.0,
        1,
        {"4": Measured(1.0, 20.0, frechet, 4.0 - 0.5 * frechet, 1.0)},
        {"teacher-sft": {"4": 2 * frechet}},
    )


def test_an_ordering_compares_equal_seeds_and_needs_an_interval_without_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict([2.0, 2.1, 1.9]) == "reproduces"
    assert verdict([-2.0, -2.1, -1.9]) == "the other way round"
    assert verdict([2.0, -1.0, 0.5]) == "within noise"
    assert verdict([2.0]) == "one seed"
    rows = [result("TDM, 4 steps", seed, 1.0 + 0.1 * seed) for seed in (0, 1, 2)]
    rows += [result("4 steps, Fisher divergence", seed, 1.5 + 0.1 * seed) for seed in (0, 1)]
    for n, row in enumerate(rows):
        (tmp_path / f"{n}.json").write_text(json.dumps(asdict(row)))
    print_ablation(tmp_path)
    out = capsys.readouterr().out
    assert "| Table 8: Fisher divergence | -0.50 ± 0.00 | the other way round | 0.25 ± 0.00 | reproduces | 2 |" in out
    assert "1.10 ± 0.25" in next(line for line in out.splitlines() if line.startswith("| TDM, 4 steps"))
    assert Side("TDM, 4 steps", base="teacher-sft").of(rows) == {0: 2.0, 1: 2.2, 2: 2.4}


def test_every_ordering_names_a_row_and_a_sampler_that_measures_it() -> None:
    for ordering in ORDERINGS:
        for side in (ordering.better, ordering.worse):
            assert side.sampler in VARIANTS[side.variant].samplers, ordering.claim


def test_rows_share_the_batch_size_and_no_two_have_equal_settings() -> None:
    for name, variant in VARIANTS.items():
        assert isinstance(variant, Variant)
        same = variant.config.batch_size == VARIANTS["TDM-unify"].config.batch_size
        assert same, f"{name} has another batch size"
    configs = [
        variant.config for variant in VARIANTS.values() if variant.teacher == "teacher" and not variant.starts_from
    ]
    assert len(set(map(repr, configs))) == len(configs)
