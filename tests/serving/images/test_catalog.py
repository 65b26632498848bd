"""Models by name, and LoRAs that are added, changed and removed while pictures are made."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from serving.command.arguments import parse_arguments
from serving.config import LoraSource, ModelSource, ServerConfig
from serving.errors import APIError
from serving.images import catalog
from serving.images.local import ImageService
from serving.schema.answers import ImageAnswer
from serving.schema.image_request import order_from_fields
from serving.schema.order import ImageOrder
from serving.telemetry.metrics import ServerMetrics
from tdm_runtime.checkpoint.lora.lora_file import LoraFile, read_lora
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import Family
from tdm_runtime.model.artifacts import BackendConfig

TORCH = BackendConfig("torch", threads=1, device="cpu")


def write_lora(file: Path, seed: int) -> Path:
    """A random LoRA of rank 2 on the tiny checkpoint's first convolution."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        "unet.conv_in.lora_A.weight": torch.randn(2, 4, 3, 3, generator=generator),
        "unet.conv_in.lora_B.weight": torch.randn(8, 2, 1, 1, generator=generator),
    }
    save_file(state, file)
    return file


@pytest.fixture(scope="module")
def service(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageService]:
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / "there.safetensors", 1)
    fixed = write_lora(tmp_path_factory.mktemp("fixed") / "lora.safetensors", 2)
    config = ServerConfig(
        models=(ModelSource(tiny_checkpoint, "first"), ModelSource(tiny_checkpoint, "second")),
        loras=(LoraSource("fixed", fixed, 0.5, "second"),),
        lora_folder=folder,
        backend=TORCH,
    )
    running = ImageService(config, ServerMetrics())
    yield running
    running.close()


def make(service: ImageService, model: str | None) -> ImageAnswer:
    return asyncio.run(service.generate(ordered(service, model)))


def ordered(service: ImageService, model: str | None) -> ImageOrder:
    fields = {"prompt": "a red heart", "model": model, "seed": 7, "size": "16x16", "num_inference_steps": 2}
    return order_from_fields(fields, service.recipe).as_pixels()


def pixels(service: ImageService, model: str | None) -> np.ndarray:  # type: ignore[type-arg]
    return np.frombuffer(make(service, model).images[0].content, np.uint8).astype(int)


def look_twice(service: ImageService) -> None:
    """Look twice, so that changed files are loaded."""
    service.catalog.look_again()
    service.catalog.look_again()


def lora_folder(service: ImageService) -> Path:
    assert service.config.lora_folder is not None
    return service.config.lora_folder


def test_every_model_is_listed_and_makes_its_own_pictures(service: ImageService) -> None:
    cards = {card.id: card for card in service.models()}
    assert list(cards)[:4] == ["first", "second", "fixed", "there"]
    assert [cards[name].base for name in ("first", "second", "fixed", "there")] == [None, None, "second", "first"]
    assert make(service, None).model == "first"
    assert np.array_equal(pixels(service, "first"), pixels(service, "second"))  # one checkpoint, two names
    assert np.abs(pixels(service, "fixed") - pixels(service, "first")).max() > 5
    assert np.abs(pixels(service, "fixed") - pixels(service, "there")).max() > 5


def test_the_error_of_an_unknown_model_lists_the_served_ones(service: ImageService) -> None:
    with pytest.raises(
        APIError, match="'dall-e-3' does not exist; this server has first, second, fixed, there"
    ) as caught:
        make(service, "dall-e-3")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


def test_a_tag_in_a_prompt_makes_the_picture_of_the_served_lora(service: ImageService) -> None:
    fields = {"prompt": "a red heart", "seed": 7, "size": "16x16", "num_inference_steps": 2}
    syntax = {"prompt_syntax": "a1111"}
    tagged = order_from_fields(fields | syntax | {"prompt": "a red heart <lora:fixed:0.25>"}, service.recipe)
    named = order_from_fields(fields | {"model": "fixed", "lora_scale": 0.25}, service.recipe)
    one, other = (asyncio.run(service.generate(order.as_pixels())) for order in (tagged, named))
    assert (one.model, one.images[0].content) == ("fixed", other.images[0].content)
    with pytest.raises(APIError, match=r"names the LoRA 'gone': .* this server has first, second, fixed"):
        order_from_fields(fields | syntax | {"prompt": "a red heart <lora:gone>"}, service.recipe)


