"""A damaged checkpoint is refused before the first request, with the file and the remedy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.checkpoint.folder_files import other_files, weight_files
from tdm_runtime.checkpoint.recipe import RECIPE_FILE
from tdm_runtime.errors import CheckpointError, RecipeError
from tdm_runtime.families import FAMILIES
from tdm_runtime.model.choice import load_model

WEIGHT_FILES = weight_files(DEFAULT_CHECKPOINT, FAMILIES["stable_diffusion"])
OTHER_FILES = other_files(DEFAULT_CHECKPOINT, FAMILIES["stable_diffusion"])


@pytest.fixture
def folder(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint to damage."""
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "checkpoint"))


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def edit_recipe(folder: Path, **values: Any) -> None:
    edit_json(folder / RECIPE_FILE, **values)


def list_hash_of(folder: Path, name: str) -> None:
    """Put the present hash of a weight file into the recipe."""
    files = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))["files"]
    edit_recipe(folder, files={**files, name: file_sha256(folder / name)})


def refusal(folder: Path, refuse: Callable[[Path], object] = open_checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        refuse(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def recipe_refusal(folder: Path, refuse: Callable[[Path], object] = open_checkpoint) -> str:
    with pytest.raises(RecipeError) as caught:
        refuse(folder)
    return str(caught.value)


# -- intact folders --------------------------------------------------------------------------------


def test_an_intact_folder_loads(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    model = load_model(folder, device="cpu")
    assert model.recipe == checkpoint.recipe
    assert model.digest == checkpoint.digest == file_sha256(folder / RECIPE_FILE)


def test_weights_load_as_float32_in_evaluation_mode(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for module in (checkpoint.load_denoiser(), checkpoint.load_vae(), checkpoint.load_text_model()):
        assert not module.training
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_the_digest_does_not_depend_on_the_path_of_the_folder(folder: Path, checkpoint_folder: Path) -> None:
    assert open_checkpoint(folder).digest == open_checkpoint(checkpoint_folder).digest


def test_the_digest_changes_with_the_recipe(folder: Path) -> None:
    before = open_checkpoint(folder).digest
    edit_recipe(folder, default_steps=1)
    assert open_checkpoint(folder).digest != before


def test_the_digest_changes_with_the_weights(folder: Path) -> None:
    before = open_checkpoint(folder).digest
    name = WEIGHT_FILES[0]
    tensors = load_file(folder / name)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})
    list_hash_of(folder, name)
    assert open_checkpoint(folder).digest != before


def test_extra_files_do_no_harm(folder: Path) -> None:
    (folder / "README.md").write_text("a checkpoint", encoding="utf-8")
    shutil.rmtree(folder / "scheduler")
    open_checkpoint(folder)


# -- files missing, pickled, damaged ---------------------------------------------------------------


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "is not a folder; give the folder" in refusal(tmp_path / "absent")
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is not a folder" in refusal(tmp_path / "file")


@pytest.mark.parametrize("name", [*WEIGHT_FILES, *OTHER_FILES])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    message = refusal(folder)
    assert f"lacks {name}" in message
    assert "restore the folder" in message


def test_all_missing_files_are_named_at_once(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    assert "lacks vae/diffusion_pytorch_model.safetensors, vae/config.json" in refusal(folder)


@pytest.mark.parametrize("pickle", ["diffusion_pytorch_model.bin", "model.pt", "MODEL.PTH"])
@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_a_part_with_pickled_weights_alone_is_refused(folder: Path, name: str, pickle: str) -> None:
    (folder / name).unlink()
    (folder / name).with_name(pickle).write_bytes(b"not even a pickle")
    message = refusal(folder)
    assert f"{(folder / name).parent} holds only pickled weights ({pickle})" in message
    assert "convert them to safetensors" in message


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "safety_checker/pytorch_model.bin", "model.ckpt"])
def test_pickles_beside_the_weights_are_not_read(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"not even a pickle")
    load_model(folder, device="cpu")


@pytest.mark.parametrize("position", [0, 0.5, -1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_one_flipped_bit_is_found(folder: Path, name: str, position: float) -> None:
    content = bytearray((folder / name).read_bytes())
    content[int(position * len(content)) if position > 0 else int(position)] ^= 1
    (folder / name).write_bytes(content)
    message = refusal(folder)
    assert f"{folder / name} is damaged" in message
    assert "restore the file" in message


@pytest.mark.parametrize("size", [0, 1000])
@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_truncated_weights_are_found(folder: Path, name: str, size: int) -> None:
    os.truncate(folder / name, size)
    message = refusal(folder)
    assert f"{folder / name} is damaged" in message
    assert "restore the file" in message


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_truncated_weights_with_a_matching_hash_are_found(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    list_hash_of(folder, name)
    message = refusal(folder)
    assert f"{folder / name} is damaged" in message
    assert "restore the file" in message


# -- the recipe ------------------------------------------------------------------------------------


def test_a_missing_recipe_that_the_scheduler_does_not_imply_is_refused(folder: Path) -> None:
    (folder / RECIPE_FILE).unlink()
    message = recipe_refusal(folder)
    assert f"{RECIPE_FILE} is missing" in message
    assert f"`tdm-recipe {folder} --steps" in message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut short", "not UTF-8", "too deep"]
)
def test_an_unreadable_recipe_is_refused(folder: Path, content: bytes) -> None:
    (folder / RECIPE_FILE).write_bytes(content)
    message = recipe_refusal(folder)
    assert f"{folder / RECIPE_FILE} is not JSON" in message
    assert "restore it" in message


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"solver": "heun"}, "solver is 'heun'; this version honours ddim"),
        ({"format": 2}, "format is 2, this version reads 1; install"),
        ({"guidance": 7.5}, "unknown fields ['guidance']"),
        ({"default_steps": 9}, "default_steps is 9, not one of"),
        ({"step_condition": "telepathy"}, "step_condition is 'telepathy'; this version honours none, timestep_cond"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_recipe_that_cannot_be_honoured_is_refused(folder: Path, values: dict[str, Any], says: str) -> None:
    edit_recipe(folder, **values)
    message = recipe_refusal(folder)
    assert message.startswith(f"{folder / RECIPE_FILE}: ")
    assert says in message


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "unet/../../outside", "..\\outside"])
def test_a_recipe_that_lists_a_file_outside_is_refused(folder: Path, name: str) -> None:
    files = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))["files"]
    edit_recipe(folder, files={**files, name: "0" * 64})
    message = recipe_refusal(folder)
    assert RECIPE_FILE in message
    assert f"{name!r}; a path inside the checkpoint folder is allowed" in message


