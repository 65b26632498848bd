"""What training writes, serving opens: its picture is the trainer's own, for every family and kind of student.

The trainer samples the averaged student of a run with the noise of a seed and decodes with its own VAE; `tdm-generate`
opens model/ of the run. Both files hold whole levels, so equal pictures read 59 dB or more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from serving.command.checks import check_models
from serving.config import ModelSource, ServerConfig
from tdm_runtime.cli import main as tdm_generate
from tdm_runtime.families import FAMILIES
from tdm_runtime.model.decoder import torch_decoder
from tdm_runtime.sampling.noise import SeedNoise
from tests.training.tiny_runs import LORA, NOISE, UNIFY
from training.config import DistillConfig
from training.pretrained.base_model import encode_prompts
from training.pretrained.latents import encode_latents, load_latent_encoder
from training.pretrained.presets import as_dmd2, as_lcm
from training.pretrained.prompts import embed_prompts
from training.pretrained.train import build_backbone_distiller, train_backbone
from training.run.distill import Distiller
from training.run.loop import run_loop

PROMPT, SEED, MIN_PSNR_DB = "a red fox", 7, 50.0
WIDTH, HEIGHT = 96, 64
TINY: dict[str, Any] = {"steps": 2, "batch_size": 2, "width": WIDTH, "height": HEIGHT, "step_counts": (1, 2, 4)}
LEARNS_FAST: dict[str, Any] = {"student_learning_rate": 1e-2, "condition_lr_scale": 100.0, "ema_decay": 0.0}
"""The pictures of two iterations must differ from the base's, and for every K."""
WITHOUT_K: dict[str, Any] = {"step_condition_for": "none"}
KINDS = {
    "whole": replace(UNIFY, **TINY, **LEARNS_FAST),
    "whole, without K": replace(UNIFY, **TINY, **LEARNS_FAST, **WITHOUT_K),
    "LoRA": replace(LORA, **TINY, **LEARNS_FAST),
    "LoRA, without K": replace(LORA, **TINY, **LEARNS_FAST, **WITHOUT_K),
}
EXTRA = {
    "whole, DPM-Solver++": replace(KINDS["whole"], solver="dpmsolver++"),
    "LoRA, timesteps of its own": replace(
        KINDS["LoRA"], timesteps={2: (999.0, 399.0), 4: (999.0, 856.0, 665.0, 399.0)}
    ),
    "whole, DMD2": replace(as_dmd2(KINDS["whole"]), fake_updates=1),
    "whole, LCM": as_lcm(KINDS["whole"]),
}
PICTURES = [family for family in NOISE if not FAMILIES[family].makes_clips]
CASES = [(family, kind) for family in PICTURES for kind in KINDS]
CASES += [("stable_diffusion", kind) for kind in EXTRA]
CASES += [("sd3", kind) for kind in EXTRA if "LCM" not in kind]


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


@pytest.mark.parametrize(("family", "kind"), CASES)
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
    served = {steps: picture(model, steps, tmp_path, capsys) for steps in (1, 2, 4)}
    for steps, found in served.items():
        assert psnr_db(found, trainers_picture(distiller, base, steps)) >= MIN_PSNR_DB, steps
    (checked,) = check_models(ServerConfig(models=(ModelSource(model),)))
    recipe = checked.recipe
    assert recipe.name == "run" and recipe.native_sizes == ((WIDTH, HEIGHT),)
    assert recipe.size_rule is not None and recipe.size_rule.allows(HEIGHT, WIDTH)
    assert set(recipe.files) == {str(file.relative_to(model)) for file in model.rglob("*.safetensors*")}


def trained(run: Path, base: Path, embeddings: Path, config: DistillConfig) -> Distiller:
    """Return the distillation of a finished run, as a resume restores it."""
    distiller = build_backbone_distiller(base, embeddings, config)
    run_loop(run, "tdm", config, distiller.trainable(), distiller.train_step)
    return distiller


def trainers_picture(distiller: Distiller, base: Path, steps: int) -> Any:
    """Return the trainer's picture of a seed as floats in [0, 1]."""
    noise = SeedNoise(SEED, (1, *distiller.run.latent_shape))
    (conditioning,) = encode_prompts(base, [PROMPT], batch_size=1, width=WIDTH, height=HEIGHT)
    renoise = torch.stack([noise.of_step(row) for row in range(steps)], dim=1)
    is_noisy = distiller.config.samples_with_noise
    latents = distiller.sample(noise.initial(), steps, conditioning, renoise if is_noisy else None)
    return torch_decoder(load_latent_encoder(base, "cpu").vae, torch.device("cpu")).decode(latents)[0] / 255.0


def picture(model: Path, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return the picture of `tdm-generate` as floats in [0, 1]."""
    file = tmp_path / "picture.png"
    options = ["--seed", str(SEED), "--steps", str(steps), "--backend", "torch", "--precision", "fp32", "-o", str(file)]
    assert tdm_generate(["--checkpoint", str(model), PROMPT, *options]) == 0, capsys.readouterr().err
    return np.asarray(Image.open(file).convert("RGB")) / 255.0


def psnr_db(ours: Any, theirs: Any) -> float:
    return float(-10 * np.log10(max(np.mean((ours - theirs) ** 2), 1e-12)))