def test_a_lora_is_added_changed_and_removed_while_the_server_runs(service: ImageService) -> None:
    file = write_lora(lora_folder(service) / "guest.safetensors", 3)
    service.catalog.look_again()
    with pytest.raises(APIError):
        make(service, "guest")  # it may still be being written
    service.catalog.look_again()
    came = pixels(service, "guest")
    (lora_folder(service) / "guest.json").write_text(json.dumps({"scale": 2.0, "base": "second"}))
    look_twice(service)
    stronger = pixels(service, "guest")
    assert np.abs(stronger - came).max() > 5
    write_lora(file, 4)
    look_twice(service)
    assert np.abs(pixels(service, "guest") - stronger).max() > 5
    file.unlink()
    service.catalog.look_again()
    with pytest.raises(APIError):
        make(service, "guest")
    assert "there" in {card.id for card in service.models()}


def test_a_picture_is_finished_with_the_lora_version_that_it_began_with(service: ImageService) -> None:
    file = write_lora(lora_folder(service) / "swapped.safetensors", 5)
    look_twice(service)
    before = pixels(service, "swapped")
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        let_go.wait(30)

    holding = threading.Thread(target=lambda: service.engine.run_on_thread(hold))
    holding.start()
    held.wait(30)
    order = ordered(service, "swapped")
    made: list[ImageAnswer] = []
    making = threading.Thread(target=lambda: made.append(asyncio.run(service.generate(order))))
    making.start()
    while not service.num_live:
        threading.Event().wait(0.01)
    write_lora(file, 6)
    swapping = threading.Thread(target=look_twice, args=(service,))
    swapping.start()
    let_go.set()
    for thread in (holding, making, swapping):
        thread.join(30)
    look_twice(service)
    assert np.array_equal(np.frombuffer(made[0].images[0].content, np.uint8), before)
    assert np.abs(pixels(service, "swapped") - before).max() > 5


def test_invalid_loras_are_logged_and_the_others_still_work(
    service: ImageService, caplog: pytest.LogCaptureFixture
) -> None:
    folder = lora_folder(service)
    (folder / "broken.safetensors").write_bytes(b"no tensors")
    write_lora(folder / "first.safetensors", 7)
    write_lora(folder / "stranger.safetensors", 8)
    (folder / "stranger.json").write_text(json.dumps({"base": "missing"}))
    look_twice(service)
    assert not {"broken", "stranger"} & {card.id for card in service.models()}
    assert service.catalog.find("first").model.base is None
    for said in (
        "broken.safetensors cannot be read",
        "'first' is the name of a checkpoint",
        "'missing'; this server has",
    ):
        assert said in caplog.text
    assert pixels(service, "there").size == 16 * 16 * 3


def test_a_damaged_lora_keeps_none_that_come_after_it_from_being_served(
    service: ImageService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = lora_folder(service)
    write_lora(folder / "a bad one.safetensors", 9)
    write_lora(folder / "later.safetensors", 10)
    write_lora(folder / "._later.safetensors", 11)

    def read(path: Path, family: Family) -> LoraFile:
        if path.name.startswith("a bad"):
            raise ValueError("only one element tensors can be converted to Python scalars")
        return read_lora(path, family)

    monkeypatch.setattr(catalog, "read_lora", read)
    look_twice(service)
    names = {card.id for card in service.models()}
    assert "later" in names and not {"a bad one", "._later"} & names
    assert "LoRA a bad one cannot be served: only one element" in caplog.text


@pytest.mark.parametrize("name", ["style@v2.safetensors", "style@v2.safetensors:0.5", "style@v2.safetensors:0.5@base"])
def test_a_path_may_have_an_at_sign(name: str, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "style@v2.safetensors", 1)
    (lora,) = parse_arguments(["--lora", f"a={tmp_path}/{name}"]).loras
    assert (lora.path, lora.base) == (file, "base" if name.endswith("@base") else None)
    assert lora.scale == (0.5 if ":" in name else 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=/x/b.safetensors", LoraSource("a", Path("/x/b.safetensors"))),
        ("a=/x/b.safetensors:0.5", LoraSource("a", Path("/x/b.safetensors"), 0.5)),
        ("a=/x/b:-1e-1@base", LoraSource("a", Path("/x/b"), -0.1, "base")),
        ("a=/x/b@base", LoraSource("a", Path("/x/b"), 1.0, "base")),
    ],
)
def test_the_command_line_names_loras(text: str, expected: LoraSource) -> None:
    assert parse_arguments(["--lora", text]).loras == (expected,)


@pytest.mark.parametrize(
    "arguments", [["--lora", "a"], ["--lora", "a=/x:1e999"], ["--model", "a"], ["--model", "=x"]], ids=" ".join
)
def test_the_command_line_refuses_incomplete_names(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)


def test_two_models_with_one_name_are_refused(tiny_checkpoint: Path) -> None:
    config = ServerConfig(models=(ModelSource(tiny_checkpoint), ModelSource(tiny_checkpoint)), backend=TORCH)
    with pytest.raises(CheckpointError, match="two models are called 'tdm-emoji'"):
        ImageService(config, ServerMetrics())
