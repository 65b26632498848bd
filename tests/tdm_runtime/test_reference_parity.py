"""The same seed makes the picture of the stock pipeline from reference pictures, for families that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.lora.lora_file import read_lora
from tdm_runtime.checkpoint.recipe import Adapter
from tdm_runtime.cli import main as tdm_generate
from tdm_runtime.edit import Edit, GivenPicture
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.families.call import REFERENCES
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.components import load_programs
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.lora import LoraBase
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.lora_files import draw_weights, write_diffusers
from tests.reference_pictures import CASE, fitted, picture_of, pictures_of, save_attentive
from tests.stock_pictures import HEIGHT, MIN_PSNR_DB, SEED, WIDTH, load_fp32, psnr_db, run_generate, stock_picture

PROMPT = "A red Fox"
SIZES = {
    "the size of the picture": ((WIDTH, HEIGHT),),
    "another size, cropped": ((75, 131),),
    "two sizes": ((WIDTH, HEIGHT), (64, 80)),
    "two of one size": ((80, 80), (80, 80)),
    "more than a megapixel, scaled down": ((1500, 801),),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references") / "klein"


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    return save_attentive(folder)


@pytest.fixture(scope="module")
def klein(stock: Any, folder: Path) -> LoadedModel:
    return load_fp32(folder)


def made(model: LoadedModel, steps: int, pictures: list[Image.Image]) -> Any:
    """Return our picture as floats in [0, 1]."""
    references = fitted(model, pictures)
    return generate(model, SamplingParams(PROMPT, SEED, steps, WIDTH, HEIGHT, references=references)) / 255.0


@pytest.mark.parametrize("name", SIZES)
def test_references_make_the_picture_of_the_stock_pipeline(name: str, stock: Any, klein: LoadedModel) -> None:
    pictures = pictures_of(SIZES[name])
    for steps in (1,) if "megapixel" in name else (1, 4):
        theirs = stock_picture(stock, PROMPT, image=pictures, num_inference_steps=steps, **CASE.options)
        ours = made(klein, steps, pictures)
        assert psnr_db(ours, theirs) >= MIN_PSNR_DB, steps
        others = [[], [picture_of(WIDTH, HEIGHT, seed=9)], *([pictures[::-1]] if len(pictures) > 1 else [])]
        for other in others:
            assert psnr_db(ours, made(klein, steps, other)) < MIN_PSNR_DB - 10, (steps, len(other))


def test_the_command_makes_that_picture_in_the_size_of_the_first_reference_and_verifies_it(
    stock: Any, folder: Path, klein: LoadedModel, tmp_path: Path
) -> None:
    files = [tmp_path / f"{n}.png" for n in range(2)]
    pictures = pictures_of(((97, 70), (64, 64)))
    for file, picture in zip(files, pictures, strict=True):
        picture.save(file)
    given, output = [part for file in files for part in ("--image", str(file))], tmp_path / "made.png"
    assert run_generate(folder, PROMPT, 4, *given, "-o", str(output)) == 0
    theirs = stock_picture(stock, PROMPT, image=pictures, num_inference_steps=4, **CASE.options)
    assert psnr_db(np.asarray(Image.open(output)) / 255.0, theirs) >= MIN_PSNR_DB
    check = ["--checkpoint", str(folder), "--verify", str(output)]
    assert tdm_generate([*check, *given]) == 0
    for wrong in ([], given[:2], [*given[2:], *given[:2]]):
        assert tdm_generate([*check, *wrong]) == 2


def test_an_edit_by_strength_starts_from_the_picture_as_before(
    klein: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    picture, output = picture_of(WIDTH, HEIGHT), tmp_path / "made.png"
    picture.save(tmp_path / "given.png")
    given = ("--image", str(tmp_path / "given.png"))
    assert run_generate(folder, PROMPT, 4, *given, "--strength", "0.5", "-o", str(output)) == 0
    edit = Edit(np.array(picture), 0.5)
    expected = generate(klein, SamplingParams(PROMPT, SEED, 4, WIDTH, HEIGHT, edit=edit))
    assert np.array_equal(np.asarray(Image.open(output)), expected)
    assert run_generate(folder, PROMPT, 4, *given, *given, "--strength", "0.5", "-o", str(output), "--force") == 2


def test_a_lora_that_is_added_at_run_time_reads_references_as_the_merged_one(
    stock: Any, klein: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    file, pictures = write_diffusers(stock, tmp_path, draw_weights(stock, "flux2", 1)), pictures_of(((64, 80),))
    merged = load_model(folder, BackendConfig("torch", "fp32", threads=1, device="cpu"), adapters=[Adapter(str(file))])
    checkpoint = open_checkpoint(folder)
    base = LoraBase(checkpoint, klein, threads=1)
    added = base.attach(base.prepare("added", [(read_lora(file, checkpoint.family), 1.0)]))
    ours = made(added, 2, pictures)
    assert psnr_db(ours, made(merged, 2, pictures)) >= MIN_PSNR_DB
    for model, other in ((added, []), (klein, pictures)):
        assert psnr_db(ours, made(model, 2, other)) < MIN_PSNR_DB - 10


def test_compiled_programs_have_no_input_for_references(klein: LoadedModel, folder: Path) -> None:
    ((_, interface),) = load_programs(open_checkpoint(folder), "denoiser").values()
    assert {*klein.denoiser_inputs} - {*interface.input_names} == {*REFERENCES}


def test_references_that_the_model_does_not_read_are_refused(klein: LoadedModel) -> None:
    rule = klein.recipe.references
    assert rule is not None
    for size in ((63, 200), (64, 513)):
        with pytest.raises(InvalidRequestError, match=f"a reference picture is {size[0]}x{size[1]}; its sides must"):
            rule.fitted(picture_of(*size))
    small, unfitted = fitted(klein, [picture_of(64, 64)]), GivenPicture(np.zeros((70, 64, 3), np.uint8))
    edit = Edit(np.zeros((HEIGHT, WIDTH, 3), np.uint8), 0.5)
    for references, start, message in (
        (small * 5, None, "image holds 5 pictures; at most 4 references are read, send fewer"),
        ((unfitted,), None, "a reference picture is 64x70; its sides must be multiples of 16"),
        (small, edit, "edit and references are both given"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            klein.check(SamplingParams(PROMPT, SEED, 4, WIDTH, HEIGHT, edit=start, references=references))