def test_a_link_to_other_content_outside_the_folder_is_refused(folder: Path) -> None:
    name = WEIGHT_FILES[0]
    (folder / name).unlink()
    (folder / name).symlink_to(DEFAULT_CHECKPOINT / WEIGHT_FILES[1])
    assert f"{folder / name} is damaged or of another checkpoint" in refusal(folder)


def test_weights_without_a_hash_are_refused(folder: Path) -> None:
    files = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))["files"]
    del files[WEIGHT_FILES[1]]
    edit_recipe(folder, files=files)
    message = recipe_refusal(folder)
    assert f"no sha256 for {WEIGHT_FILES[1]}; publish" in message


def test_an_index_without_a_hash_is_refused(folder: Path) -> None:
    """diffusers would read the shards that it names in place of the file that the recipe lists."""
    name = "unet/diffusion_pytorch_model.safetensors.index.json"
    (folder / name).write_text(json.dumps({"weight_map": {"conv_in.bias": "diffusion_pytorch_model.safetensors"}}))
    assert f"no sha256 for {name}" in recipe_refusal(folder)


@pytest.mark.parametrize("shard", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd"])
def test_an_index_that_names_files_elsewhere_is_refused(folder: Path, shard: str) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"conv_in.bias": shard}}))
    assert f"{file} has no weight_map of file names" in refusal(folder)


