"""Convert a float16 ONNX file for TensorRT: products of activations and weights become fp8 (E4M3).

Both factors pass through QuantizeLinear and DequantizeLinear with one scale per tensor, which TensorRT folds into an
fp8 kernel. Convolutions, the products inside attention and the embeddings of timestep and K stay float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from export.recorder import Call, Recorder, make_each
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.model.load import load_with_torch

E4M3_MAX = 448.0


def write_fp8_onnx(onnx_file: Path, file: Path, calls: Sequence[Call]) -> None:
    """Write `file` into the folder of `onnx_file`; it shares the weights of `onnx_file`.

    Args:
        onnx_file: float16 model.
        calls: denoiser calls of real pictures, which set the scales of the activations.
    """
    import onnx

    model = onnx.load(onnx_file, load_external_data=False)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = [
        node
        for node in model.graph.node  # products of token rows; the exporter writes products of single vectors as Gemm
        if node.op_type == "MatMul" and node.input[1] in weights and node.input[0] not in weights
    ]
    greatest = _greatest_activations(onnx_file, [node.input[0] for node in products], calls)
    for node in products:
        stored = onnx.numpy_helper.to_array(weights[node.input[1]], base_dir=str(onnx_file.parent))
        greatest[node.input[1]] = float(np.abs(stored.astype(np.float32)).max())
    rounded = {name: _round_to_fp8(model.graph, name, value) for name, value in greatest.items()}
    for node in products:
        node.input[0], node.input[1] = rounded[node.input[0]], rounded[node.input[1]]
    _sort(model.graph)
    onnx.save(model, file)


def record_calls(checkpoint: Checkpoint, prompts: Sequence[str]) -> list[Call]:
    """Record the denoiser's inputs while torch makes one picture per prompt, cycling through all step counts."""
    model = load_with_torch(checkpoint)
    recorder = Recorder(model.denoiser, model.denoiser_inputs)
    make_each(replace(model, denoiser=recorder), prompts)
    return recorder.calls


def _greatest_activations(onnx_file: Path, names: Sequence[str], calls: Sequence[Call]) -> dict[str, float]:
    """Return the greatest magnitude of each tensor over all calls, computed on the CPU."""
    import onnx
    import onnxruntime

    model = onnx.load(onnx_file, load_external_data=False)
    watched = list(dict.fromkeys(names))
    for index, name in enumerate(watched):
        model.graph.node.append(onnx.helper.make_node("Abs", [name], [f"magnitude_{index}"]))
        model.graph.node.append(
            onnx.helper.make_node("ReduceMax", [f"magnitude_{index}"], [f"greatest_{index}"], keepdims=0)
        )
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"greatest_{index}", onnx.TensorProto.FLOAT16, []))
    probe = onnx_file.with_name(f"{onnx_file.stem}.probe.onnx")
    onnx.save(model, probe)
    try:
        session = onnxruntime.InferenceSession(probe, providers=["CPUExecutionProvider"])
    finally:
        probe.unlink()
    outputs = [f"greatest_{index}" for index in range(len(watched))]
    found = np.array([session.run(outputs, dict(call)) for call in calls], dtype=np.float32)
    return dict(zip(watched, found.max(axis=0).tolist(), strict=True))


def _round_to_fp8(graph: Any, name: str, greatest: float) -> str:
    """Append nodes that round a float16 tensor to E4M3. Returns the name of the result."""
    import onnx

    scale, zero, quantised, rounded = (f"{name}.fp8_{part}" for part in ("scale", "zero", "quantised", "rounded"))
    step = np.array(max(greatest / E4M3_MAX, float(np.finfo(np.float16).tiny)), dtype=np.float16)
    graph.initializer.append(onnx.numpy_helper.from_array(step, scale))
    graph.initializer.append(onnx.helper.make_tensor(zero, onnx.TensorProto.FLOAT8E4M3FN, [], [0.0]))
    graph.node.append(onnx.helper.make_node("QuantizeLinear", [name, scale, zero], [quantised]))
    graph.node.append(onnx.helper.make_node("DequantizeLinear", [quantised, scale, zero], [rounded]))
    return rounded


def _sort(graph: Any) -> None:
    """Sort the nodes so that each follows its inputs, as ONNX requires."""
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        assert ready, "the graph has a cycle"
        ordered += ready
        known.update(output for node in ready for output in node.output)
        waiting = [node for node in waiting if not known.issuperset(node.output)]
    del graph.node[:]
    graph.node.extend(ordered)
