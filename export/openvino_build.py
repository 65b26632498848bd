"""Convert ONNX files to OpenVINO IR, with weights in float16 or int8."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import ExportError
from export.recorder import Call

MIN_HALVED_ELEMENTS = 1024
"""Constants with fewer elements stay float32. Some are frequencies of sinusoids, whose errors grow 1000-fold."""


def write_ir(onnx: Path, file: Path) -> None:
    """Write `file` (.xml) and its float16 weights (.bin); this is exact if the checkpoint has float16 weights.

    Raises:
        ExportError: OpenVINO has no translation for an operator; the message names it.
    """
    _save(_read(onnx), file)


def write_int8_ir(onnx: Path, file: Path, calibration: Sequence[Call], outputs: int) -> None:
    """Write an IR whose matrix products and convolutions are int8, by NNCF's post-training quantisation.

    Args:
        calibration: calls of real pictures, which set the ranges of the activations.
        outputs: number of output channels of the component.

    Raises:
        ExportError: NNCF is not installed, or an operator has no translation.
    """
    os.environ.setdefault("NNCF_CI", "1")  # no usage reports
    try:
        import nncf
    except ImportError:
        raise ExportError("int8 needs nncf; `pip install 'tdm-serve[export]'`") from None

    logging.getLogger("nncf").setLevel(logging.ERROR)  # nncf.set_log_level would change the handlers too
    model = _read(onnx)
    quantised = nncf.quantize(
        model,
        nncf.Dataset(list(calibration)),
        subset_size=len(calibration),
        model_type=nncf.ModelType.TRANSFORMER,  # leaves the products inside attention in float
        ignored_scope=nncf.IgnoredScope(names=_sensitive(model, {calibration[0]["latents"].shape[1], outputs})),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            # Lowest PSNR of a picture at K = 1..4 on the embedded checkpoint, in dB: NNCF's default (.95, none) 25.7,
            # (.5, .5) 29.7, (.3, .5) 34.1 and (.15, .5) 34.7; the last two leave out the sensitive layers.
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=0.15, convolution=0.5)
        ),
    )
    _save(quantised, file)


def _sensitive(model: Any, channels: set[int]) -> list[str]:
    """Return cheap layers that lose much in int8: embeddings of timestep and K, and layers on latents or pixels."""
    names = []
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind == "MatMul" and node.get_output_partial_shape(0).rank.get_length() == 2:
            names.append(node.get_friendly_name())
        if kind == "Convolution":
            sides = (node.get_input_partial_shape(0)[1], node.get_output_partial_shape(0)[1])
            if channels & {side.get_length() for side in sides if side.is_static}:
                names.append(node.get_friendly_name())
    return names


def _save(model: Any, file: Path) -> None:
    import openvino

    _halve_weights(model)
    _keep_angles_exact(model)
    openvino.save_model(model, file, compress_to_fp16=False)


def _keep_angles_exact(model: Any) -> None:
    """Add the sines and cosines as extra outputs, so that the CPU plugin computes them in float32.

    With a bf16 hint the plugin would round timesteps before it embeds them: 999 becomes 1000, and angles keep only
    their first digit. A path to an output without a matrix product stays float32.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() in ("Sin", "Cos"):
            model.add_outputs(node.output(0))


def _read(onnx: Path) -> Any:
    import openvino

    try:
        return openvino.Core().read_model(onnx)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-400:]
        raise ExportError(f"OpenVINO cannot read {onnx.name}: {reason}") from None


def _halve_weights(model: Any) -> None:
    """Store large float32 constants as float16, each followed by a conversion that the plugin folds away."""
    from openvino import op, opset13

    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type().get_type_name() != "f32":
            continue
        if node.data.size < MIN_HALVED_ELEMENTS:
            continue
        with np.errstate(over="ignore"):
            half = node.data.astype(np.float16)
        if not np.isfinite(half).all():
            continue
        constant = op.Constant(half)
        constant.set_friendly_name(node.get_friendly_name() + "/half")
        widened = opset13.convert(constant, "f32")
        widened.set_friendly_name(node.get_friendly_name())
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(widened.output(0))
