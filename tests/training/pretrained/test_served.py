"""What training writes, serving opens: its picture is the trainer's own, for every family and kind of student.

The trainer samples the averaged student of a run with the noise of a seed and decodes with its own VAE; `tdm-generate`
opens model/ of the run. Both pictures hold whole levels. Whole weights give equal pictures; the trainer adds a LoRA's
output where the runtime has merged its weights, so some levels round apart.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from serving.command.checks import check_models
from serving.config import ModelSource, ServerConfig
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.lora.lora_file import STEP_CONDITION_FILE
from tdm_runtime.checkpoint.recipe import RECIPE_FILE, load_recipe
from tdm_runtime.cli import main as tdm_generate
from tdm_runtime.errors import CheckpointError, RecipeError
from tdm_runtime.families import FAMILIES
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import torch_decoder
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tdm_runtime.sampling.noise import SeedNoise
from tests.tiny_pipelines import build_pipeline
from tests.training.tiny_runs import LORA, NOISE, UNIFY
from training.config import DistillConfig, load_config
from training.pretrained.base_model import encode_prompts
from training.pretrained.latents import encode_latents, load_latent_encoder
from training.pretrained.model_card import CARD_FILE
from training.pretrained.presets import as_dmd2, as_lcm, as_tcd
from training.pretrained.prompts import embed_prompts
from training.pretrained.student_files import LORA_FILE
from training.pretrained.train import build_backbone_distiller, train_backbone
from training.run.distill import Distiller
from training.run.loop import run_loop

PROMPT, SEED = "a red fox", 7
MIN_PSNR_DB = {"whole": 80.0, "LoRA": 50.0}
WIDTH, HEIGHT = 96, 64
TINY: dict[str, Any] = {"steps": 2, "batch_size": 2, "width": WIDTH, "height": HEIGHT, "step_counts": (1, 2, 4)}
LEARNS_FAST: dict[str, Any] = {"student_learning_rate": 1e-2, "condition_lr_scale": 100.0}
"""The pictures of two iterations must differ from the base's, and for every K."""
WHOLE = replace(UNIFY, **TINY, **LEARNS_FAST)
ADAPTER = replace(LORA, **TINY, **LEARNS_FAST, lora_rank=4, lora_alpha=32.0)
KINDS = {
    "whole": WHOLE,
    "whole, without K": replace(WHOLE, step_condition_for="none"),
    "LoRA": ADAPTER,
    "LoRA, without K": replace(ADAPTER, step_condition_for="none"),
}
EXTRA = {
    "whole, DPM-Solver++": replace(WHOLE, solver="dpmsolver++"),
    "LoRA, timesteps of its own": replace(ADAPTER, timesteps={2: (999.0, 399.0), 4: (999.0, 856.0, 665.0, 399.0)}),
    "whole, DMD2": replace(as_dmd2(WHOLE), fake_updates=1),
    "whole, LCM": as_lcm(WHOLE),
    "LoRA, LCM": as_lcm(ADAPTER),
    "LoRA, TCD": as_tcd(ADAPTER),
}
PICTURES = [family for family in NOISE if not FAMILIES[family].makes_clips]
CASES = [(family, kind) for family in PICTURES for kind in KINDS]
CASES += [("stable_diffusion", kind) for kind in EXTRA]
CASES += [("sd3", kind) for kind in EXTRA if "LCM" not in kind and "TCD" not in kind]
QUICK = {("stable_diffusion", kind) for kind in ("LoRA, without K", *EXTRA)} | {
    ("sdxl", "LoRA"),
    ("pixart", "whole"),
    ("sd3", "LoRA"),
    ("flux", "LoRA, without K"),
    ("flux2", "whole"),
    ("z_image", "LoRA"),
}
"""Cases of every test run, at least one of each family; the others are `slow`. `EXTRA` has whole UNets with and without
K, and a LoRA with K."""