def test_a_missing_file_that_the_recipe_lists_is_refused(folder: Path) -> None:
    files = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))["files"]
    edit_recipe(folder, files={**files, "unet/more.safetensors": "0" * 64})
    assert f"{folder / 'unet/more.safetensors'} is missing; restore" in refusal(folder)


def test_sizes_that_the_decoder_cannot_make_are_refused(folder: Path) -> None:
    edit_recipe(folder, native_sizes=[[64, 64], [66, 64]])
    message = recipe_refusal(folder, lambda edited: load_model(edited, device="cpu"))
    assert RECIPE_FILE in message
    assert "66x64, but the model makes only multiples of 4 pixels; publish" in message


# -- parts that contradict each other --------------------------------------------------------------


def test_a_step_condition_that_the_unet_contradicts_is_refused(folder: Path) -> None:
    edit_recipe(folder, step_condition="none")
    message = recipe_refusal(folder, lambda edited: open_checkpoint(edited).load_denoiser())
    assert str(folder) in message
    assert "step_condition is 'none' but the unet has an input for K" in message


def test_a_unet_without_the_recipes_step_condition_is_refused(folder: Path) -> None:
    edit_json(folder / "unet/config.json", time_cond_proj_dim=None)
    message = refusal(folder, lambda edited: open_checkpoint(edited).load_denoiser())
    assert "time_embedding.cond_proj.weight" in message
    assert "restore the folder" in message


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("unet/config.json", {"cross_attention_dim": 64}),
        ("vae/config.json", {"layers_per_block": 2}),
        ("text_encoder/config.json", {"num_hidden_layers": 1}),
        ("text_encoder/config.json", {"num_hidden_layers": 3}),
    ],
)
def test_a_config_that_does_not_describe_its_weights_is_refused(
    folder: Path, name: str, values: dict[str, int]
) -> None:
    """The libraries would only warn and fill missing weights with random numbers."""
    edit_json(folder / name, **values)
    message = refusal(folder, lambda edited: load_model(edited, device="cpu"))
    assert str((folder / name).parent) in message
    assert "restore the folder" in message


@pytest.mark.parametrize("name", [name for name in OTHER_FILES if name != "model_index.json"])
def test_a_garbled_config_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{", encoding="utf-8")
    message = refusal(folder)
    assert f"{folder / name} cannot be read" in message
    assert "restore the folder" in message


def test_another_denoiser_class_is_refused(folder: Path) -> None:
    edit_json(folder / "model_index.json", unet=["diffusers", "FluxTransformer2DModel"])
    message = refusal(folder)
    assert f"{folder / 'model_index.json'} says that unet is ['diffusers', 'FluxTransformer2DModel']" in message
    assert "a StableDiffusionPipeline has a UNet2DConditionModel" in message


def test_a_pipeline_of_no_known_family_is_refused(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="KandinskyPipeline")
    message = refusal(folder)
    assert f"{folder} holds a KandinskyPipeline; this version knows" in message and "StableDiffusionPipeline" in message


def test_a_latent_consistency_pipeline_is_served(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    assert open_checkpoint(folder).family.name == "stable_diffusion"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"unet": null}', '{"unet": ["diffusers"]}', "[" * 100_000])
def test_an_unreadable_model_index_is_refused(folder: Path, content: str) -> None:
    (folder / "model_index.json").write_text(content, encoding="utf-8")
    message = refusal(folder)
    assert f"{folder / 'model_index.json'} cannot be read" in message
    assert "restore the folder" in message


def test_a_tokenizer_with_another_length_than_the_text_encoder_is_refused(folder: Path) -> None:
    edit_json(folder / "tokenizer/tokenizer_config.json", model_max_length=16)
    message = refusal(folder, lambda edited: open_checkpoint(edited).load_tokenizer())
    assert "cuts at 16 tokens and the text encoder has 32 positions" in message
    assert "set model_max_length in tokenizer_config.json to 32" in message
