"""PyTorch backends: eager, which is the reference, and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdm_runtime.backends.buckets import in_buckets
from tdm_runtime.backends.interface import Interface

MAX_PROGRAMS = 128
"""Number of shapes compiled for one component. Beyond its own limit of 8, torch runs eagerly and does not say so."""


class TorchBackend:
    """Calls a module without gradients."""

    is_batch_invariant = False

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        interface: Interface | None = None,
    ) -> None:
        """
        Args:
            module: Moved to the device and converted, in place.
            dtype: of the weights and of latents and embeddings; timesteps stay float32.
            threads: CPU threads of a call; None leaves the calling thread's setting alone.
            interface: what the backend is called with; needed where the module's forward has other arguments in
                between, as SDXL's and PixArt's. None passes all tensors as they come.
        """
        self.device = device
        self._dtype = dtype
        self._threads = threads
        self._names = interface.input_names if interface else ()
        self._most_usual = len(interface.inputs) if interface else None
        self._kept_float32 = interface.kept_float32 if interface else {"timesteps"}  # bfloat16 rounds 999 to 1000
        module = module.to(device=device, dtype=dtype).eval()
        # In 16 bits channels last is several times faster than the default. 5-D weights of videos have no such order.
        if dtype != torch.float32 and all(weight.ndim < 5 for weight in module.parameters()):
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module = module
        self._module: Callable[..., Tensor] = module

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        given = self._cast(inputs)
        if self._most_usual is not None and len(given) > self._most_usual:
            return self._called(self.module, given)  # references have any size: a program for each would take minutes
        return self._run(given)

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        return self._called(self._module, inputs)

    def _called(self, module: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        names = self._names[: len(inputs)]
        output = module(**dict(zip(names, inputs, strict=True))) if names else module(*inputs)
        return output.float() if output.is_floating_point() else output

    def _cast(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        names = self._names[: len(inputs)] or [
            "timesteps" if tensor is not None and tensor.ndim == 1 else "" for tensor in inputs
        ]
        return [
            tensor.to(self._dtype)
            if tensor is not None and tensor.is_floating_point() and name not in self._kept_float32
            else tensor  # None stays None: a denoiser that is called without K
            for name, tensor in zip(names, inputs, strict=True)
        ]


class CompiledTorchBackend(TorchBackend):
    """`torch.compile`, one program for each bucket. Starting takes minutes."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        interface: Interface | None = None,
    ) -> None:
        """As `TorchBackend`."""
        super().__init__(module, device, dtype, threads, interface)
        # torch 2.13 has these arguments, its type stubs do not: a recompile limit of this backend alone.
        limit: dict[str, Any] = {"recompile_limit": MAX_PROGRAMS, "isolate_recompiles": True}
        self._module = torch.compile(self._module, dynamic=False, **limit)
        self._max_padding = 0.5 if device.type == "cuda" else 0.125

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        return in_buckets(super()._run, inputs, self._max_padding)