@pytest.fixture(scope="module")
def workplace(
    folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Family -> folder of its base, and its embedded prompts with latents."""
    root, made = tmp_path_factory.mktemp("embeddings"), {}
    (root / "prompts.jsonl").write_text("".join(f'{{"prompt": "{word}"}}\n' for word in ("fox", "hen", "owl")))
    for n in range(3):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(root / f"{n}.png")

    def places(family: str) -> tuple[Path, Path]:
        if family not in made:
            embed_prompts(folders(family), root / "prompts.jsonl", root / family, WIDTH, HEIGHT)
            if not FAMILIES[family].makes_clips:
                encode_latents(folders(family), root, root / family, WIDTH, HEIGHT)
            made[family] = folders(family), root / family
        return made[family]

    return places


def test_every_test_run_compares_a_picture_of_each_family() -> None:
    assert {family for family, _ in QUICK & set(CASES)} == set(PICTURES)


@pytest.mark.parametrize(
    ("family", "kind"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_the_served_picture_is_the_trainers(
    workplace: Callable[[str], tuple[Path, Path]],
    family: str,
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, embeddings = workplace(family)
    config = (KINDS | EXTRA)[kind]
    model = train_backbone(tmp_path / "run", base, embeddings, config)
    distiller = trained(tmp_path / "run", base, embeddings, config)
    assert_served_as_trained(model, distiller, base, MIN_PSNR_DB[kind.partition(",")[0]], tmp_path, capsys)
    (checked,) = check_models(ServerConfig(models=(ModelSource(model),)))
    recipe = checked.recipe
    assert recipe.name == "run" and recipe.native_sizes == ((WIDTH, HEIGHT),)
    assert recipe.size_rule is not None and recipe.size_rule.allows(HEIGHT, WIDTH)
    assert set(recipe.files) == {str(file.relative_to(model)) for file in model.rglob("*.safetensors*")}
    for steps, table in distiller.trajectories.tables.items():
        ours = recipe.step_table(steps, WIDTH, HEIGHT)
        columns = ("timesteps",) if config.samples_with_noise else ("timesteps", "p", "q", "a", "b", "c")
        assert all(np.array_equal(getattr(ours, name), getattr(table, name)) for name in columns), steps


def test_a_base_that_reads_guidance_is_served_with_the_guidance_of_its_embeddings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, embeddings = tmp_path / "base", tmp_path / "embeddings"
    build_pipeline("flux", guidance_embeds=True).save_pretrained(base)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "fox"}\n')
    embed_prompts(base, tmp_path / "prompts.jsonl", embeddings, WIDTH, HEIGHT)
    model = train_backbone(tmp_path / "run", base, embeddings, WHOLE)
    distiller = trained(tmp_path / "run", base, embeddings, WHOLE)
    assert_served_as_trained(model, distiller, base, MIN_PSNR_DB["whole"], tmp_path, capsys)
    assert (load_recipe(model).guidance_scale, load_recipe(model).step_condition) == (3.5, "timestep_cond")


# ---- the folder ----------------------------------------------------------------------------------


def test_whole_weights_need_no_base_and_take_no_pickles_from_it(
    workplace: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, embeddings = workplace("pixart")
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    (base / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (base / "whole.ckpt").write_bytes(b"pickle")
    model = train_backbone(tmp_path / "run", base, embeddings, WHOLE)
    shutil.rmtree(base)
    assert open_checkpoint(model).load_denoiser().reads_step_count


def test_a_recipe_elsewhere_reads_k_from_the_folder_of_its_base(
    workplace: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model = train_backbone(tmp_path / "run", *workplace("pixart"), WHOLE)
    other = replace(load_recipe(model), base="../run/model", files={})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / RECIPE_FILE).write_text(other.to_json())
    opened = open_checkpoint(tmp_path / "other")
    assert opened.load_denoiser().reads_step_count
    before = opened.fingerprint
    condition = load_file(model / STEP_CONDITION_FILE)
    save_file({name: 2 * tensor for name, tensor in condition.items()}, model / STEP_CONDITION_FILE)
    assert open_checkpoint(tmp_path / "other").fingerprint != before


@pytest.mark.parametrize("kind", ["whole", "LoRA"])
def test_weights_that_read_k_must_be_those_of_the_recipe(
    workplace: Callable[[str], tuple[Path, Path]], kind: str, tmp_path: Path
) -> None:
    model = train_backbone(tmp_path / "run", *workplace("sd3"), KINDS[kind])
    recipe, file = load_recipe(model), model / STEP_CONDITION_FILE
    condition = load_file(file)
    save_file({name: 2 * tensor for name, tensor in condition.items()}, file)
    with pytest.raises(CheckpointError, match=r"step_condition\.safetensors is damaged or of another checkpoint"):
        open_checkpoint(model)
    (model / RECIPE_FILE).write_text(replace(recipe, files={}, step_condition="none").to_json())
    with pytest.raises(RecipeError, match="step_condition is 'none' but the transformer has an input for K"):
        open_checkpoint(model).load_denoiser()
    file.unlink()
    (model / RECIPE_FILE).write_text(replace(recipe, files={}).to_json())
    with pytest.raises(RecipeError, match="step_condition is 'timestep_cond' but the transformer has no input for K"):
        open_checkpoint(model).load_denoiser()


def test_a_second_run_in_a_folder_replaces_the_model(
    workplace: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    train_backbone(tmp_path / "run", *workplace("pixart"), WHOLE)
    (tmp_path / "run" / "state.pt").unlink()
    model = train_backbone(tmp_path / "run", *workplace("pixart"), KINDS["LoRA, without K"])
    assert sorted(file.name for file in model.iterdir()) == sorted([CARD_FILE, LORA_FILE, RECIPE_FILE])


@pytest.mark.parametrize("kind", ["whole", "LoRA"])
def test_a_student_of_clips_is_served_with_the_frames_of_its_training(
    workplace: Callable[[str], tuple[Path, Path]], kind: str, tmp_path: Path
) -> None:
    model = train_backbone(tmp_path / "run", *workplace("cogvideox"), replace(KINDS[kind], frames=9))
    recipe = open_checkpoint(model).recipe
    assert recipe.frames is not None and recipe.frames.default == 9 and recipe.frames.step == 8
    width, height = recipe.native_sizes[0]
    params = SamplingParams("a fox", 1, recipe.default_steps, width, height, frames=9)
    assert generate(load_model(model, device="cpu"), params).shape == (9, height, width, 3)


# ---- the model card ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("stable_diffusion", "LoRA, without K"),
        ("z_image", "LoRA, without K"),
        pytest.param("sd3", "whole, without K", marks=pytest.mark.slow),
        pytest.param("flux", "LoRA, without K", marks=pytest.mark.slow),
        pytest.param("flux2", "whole, without K", marks=pytest.mark.slow),
        pytest.param("sdxl", "LoRA, without K", marks=pytest.mark.slow),
        pytest.param("pixart", "whole, without K", marks=pytest.mark.slow),
    ],
)
def test_the_cards_lines_for_stock_diffusers_make_the_served_picture(
    workplace: Callable[[str], tuple[Path, Path]],
    family: str,
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, embeddings = workplace(family)
    shutil.copytree(folder, tmp_path / "base")
    if family in ("sd3", "flux", "z_image"):  # their stock pipelines read the shift of the latents
        vae = tmp_path / "base" / "vae" / "config.json"
        vae.write_text(json.dumps({**json.loads(vae.read_text()), "shift_factor": 0.1}))
    config = replace(KINDS[kind], flow_shift=6.0 if family == "sd3" else 0.0)
    model = train_backbone(tmp_path / "run", tmp_path / "base", embeddings, config)
    card = (model / CARD_FILE).read_text()
    assert "Luo et al. 2025" in card and "| step counts K | 1, 2, 4 |" in card and "tdm-serve --model run=." in card
    program = card.split("```python\n")[1].split("```")[0]
    if family == "pixart":  # the tiny model is below the sizes of its bins
        program = program.replace("width=", "use_resolution_binning=False, width=")
    monkeypatch.chdir(model)
    made: dict[str, Any] = {}
    exec(program, made)
    assert psnr_db(np.asarray(made["picture"]) / 255.0, picture(model, 4, tmp_path, capsys) / 255.0) >= 40


def test_a_card_of_a_student_that_stock_pipelines_cannot_sample_says_so(
    workplace: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    reads_k = (train_backbone(tmp_path / "k", *workplace("pixart"), WHOLE) / CARD_FILE).read_text()
    assert "give the model no K" in reads_k and "```python" not in reads_k and "which the model reads" in reads_k
    dmd2 = train_backbone(tmp_path / "dmd2", *workplace("pixart"), replace(as_dmd2(WHOLE), fake_updates=1))
    assert "DMD2 (Yin et al. 2024)" in (dmd2 / CARD_FILE).read_text()
    settings = tmp_path / "settings.toml"
    settings.write_text((dmd2 / CARD_FILE).read_text().split("```toml\n")[1].split("```")[0])
    assert load_config(DistillConfig(), settings) == replace(as_dmd2(WHOLE), fake_updates=1)


# ---- pictures ------------------------------------------------------------------------------------


def trained(run: Path, base: Path, embeddings: Path, config: DistillConfig) -> Distiller:
    """Return the distillation of a finished run, as a resume restores it."""
    distiller = build_backbone_distiller(base, embeddings, config)
    run_loop(run, "tdm", config, distiller.trainable(), distiller.train_step)
    return distiller


def assert_served_as_trained(
    model: Path,
    distiller: Distiller,
    base: Path,
    min_psnr_db: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Compare served pictures of 1, 2 and 4 steps with the trainer's own, and `tdm-generate`'s with the served."""
    (conditioning,) = encode_prompts(base, [PROMPT], batch_size=1, width=WIDTH, height=HEIGHT)
    decoder = torch_decoder(load_latent_encoder(base, "cpu").vae, torch.device("cpu"))
    noise = SeedNoise(SEED, (1, *distiller.run.latent_shape))
    served = load_model(model, BackendConfig("torch", "fp32", device="cpu"))
    for steps in (1, 2, 4):
        renoise = torch.stack([noise.of_step(row) for row in range(steps)], dim=1)
        given = renoise if distiller.config.samples_with_noise else None
        latents = distiller.sample(noise.initial(), steps, conditioning, given)
        expected = decoder.decode(latents)[0] / 255.0
        made = generate(served, SamplingParams(PROMPT, SEED, steps, WIDTH, HEIGHT))
        assert psnr_db(made / 255.0, expected) >= min_psnr_db, steps
    assert np.array_equal(picture(model, steps, tmp_path, capsys), made)


def picture(model: Path, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return the picture of `tdm-generate`, uint8 [H, W, 3]."""
    file = tmp_path / "picture.png"
    options = ["--seed", str(SEED), "--steps", str(steps), "--backend", "torch", "--precision", "fp32"]
    options += ["--force", "-o", str(file)]
    assert tdm_generate(["--checkpoint", str(model), PROMPT, *options]) == 0, capsys.readouterr().err
    return np.asarray(Image.open(file).convert("RGB"))


def psnr_db(ours: Any, theirs: Any) -> float:
    return float(-10 * np.log10(max(np.mean((ours - theirs) ** 2), 1e-12)))
