"""A checkpoint in memory, ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tdm_runtime.backends import TORCH_DTYPES, Backend, BackendName, Precision
from tdm_runtime.checkpoint import Checkpoint
from tdm_runtime.components import ComponentName, Interface, component_names, load_component
from tdm_runtime.cost_model import Kind
from tdm_runtime.decoder import Decoder
from tdm_runtime.errors import ArtifactError, BackendError, InvalidRequestError, RecipeError
from tdm_runtime.manifest import Build, Manifest, PictureParity, check_build
from tdm_runtime.params import DecoderName, SamplingParams
from tdm_runtime.recipe import RECIPE_FILE, Recipe
from tdm_runtime.text_encoder import TextEncoder


@dataclass(frozen=True)
class LoadedModel:
    """The parts a picture passes through."""

    recipe: Recipe
    digest: str
    """sha256 of the checkpoint's recipe and, through it, of its weights."""
    backend: str
    """What runs it, as "openvino bf16"."""
    text_encoder: TextEncoder
    denoiser: Backend
    decoders: Mapping[DecoderName, Decoder]
    """"full" and, where the checkpoint has one, "tiny"."""
    latent_channels: int
    parity: Mapping[int, PictureParity]
    """Step count K -> how close its pictures come to torch float32; empty where nobody measured."""
    choice: str = ""
    """Why this backend, where it was chosen by measuring."""
    base: str | None = None
    """Of a LoRA: the model whose weights it changes, and whose other parts it shares."""
    adapter: int | None = None
    """Of a LoRA: its number among those that share the denoiser (`AdapterBank`)."""

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.recipe.name

    def kind(self, stage: str, shape: tuple[int, ...] = ()) -> Kind:
        """A call of this model; those of one kind can be one call. LoRAs of one base share theirs."""
        if self.base is None:
            return Kind(stage, shape, self.name)
        return Kind(stage, shape, self.base if stage.startswith("decode") else f"{self.base} with LoRAs")

    def latent_shape(self, params: SamplingParams) -> tuple[int, int, int]:
        """[C, H, W] of a request's latents."""
        downscale = self.decoders["full"].downscale
        return (self.latent_channels, params.height // downscale, params.width // downscale)

    @property
    def preview_decoder(self) -> DecoderName:
        """The cheapest decoder there is."""
        return "tiny" if "tiny" in self.decoders else "full"

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a picture has the same bits alone and in any company."""
        backends = (self.text_encoder.backend, self.denoiser, *(d.backend for d in self.decoders.values()))
        return all(backend.is_batch_invariant for backend in backends)

    def check(self, params: SamplingParams) -> None:
        """Check what a request asks of this model.

        Raises:
            InvalidRequestError: a step count, size or decoder that it does not have.
        """
        params.check_against(self.recipe)
        if params.decoder not in self.decoders:
            raise InvalidRequestError(
                f"decoder is {params.decoder!r}; {self.name} has {', '.join(self.decoders)}", param="decoder"
            )


def adapter_inputs(models: Sequence[LoadedModel]) -> tuple[Tensor, ...]:
    """What the denoiser that some samples' models share reads beside its usual inputs: of LoRAs, their numbers, [B]."""
    numbers = [model.adapter for model in models if model.adapter is not None]
    return (torch.tensor(numbers, device=models[0].denoiser.device),) if numbers else ()


def load_with_torch(
    checkpoint: Checkpoint,
    backend: BackendName = "torch",
    precision: Precision = "fp32",
    device: torch.device | None = None,
    threads: int | None = None,
) -> LoadedModel:
    """Load the checkpoint's own modules.

    Args:
        backend: torch, torch-compiled or cuda-graphs.
        threads: CPU threads of a denoiser call; None leaves the calling thread's setting alone.

    Raises:
        BackendError: this backend does not compute in that precision, or not on that device.
    """
    if precision not in TORCH_DTYPES:
        raise BackendError(f"{backend} does not run {precision}; choose {', '.join(TORCH_DTYPES)}")
    on = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = TORCH_DTYPES[precision]

    def run(name: ComponentName) -> Backend:
        module, interface = load_component(checkpoint, name)
        # The decoder works beside the denoiser. OpenMP workers stop spinning, and a step takes twice as
        # long, once there are more of them than cores, so only the denoiser's thread may have a team.
        return _torch_backend(backend, module, interface, on, dtype, 1 if name.endswith("decoder") else threads)

    return _assembled(checkpoint, f"{backend} {precision}", run, {})


def load_build(
    checkpoint: Checkpoint, manifest: Manifest, build: Build, folder: Path, threads: int | None = None
) -> LoadedModel:
    """Load compiled artifacts; the checkpoint's weights are not read.

    Raises:
        ArtifactError: they are damaged, or built for another machine.
        BackendError: the backend cannot run here.
    """
    check_build(manifest, build, folder, checkpoint)

    def run(name: ComponentName) -> Backend:
        return component_backend(manifest, build, folder, name, threads)

    return _assembled(checkpoint, build.name, run, build.pictures)


def component_backend(
    manifest: Manifest, build: Build, folder: Path, name: ComponentName, threads: int | None = None
) -> Backend:
    """One component of a build, whose files were checked before.

    Raises:
        BackendError: it was not built, or cannot run here.
    """
    if name not in build.components:
        raise ArtifactError(f"{build.name} in {folder} has no {name}; run `tdm-export` again")
    file, interface = folder / build.components[name].file, manifest.interfaces[name]
    match build.backend:
        case "openvino":
            from tdm_runtime.backends.openvino import OpenVINOBackend

            return OpenVINOBackend(file, build.precision, threads)
        case "onnxruntime":
            from tdm_runtime.backends.onnxruntime import OnnxRuntimeBackend

            on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            return OnnxRuntimeBackend(file, interface, on, threads)
        case "tensorrt":
            from tdm_runtime.backends.tensorrt import TensorRTBackend

            return TensorRTBackend(file, interface, torch.device("cuda"))
    raise ArtifactError(f"{folder} has a build for {build.backend!r}, which runs no artifacts")


def _torch_backend(
    name: BackendName,
    module: nn.Module,
    interface: Interface,
    device: torch.device,
    dtype: torch.dtype,
    threads: int | None,
) -> Backend:
    from tdm_runtime.backends.pytorch import CompiledTorchBackend, TorchBackend

    if name == "torch":
        return TorchBackend(module, device, dtype, threads, interface)
    if name == "torch-compiled":
        return CompiledTorchBackend(module, device, dtype, threads, interface)
    from tdm_runtime.backends.cuda_graphs import CudaGraphBackend

    return CudaGraphBackend(module, device, dtype, interface)


def _assembled(
    checkpoint: Checkpoint,
    backend: str,
    run: Callable[[ComponentName], Backend],
    parity: Mapping[int, PictureParity],
) -> LoadedModel:
    names = component_names(checkpoint)
    decoders: dict[DecoderName, Decoder] = {"full": Decoder(run("decoder"), checkpoint.downscale)}
    if "tiny_decoder" in names:
        decoders["tiny"] = Decoder(run("tiny_decoder"), checkpoint.downscale)
    _check_sizes(checkpoint)
    return LoadedModel(
        recipe=checkpoint.recipe,
        digest=checkpoint.digest,
        backend=backend,
        text_encoder=TextEncoder(checkpoint.load_tokenizer(), run("text_encoder")),
        denoiser=run("denoiser"),
        decoders=decoders,
        latent_channels=checkpoint.latent_channels,
        parity=parity,
    )


def _check_sizes(checkpoint: Checkpoint) -> None:
    for width, height in checkpoint.recipe.native_sizes:
        if width % checkpoint.downscale or height % checkpoint.downscale:
            raise RecipeError(
                f"{checkpoint.folder / RECIPE_FILE}: native_sizes has {width}x{height}, and the decoder makes "
                f"multiples of {checkpoint.downscale} pixels only; publish the checkpoint anew with sizes that it "
                "was trained at"
            )
