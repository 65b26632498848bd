"""Stock folders that make clips, end to end: folder, `tdm-export`, `tdm-generate`, engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.cli import main as tdm_export
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.manifest import default_artifacts, load_manifest
from tdm_runtime.checkpoint.recipe import RECIPE_FILE, load_recipe
from tdm_runtime.cli import main as tdm_generate
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import ClipDecoder
from tdm_runtime.model.similarity import psnr_db
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.export.test_clip_decoders import small_cogvideox_vae, small_wan_vae
from tests.export.test_families import MIN_PSNR_DB, PRECISION, small_vae
from tests.stock_checkpoints import CASES, save_checkpoint
from tests.tiny_models import tiny_cogvideox, tiny_wan

pytestmark = pytest.mark.slow
STEPS = 2
SIZE = (48, 32)
PARTS: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    "Wan 2.1": lambda: {"vae": small_wan_vae(), "transformer": tiny_wan(num_layers=1)},
    "CogVideoX-2B": lambda: {"vae": small_cogvideox_vae(), "transformer": tiny_cogvideox(num_layers=1)},
    "AnimateDiff-Lightning": lambda: {"vae": small_vae()},
}
"""Case -> smaller parts, which are exported in less time."""
PROGRAMS = {
    "Wan 2.1": ["denoiser", "decoder_first_1", "decoder_later_1"],
    "CogVideoX-2B": ["denoiser", "decoder_first_1", "decoder_first_3", "decoder_later_2"],
    "AnimateDiff-Lightning": ["text_encoder", "denoiser", "decoder_first_1"],
}
FRAMES = {"Wan 2.1": 9, "CogVideoX-2B": 17, "AnimateDiff-Lightning": 3}
"""Case -> frames of a clip that every program decodes a part of."""


@pytest.fixture(scope="module", params=PARTS)
def case(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(case: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock folder of a small native size, exported."""
    small = replace(CASES[case], parts=PARTS[case], steps=(STEPS,))
    path = save_checkpoint(small, tmp_path_factory.mktemp("clips") / "folder")
    recipe = replace(load_recipe(path), native_sizes=(SIZE,))
    (path / RECIPE_FILE).write_text(recipe.to_json(), encoding="utf-8")
    prompts = path.parent / "prompts.txt"
    prompts.write_text("a red fox\n", encoding="utf-8")
    arguments = ["--backend", "openvino", "--precision", PRECISION, "--prompts", str(prompts)]
    assert tdm_export([str(path), *arguments]) == 0
    return path


@pytest.mark.parametrize("frames", [1, 0])
def test_tdm_generate_makes_the_clip_of_torch(folder: Path, case: str, tmp_path: Path, frames: int) -> None:
    def clip(backend: str) -> Any:
        file = tmp_path / f"{backend}.npy"
        given = ["--checkpoint", str(folder), "--backend", backend, "--frames", str(frames or FRAMES[case])]
        assert tdm_generate(["Two cats on a hill", *given, "--seed", "3", "-o", str(file)]) == 0
        return np.load(file)

    expected = clip("torch")
    assert expected.shape[1:] == (SIZE[1], SIZE[0], 3) and expected.std() > 5
    for backend in ("openvino", "auto"):
        assert psnr_db(clip(backend), expected) >= MIN_PSNR_DB[PRECISION]


def test_every_program_is_built_and_measured(folder: Path, case: str) -> None:
    checkpoint = open_checkpoint(folder)
    (build,) = load_manifest(default_artifacts(checkpoint), checkpoint).builds
    assert list(build.components) == PROGRAMS[case]
    assert list(build.pictures) == [STEPS] and build.pictures[STEPS].psnr_db >= MIN_PSNR_DB[PRECISION]
    for component in build.components.values():
        assert component.parity is not None and component.parity.relative_l2 < 0.05


def test_the_engine_decodes_part_by_part(folder: Path, case: str) -> None:
    model = load_model(folder, BackendConfig("openvino"))
    decoder = model.decoders["full"]
    assert isinstance(decoder, ClipDecoder)
    params = SamplingParams("a fox runs", 1, STEPS, *SIZE, frames=FRAMES[case])
    parts = replace(model, decoders={"full": ClipDecoder(decoder.backend, decoder.backend, model.geometry, 1)})  # type: ignore[arg-type]
    engine = DiffusionEngine(parts)
    clip = engine.submit(params)
    calls = 0
    while engine.num_live:
        engine.step()
        calls += 1
    made = clip.result(0)
    latent_frames = model.latent_shape(params)[1]
    assert calls == 1 + STEPS + len(model.family.decoder.parts(latent_frames))  # type: ignore[attr-defined]
    assert np.array_equal(made.pixels, generate(model, params))
    engine.close()
