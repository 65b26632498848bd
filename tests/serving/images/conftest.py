"""One server with stock folders of several families."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from tdm_runtime.checkpoint.recipe import RECIPE_FILE
from tdm_runtime.recipe_cli import main as tdm_recipe
from tests.lora_files import draw_weights, write_diffusers
from tests.serving.conftest import RunningServer, start_server
from tests.stock_checkpoints import CASES, save_checkpoint, stock_pipeline


@dataclass(frozen=True)
class Served:
    """The server, and the folder of each of its models."""

    running: RunningServer
    folders: dict[str, Path]


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An LCM without a recipe, SANA, FLUX.2, a folder that is only SDXL's recipe with a LoRA, and a LoRA on SDXL.

    Wan and AnimateDiff make clips.
    """
    root = tmp_path_factory.mktemp("families")
    lcm, sana, flux2, sdxl, wan, animatediff = (
        save_checkpoint(CASES[name], root / name.split()[0])
        for name in (
            "SD 1.5, LCM",
            "SANA-Sprint",
            "FLUX.2 klein",
            "SDXL-Lightning",
            "Wan 2.1",
            "AnimateDiff-Lightning",
        )
    )
    (lcm / RECIPE_FILE).unlink()
    frames = {"default": 9, "step": 4, "max_frames": 33}
    for folder, quick in ((flux2, {"native_sizes": [[64, 64]]}), (wan, {"native_sizes": [[64, 32]], "frames": frames})):
        recipe = json.loads((folder / RECIPE_FILE).read_text()) | quick  # the published sizes take seconds
        (folder / RECIPE_FILE).write_text(json.dumps(recipe))
    pipeline = stock_pipeline(CASES["SDXL-Lightning"])
    lora = write_diffusers(pipeline, root / "lora", draw_weights(pipeline, "sdxl", 1))
    merged = root / "merged"
    merged.mkdir()
    assert tdm_recipe([str(sdxl), "--steps", "1,2", "--lora", f"{lora}:0.5", "-o", str(merged / RECIPE_FILE)]) == 0
    folders = {"lcm": lcm, "sana": sana, "flux2": flux2, "sdxl": sdxl, "merged": merged}
    folders |= {"wan": wan, "animatediff": animatediff}
    models = [part for name, folder in folders.items() for part in ("--model", f"{name}={folder}")]
    arguments = [*models, "--lora", f"added={lora}:0.5@sdxl", "--backend", "torch", "--max-batch-size", "1"]
    running = start_server(root / "log", *arguments, "--threads", "1")
    yield Served(running, folders)
    assert running.stop() == 0


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.running.url, timeout=60) as client:
        yield client


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    url = f"{served.running.url}/v1"
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, _strict_response_validation=True) as client:
        yield client
