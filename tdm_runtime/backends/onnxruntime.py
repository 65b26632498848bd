"""ONNX Runtime on the CPU, or on a GPU by its CUDA, TensorRT or TensorRT for RTX execution provider.

Tensors are bound in place: nothing is copied between torch and the session, nor from a GPU to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tdm_runtime.backends import Provider
from tdm_runtime.backends.buckets import in_buckets
from tdm_runtime.backends.cpu import cores
from tdm_runtime.backends.cuda_graphs import cuda_stream, side_stream
from tdm_runtime.backends.interface import Interface
from tdm_runtime.errors import ArtifactError, BackendError

PROVIDERS: Mapping[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
PLUGIN = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
"""Package of nv-tensorrt-rtx, which any ONNX Runtime loads as a plugin. The other providers are built in."""
MAX_PADDING = 0.5
"""Share of a batch that may be padding on a GPU, where cuDNN tries its algorithms for each new shape. 0 on the CPU."""


class OnnxRuntimeBackend:
    """Runs an ONNX file.

    On a GPU the session has its own stream, because ONNX Runtime does not take the default stream. Calls keep the order
    of the caller's stream and do not wait for the GPU.
    """

    is_batch_invariant = False

    def __init__(
        self,
        file: Path,
        interface: Interface,
        device: torch.device,
        threads: int | None = None,
        provider: Provider | None = None,
        *,
        prepack: bool = True,
    ) -> None:
        """
        Args:
            threads: CPU threads of a call; None takes all cores.
            provider: by default cuda on a CUDA device, else cpu.
            prepack: keep a second, faster copy of the weights. Without it a model of billions of weights takes
                half the memory.

        Raises:
            BackendError: the provider is not installed, or the session fell back to another.
            ArtifactError: the file cannot be opened, or is not of this interface.
        """
        self.device = device
        self._interface = interface
        provider = provider or ("cuda" if device.type == "cuda" else "cpu")
        require_provider(provider, device)
        self._stream = cuda_stream(device) if device.type == "cuda" else None
        self._session = _opened(file, _session_options(threads, prepack), provider, self._stream)
        require_used(provider, used_providers(self._session))
        _check_names(file, self._session, interface)
        self._run_options = _run_options()
        self._output_shapes: dict[tuple[tuple[int, ...], ...], list[tuple[int, ...]]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._stream is None:
            return self._run(inputs)[0]
        with side_stream(self._stream):
            return in_buckets(lambda part: self._run(part)[0], inputs, MAX_PADDING)

    def outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return every output; the inputs are one call."""
        if self._stream is None:
            return self._run(inputs)
        with side_stream(self._stream):
            return self._run(inputs)

    def _run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        inputs = [tensor.contiguous() for tensor in inputs]  # the name keeps copies alive for the call
        binding = self._session.io_binding()
        for spec, tensor in zip(self._interface.inputs, inputs, strict=True):
            assert tensor.dtype == getattr(torch, spec.dtype), f"{spec.name} is {tensor.dtype}, not {spec.dtype}"
            binding.bind_input(spec.name, *self._place, np.dtype(spec.dtype), tuple(tensor.shape), tensor.data_ptr())
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        if (output_shapes := self._output_shapes.get(shapes)) is None:
            return self._first_run(binding, shapes)
        outputs = []
        for spec, shape in zip(self._interface.outputs, output_shapes, strict=True):
            output = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self.device)
            binding.bind_output(spec.name, *self._place, np.dtype(spec.dtype), shape, output.data_ptr())
            outputs.append(output)
        self._session.run_with_iobinding(binding, self._run_options)
        return tuple(outputs)

    def _first_run(self, binding: Any, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
        """Run with outputs that ONNX Runtime allocates, and keep their shapes for later calls."""
        for spec in self._interface.outputs:
            binding.bind_output(spec.name, *self._place)
        self._session.run_with_iobinding(binding, self._run_options)
        outputs = tuple(from_dlpack(output).clone() for output in binding.get_outputs())
        self._output_shapes[shapes] = [tuple(output.shape) for output in outputs]
        return outputs

    @property
    def _place(self) -> tuple[str, int]:
        """Device type and index, as bindings take them."""
        return self.device.type, 0 if self._stream is None else self._stream.device.index


def require_provider(provider: Provider, device: torch.device) -> None:
    """Check that ONNX Runtime is installed with a provider, and that the provider runs on the device.

    Raises:
        BackendError: naming what was asked, what there is and the remedy.
    """
    try:
        import onnxruntime
    except ImportError:
        raise BackendError(
            "onnxruntime is not installed; `pip install onnxruntime`, or onnxruntime-gpu beside an NVIDIA GPU"
        ) from None
    there = onnxruntime.get_available_providers()
    if provider == "nv-tensorrt-rtx":
        plugin_devices()
    elif PROVIDERS[provider] not in there:
        raise BackendError(
            f"onnxruntime {onnxruntime.__version__} was asked for {PROVIDERS[provider]} and is built with "
            f"{', '.join(there)}; `pip uninstall onnxruntime` and `pip install onnxruntime-gpu`, or choose "
            "--provider cpu"
        )
    if (provider != "cpu") != (device.type == "cuda"):
        raise BackendError(
            f"{PROVIDERS[provider]} was asked for on the device {device}; "
            f"give a {'CPU' if provider == 'cpu' else 'CUDA'} device or another provider"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"onnxruntime was asked for {device} and torch finds no CUDA device; choose the CPU")


def provider_device(provider: Provider | None) -> torch.device:
    """Return the device that a provider runs on. None stands for cuda if torch finds a GPU, or else for cpu."""
    is_on_gpu = torch.cuda.is_available() if provider is None else provider != "cpu"
    return torch.device("cuda" if is_on_gpu else "cpu")


def plugin_devices() -> list[Any]:
    """Return the GPUs that the plugin of nv-tensorrt-rtx found; its library is loaded once a process.

    Raises:
        BackendError: the plugin is not installed, cannot be loaded or finds no GPU.
    """
    import onnxruntime

    name, remedy = PROVIDERS["nv-tensorrt-rtx"], "or choose --provider cpu"
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError:
        raise BackendError(
            f"onnxruntime was asked for {name} and its plugin is not installed; `pip install {PLUGIN}`, {remedy}"
        ) from None

    def found() -> list[Any]:
        return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]

    if not found():
        try:
            onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:  # its errors share no other base
            raise BackendError(
                f"onnxruntime was asked for {name} and cannot load its plugin ({' '.join(str(error).split())}); it "
                f"needs an NVIDIA driver for CUDA 13, check with `nvidia-smi`, {remedy}"
            ) from None
    if not (devices := found()):
        raise BackendError(
            f"onnxruntime was asked for {name}, which finds no GPU that it runs on; it needs an RTX GPU of compute "
            f"capability 8.0 or later, check with `nvidia-smi`, {remedy}"
        )
    return devices


