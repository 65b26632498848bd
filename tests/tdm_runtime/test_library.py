"""The public library, `import tdm_runtime`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import tdm_runtime
from tdm_runtime import DiffusionEngine, SamplingParams, generate, load_model

README = Path(__file__).resolve().parents[2] / "README.md"


def test_every_name_of_the_library_can_be_imported() -> None:
    assert {name for name in tdm_runtime.__all__ if getattr(tdm_runtime, name, None) is None} == set()


def test_importing_the_library_loads_neither_torch_nor_diffusers() -> None:
    code = "import sys, tdm_runtime; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_readmes_snippet_writes_a_picture(tmp_path: Path) -> None:
    snippets = README.read_text(encoding="utf-8").split("```python\n")
    (snippet,) = (text.partition("```")[0] for text in snippets if text.startswith("from PIL"))
    subprocess.run([sys.executable, "-c", snippet], check=True, cwd=tmp_path)
    with Image.open(tmp_path / "heart.png") as picture:
        assert picture.size == (64, 64)
        assert len(np.unique(np.asarray(picture))) > 50


def test_the_engine_makes_the_picture_that_generate_makes(tiny_checkpoint: Path) -> None:
    model = load_model(str(tiny_checkpoint))
    params = SamplingParams("a fox", seed=3, num_inference_steps=2, width=16, height=16)
    with DiffusionEngine(model) as engine:
        picture = engine.submit(params).result(60)
    assert np.array_equal(picture.pixels, generate(model, params))
