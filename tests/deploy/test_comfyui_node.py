"""The ComfyUI node: what ComfyUI asks of a node, and its pictures from a real server."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import RunningServer

NODE_FILE = Path(__file__).parents[2] / "deploy" / "comfyui" / "tdm_serve.py"
TYPES = {"STRING", "INT", "FLOAT", "IMAGE", "MASK"}


@pytest.fixture(scope="module")
def node_class() -> Any:
    """The class of the node, from its file alone, as ComfyUI loads files of `custom_nodes`."""
    spec = importlib.util.spec_from_file_location("custom_node", NODE_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (name,) = module.NODE_CLASS_MAPPINGS
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == {name}
    return module.NODE_CLASS_MAPPINGS[name]


def test_its_inputs_are_those_of_its_function(node_class: Any) -> None:
    inputs = node_class.INPUT_TYPES()
    declared = {**inputs["required"], **inputs["optional"]}
    assert {kind[0] for kind in declared.values()} <= TYPES
    parameters = dict(inspect.signature(getattr(node_class, node_class.FUNCTION)).parameters)
    del parameters["self"]
    assert set(parameters) == set(declared)
    needed = {name for name, one in parameters.items() if one.default is inspect.Parameter.empty}
    assert needed <= set(inputs["required"]), "ComfyUI leaves out optional inputs that are not connected"
    assert node_class.RETURN_TYPES == ("IMAGE",) and isinstance(node_class.CATEGORY, str)


def test_it_makes_pictures_and_changes_them_within_a_mask(node_class: Any, tdm_server: RunningServer) -> None:
    node, server = node_class(), tdm_server.url
    (made,) = node.make("a rocket on a blue background", 3, "4", n=2, server=f"{server}/")
    assert made.shape == (2, 64, 64, 3) and made.dtype == torch.float32 and 0 <= made.min() < made.max() <= 1
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    (changed,) = node.make("a red apple", 3, "auto", image=made, mask=mask, strength=1.0, size="64x64", server=server)
    assert torch.equal(changed[0, :, :28], made[0, :, :28]) and not torch.equal(changed[0, :, 32:], made[0, :, 32:])


def test_a_refusal_has_the_servers_reason(node_class: Any, tdm_server: RunningServer) -> None:
    with pytest.raises(RuntimeError, match="num_inference_steps is 9; tdm-emoji serves 1, 2, 3, 4"):
        node_class().make("a fox", 0, "9", server=tdm_server.url)
    with pytest.raises(RuntimeError, match=r"cannot be reached: .*; start tdm-serve, or change `server`"):
        node_class().make("a fox", 0, server="http://127.0.0.1:9")