def used_providers(session: Any) -> list[str]:
    """Return the providers that a session gave operators to, in the order of their priority."""
    assigned = {part.ep_name for part in session.get_provider_graph_assignment_info()}
    return [name for name in session.get_providers() if name in assigned]


def require_used(provider: Provider, used: Sequence[str]) -> None:
    """Check the providers that a session really uses: it falls back silently where a library is missing.

    Raises:
        BackendError: naming what was asked, what the session runs with and the remedy.
    """
    if PROVIDERS[provider] in used:
        return
    fell_back = f"onnxruntime was asked for {PROVIDERS[provider]} and runs with {', '.join(used)}"
    if provider == "nv-tensorrt-rtx":
        raise BackendError(
            f"{fell_back}: the plugin took no operator of this file; choose --provider cuda or --backend tensorrt"
        )
    libraries = {"cpu": "", "cuda": "CUDA and cuDNN", "tensorrt": "TensorRT, CUDA and cuDNN"}[provider]
    raise BackendError(
        f"{fell_back}: {libraries} could not be loaded; install the versions that this onnxruntime-gpu was built for "
        "(`pip install onnxruntime-gpu[cuda,cudnn]`) or choose another backend"
    )


def _session_options(threads: int | None, prepack: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors only: conditions that matter are raised
    # Waiting workers sleep: one that spins takes a core from the decoder, which works beside the denoiser.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # for `used_providers`
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _run_options() -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # streams keep the order
    return options


def _provider_options(provider: Provider, file: Path, stream: torch.cuda.Stream | None) -> list[Any]:
    """Return providers with their options, best first; a node unknown to one goes to the next."""
    if stream is None:
        return [PROVIDERS["cpu"]]
    on = {"device_id": str(stream.device.index), "user_compute_stream": str(stream.cuda_stream)}
    on_cuda = [(PROVIDERS["cuda"], on), PROVIDERS["cpu"]]
    if provider == "cuda":
        return on_cuda
    cache = str(file.parent / "tensorrt_cache")
    caching = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": cache,
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": cache,
    }
    return [(PROVIDERS["tensorrt"], on | caching), *on_cuda]


def _add_plugin(options: Any, file: Path, stream: torch.cuda.Stream) -> None:
    """Add nv-tensorrt-rtx to the options of a session, with the GPU of the stream.

    Raises:
        BackendError: the plugin does not run on that GPU.
    """
    devices, index = plugin_devices(), stream.device.index
    if index >= len(devices):
        raise BackendError(
            f"{PROVIDERS['nv-tensorrt-rtx']} was asked for on cuda:{index} and runs on {len(devices)} GPU(s); choose "
            "another with CUDA_VISIBLE_DEVICES"
        )
    on = {"has_user_compute_stream": "1", "user_compute_stream": str(stream.cuda_stream)}
    cache = {"nv_runtime_cache_path": str(file.parent / "nv_tensorrt_rtx_cache")}
    options.add_provider_for_devices([devices[index]], on | cache)


def _opened(file: Path, options: Any, provider: Provider, stream: torch.cuda.Stream | None) -> Any:
    import onnxruntime

    providers: list[Any] | None = None
    if provider == "nv-tensorrt-rtx":
        assert stream is not None
        _add_plugin(options, file, stream)
    else:
        providers = _provider_options(provider, file, stream)
        if stream is not None:
            onnxruntime.preload_dlls()  # the CUDA and cuDNN that torch brought, or those installed beside it
    try:
        return onnxruntime.InferenceSession(file, options, providers=providers, enable_fallback=False)
    except Exception as error:  # its errors share no other base
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"onnxruntime cannot open {file}: {reason}; run `tdm-export` again, in a precision that it runs"
        ) from None


def _check_names(file: Path, session: Any, interface: Interface) -> None:
    wanted = ([spec.name for spec in interface.inputs], [spec.name for spec in interface.outputs])
    found = ([value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()])
    if (sorted(found[0]), found[1]) != (sorted(wanted[0]), wanted[1]):
        raise ArtifactError(
            f"{file} takes {', '.join(found[0])} and gives {', '.join(found[1])}, the component takes "
            f"{', '.join(wanted[0])} and gives {', '.join(wanted[1])}; run `tdm-export` again"
        )
