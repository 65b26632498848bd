"""Every registered family is complete, has tiny models in the tests and a row in the docs."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from torch import nn

from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import FAMILIES, current_name, decoder_for, denoiser_for, family_of_model, family_of_pipeline
from tests.tiny_models import STOCK_CALLS, TINY_MODELS
from tests.tiny_pipelines import SCHEDULERS, TEXT_PARTS, build_vae

DOCS = Path(__file__).parents[3] / "docs" / "checkpoints.md"


def test_every_family_has_its_tiny_factories_and_nothing_else_has() -> None:
    assert set(TINY_MODELS) == set(STOCK_CALLS) == set(SCHEDULERS) == set(TEXT_PARTS) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_row_in_the_docs(name: str) -> None:
    family = FAMILIES[name]
    (row,) = (line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |"))
    for word in (*family.pipelines, family.denoiser_class, family.vae_classes[0]):
        assert f"`{word}`" in row


@pytest.mark.parametrize("name", FAMILIES)
def test_every_class_that_a_family_names_exists_in_diffusers(name: str) -> None:
    family = FAMILIES[name]
    for word in (*family.pipelines, family.denoiser_class, *family.vae_classes):
        assert hasattr(diffusers, word)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_found_by_its_pipeline_and_by_its_model(name: str) -> None:
    family = FAMILIES[name]
    assert family_of_model(TINY_MODELS[name]()) is family
    assert [family_of_pipeline(pipeline) for pipeline in family.pipelines] == [family] * len(family.pipelines)
    # AnimateDiff's VAE is that of pictures, which decodes its frames
    assert name == "animatediff" or type(decoder_for(build_vae(name))) is family.decoder


def test_an_unknown_pipeline_model_or_vae_belongs_to_no_family() -> None:
    assert family_of_pipeline("AllegroPipeline") is None
    with pytest.raises(CheckpointError, match="the denoiser is a Linear; this version knows UNet2DConditionModel, Pix"):
        denoiser_for(nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="the VAE is a Linear; this version knows AutoencoderKL, AutoencoderTiny"):
        decoder_for(nn.Linear(1, 1))


def test_former_names_are_still_known() -> None:
    assert current_name("sd") == "stable_diffusion"
    assert [current_name(name) for name in (*FAMILIES, "allegro")] == [*FAMILIES, "allegro"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_equal_to_its_copy_in_another_process_and_to_no_other(name: str) -> None:
    copy = pickle.loads(pickle.dumps(FAMILIES[name]))
    assert [other for other in FAMILIES if FAMILIES[other] == copy] == [name]


def test_the_registry_imports_neither_diffusers_nor_transformers() -> None:
    """A start with compiled programs needs neither, and importing them takes most of its time."""
    modules = "tdm_runtime.families, tdm_runtime.checkpoint.folder, tdm_runtime.model.load"
    code = f"import sys, {modules}; print(sorted({{'diffusers', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
