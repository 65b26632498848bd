"""An IR file computes the same as its ONNX file, in half the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.errors import ExportError
from export.openvino_build import MIN_HALVED_ELEMENTS, write_int8_ir, write_ir
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.manifest import load_manifest

Array = NDArray[Any]
SIDE = 48
"""Side of the square weights below, which have more elements than `MIN_HALVED_ELEMENTS`."""


def halves(seed: int, *shape: int) -> Array:
    """Return float32 values that float16 represents exactly."""
    drawn: Array = np.random.default_rng(seed).standard_normal(shape).astype(np.float16).astype(np.float32)
    return drawn


def write_onnx(file: Path, weight: Array, bias: Array, operator: str = "MatMul") -> Path:
    """Write a model of output = input weight + bias."""
    nodes = [
        helper.make_node(operator, ["input", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", SIDE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", SIDE])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), file)
    return file


def computed(file: Path, *inputs: Array) -> Array:
    """Run a model in float32 and return its output."""
    core = openvino.Core()
    program = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    output: Array = program(list(inputs))[0]
    return output


def constants(file: Path) -> dict[int, str]:
    """Return number of elements -> type, for the constants of an IR with more than one element."""
    found = [node for node in openvino.Core().read_model(file).get_ops() if node.get_type_name() == "Constant"]
    return {node.data.size: node.get_element_type().get_type_name() for node in found if node.data.size > 1}


def test_weights_exact_in_float16_are_halved_and_outputs_stay_bit_equal(tmp_path: Path) -> None:
    source = write_onnx(tmp_path / "linear.onnx", halves(0, SIDE, SIDE), halves(1, SIDE))
    write_ir(source, tmp_path / "linear.xml")
    assert constants(tmp_path / "linear.xml")[SIDE * SIDE] == "f16"
    assert (tmp_path / "linear.bin").stat().st_size < 0.6 * 4 * SIDE * SIDE
    given = np.random.default_rng(2).standard_normal((3, SIDE)).astype(np.float32)
    np.testing.assert_array_equal(computed(tmp_path / "linear.xml", given), computed(source, given))


def test_small_constants_stay_float32(tmp_path: Path) -> None:
    """0.1 is not exact in float16, so rounding it would change the output."""
    bias = np.full(SIDE, 0.1, dtype=np.float32)
    assert SIDE < MIN_HALVED_ELEMENTS
    source = write_onnx(tmp_path / "linear.onnx", np.zeros((SIDE, SIDE), np.float32), bias)
    write_ir(source, tmp_path / "linear.xml")
    assert constants(tmp_path / "linear.xml")[SIDE] == "f32"
    np.testing.assert_array_equal(computed(tmp_path / "linear.xml", np.ones((1, SIDE), np.float32)), bias[None])


def test_weights_beyond_float16_stay_float32(tmp_path: Path) -> None:
    weight = halves(0, SIDE, SIDE)
    weight[3, 5] = 1e6  # infinite in float16
    source = write_onnx(tmp_path / "linear.onnx", weight, halves(1, SIDE))
    write_ir(source, tmp_path / "linear.xml")
    assert constants(tmp_path / "linear.xml")[SIDE * SIDE] == "f32"
    given = np.ones((2, SIDE), dtype=np.float32)
    np.testing.assert_array_equal(computed(tmp_path / "linear.xml", given), computed(source, given))


def test_every_component_of_a_float16_checkpoint_stays_bit_equal(tiny_checkpoint: Path, tiny_artifacts: Path) -> None:
    interfaces = load_manifest(tiny_artifacts, open_checkpoint(tiny_checkpoint)).interfaces
    for name, interface in interfaces.items():
        sizes = {"batch": 2, "height": 8, "width": 12}
        inputs = [tensor.numpy() for tensor in interface.random_inputs(sizes, torch.Generator().manual_seed(0))]
        np.testing.assert_array_equal(
            computed(tiny_artifacts / f"{name}.xml", *inputs), computed(tiny_artifacts / f"{name}.onnx", *inputs)
        )


def test_int8_halves_the_float16_denoiser(artifacts: Path) -> None:
    """float16 halves the ONNX file and int8 nearly halves it again; small constants add little."""
    onnx_bytes, half_bytes, int8_bytes = (
        (artifacts / name).stat().st_size for name in ("denoiser.onnx.data", "denoiser.bin", "denoiser.int8.bin")
    )
    assert half_bytes < 0.52 * onnx_bytes
    assert int8_bytes < 0.6 * half_bytes


def test_int8_leaves_out_layers_on_latents_and_timesteps(artifacts: Path) -> None:
    """These are the first and the last convolution, and the embeddings of timestep and K."""
    model = openvino.Core().read_model(artifacts / "denoiser.int8.xml")
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for node in model.get_ops():
        if node.get_type_name() in ("Convolution", "MatMul"):
            kinds[_is_quantised(node)].add(_layer(node))
    assert kinds[True] >= {"Convolution of pictures", "MatMul of tokens"}
    assert kinds[False] >= {"Convolution of latents", "MatMul of the timestep"}
    assert not kinds[True] & {"Convolution of latents", "MatMul of the timestep"}


def _is_quantised(node: Any) -> bool:
    """Return whether the weight of a node is int8."""
    source = node.input_value(1).get_node()
    while source.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape", "Transpose"):
        source = source.input_value(0).get_node()
    return bool(source.get_element_type().get_type_name() in ("i8", "u8"))


def _layer(node: Any) -> str:
    if node.get_type_name() == "MatMul":
        is_of_timestep = node.get_output_partial_shape(0).rank.get_length() == 2
        return f"MatMul of {'the timestep' if is_of_timestep else 'tokens'}"
    sides = (node.get_input_partial_shape(0)[1], node.get_output_partial_shape(0)[1])
    touches_latents = 4 in [side.get_length() for side in sides if side.is_static]
    return f"Convolution of {'latents' if touches_latents else 'pictures'}"


def test_a_file_that_is_not_onnx_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"not a model")
    for name in ("garbage.onnx", "absent.onnx"):
        with pytest.raises(ExportError, match=f"cannot read {name}") as caught:
            write_ir(tmp_path / name, tmp_path / "model.xml")
        assert "\n" not in str(caught.value)
        with pytest.raises(ExportError, match=f"cannot read {name}"):
            write_int8_ir(tmp_path / name, tmp_path / "model.xml", [{"latents": np.zeros((1, 4), np.float32)}], 4)
    assert not (tmp_path / "model.xml").exists()


def test_an_operator_without_a_translation_is_named(tmp_path: Path) -> None:
    source = write_onnx(tmp_path / "strange.onnx", halves(0, SIDE, SIDE), halves(1, SIDE), operator="Entangle")
    with pytest.raises(ExportError, match="Entangle"):
        write_ir(source, tmp_path / "model.xml")
