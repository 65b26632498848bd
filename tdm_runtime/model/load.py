"""Loading of a checkpoint's components, from its own modules or from a build."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tdm_runtime.backends import TORCH_DTYPES, Backend, BackendName, ManyOutputs, Precision, Provider
from tdm_runtime.backends.interface import ComponentName, Interface
from tdm_runtime.backends.opening import open_file, open_module
from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.checkpoint.manifest import Build, Manifest, PictureParity, check_build
from tdm_runtime.checkpoint.recipe import RECIPE_FILE
from tdm_runtime.checkpoint.stock.text_precision import TextConfig
from tdm_runtime.errors import ArtifactError, BackendError, RecipeError
from tdm_runtime.families.latent_space import ClipDecoderModule, ClipParts, PartKind
from tdm_runtime.families.prompt_weights import MAX_CHUNKS
from tdm_runtime.model.components import component_names, load_component, program_names
from tdm_runtime.model.decoder import CompiledParts, Decoder, decoder_on
from tdm_runtime.model.encoder import PictureEncoder
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.text_encoder import ClipEncoder, PipelineEncoder, TextEncoder
from tdm_runtime.params import DecoderName

CLIP_TOKENS = 77
"""Tokens that CLIP reads, marks included."""
LARGE_PIXELS = 256 * 256
"""Pixels of a picture from which every component is fastest on all cores."""


def load_with_torch(
    checkpoint: Checkpoint,
    backend: BackendName = "torch",
    precision: Precision = "fp32",
    device: torch.device | None = None,
    threads: int | None = None,
    text: TextConfig = TextConfig(),
) -> LoadedModel:
    """Load the checkpoint's own modules with a torch backend.

    Args:
        backend: torch, torch-compiled or cuda-graphs.
        device: None is CUDA if available, or else the CPU.
        threads: CPU threads of a denoiser call; None leaves the calling thread's setting alone.
        text: Precision and device of the text encoders of stock pipelines.

    Raises:
        BackendError: The backend does not support the precision or the device.
    """
    if precision not in TORCH_DTYPES:
        raise BackendError(f"{backend} does not run {precision}; choose {', '.join(TORCH_DTYPES)}")
    on = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = TORCH_DTYPES[precision]
    is_large = makes_large_pictures(checkpoint)
    of_vae = checkpoint.decoder_dtype(dtype)
    vae = checkpoint.load_vae(of_vae)  # encoder and decoder share it

    def run(name: ComponentName) -> tuple[Backend, Interface]:
        of_part = of_vae if name in ("encoder", "decoder") else dtype
        module, interface = load_component(checkpoint, name, of_part, vae)
        if isinstance(module, ClipDecoderModule):  # Python keeps a cache between its calls
            return TorchBackend(ClipParts(module), on, of_part, threads), interface
        # A small decoder gets no OpenMP team. With a second team there are more workers than cores, they stop
        # spinning, and a step takes twice as long.
        team = 1 if threads and name not in ("text_encoder", "denoiser") and not is_large else threads
        return open_module(backend, module, interface, on, of_part, team), interface

    return _assembled(checkpoint, f"{backend} {precision}", run, {}, on, text, threads)


def load_build(
    checkpoint: Checkpoint,
    manifest: Manifest,
    build: Build,
    folder: Path,
    threads: int | None = None,
    text: TextConfig = TextConfig(),
    provider: Provider | None = None,
) -> LoadedModel:
    """Load compiled artifacts. The checkpoint's weights are not read.

    Raises:
        ArtifactError: The artifacts are damaged, or built for another machine.
        BackendError: The backend cannot run here.
    """
    check_build(manifest, build, folder, checkpoint)

    def run(name: ComponentName) -> tuple[Backend, Interface]:
        programs = {
            program: component_backend(manifest, build, folder, program, threads, provider)
            for program in program_names(checkpoint, name)
        }
        interface = manifest.interfaces[next(iter(programs))]
        decoder = checkpoint.family.decoder
        if name.endswith("decoder") and issubclass(decoder, ClipDecoderModule):
            return CompiledParts(decoder, _by_part(decoder, programs.values(), build)), interface
        return programs[name], interface

    return _assembled(checkpoint, build.name, run, build.pictures, torch.device("cpu"), text, threads)


def component_backend(
    manifest: Manifest,
    build: Build,
    folder: Path,
    name: str,
    threads: int | None = None,
    provider: Provider | None = None,
) -> Backend:
    """Load one program of a build whose files were checked before.

    Args:
        name: see `program_names`.
        provider: see `open_file`.

    Raises:
        BackendError: The program was not built, or cannot run here.
    """
    if name not in build.components:
        raise ArtifactError(f"{build.name} in {folder} has no {name}; run `tdm-export` again")
    file, interface = folder / build.components[name].file, manifest.interfaces[name]
    return open_file(build.backend, file, interface, build.precision, threads, provider)


def _by_part(
    decoder: type[ClipDecoderModule], backends: Iterable[Backend], build: Build
) -> Mapping[PartKind, ManyOutputs]:
    """Return the programs of a decoder of clips, which are in the order of its kinds."""
    programs = {}
    for kind, backend in zip(decoder.kinds, backends, strict=True):
        if not isinstance(backend, ManyOutputs):
            raise ArtifactError(f"{build.backend} does not run decoders of clips; choose another backend")
        programs[kind] = backend
    return programs


def _assembled(
    checkpoint: Checkpoint,
    backend: str,
    run: Callable[[ComponentName], tuple[Backend, Interface]],
    parity: Mapping[int, PictureParity],
    device: torch.device,
    text: TextConfig,
    threads: int | None,
) -> LoadedModel:
    names = component_names(checkpoint)
    decoders: dict[DecoderName, Decoder] = {"full": decoder_on(run("decoder")[0], checkpoint.geometry)}
    if "tiny_decoder" in names:
        decoders["tiny"] = decoder_on(run("tiny_decoder")[0], checkpoint.geometry)
    encoder = PictureEncoder(run("encoder")[0]) if "encoder" in names else None
    _check_sizes(checkpoint)
    denoiser, interface = run("denoiser")
    if "text_encoder" in names:
        text_encoder = TextEncoder(ClipEncoder(checkpoint.load_tokenizer(), run("text_encoder")[0]))
    else:
        text_encoder = _text_encoder(checkpoint, device, text)
    return LoadedModel(
        recipe=replace(checkpoint.recipe, references=checkpoint.family.references),
        digest=checkpoint.digest,
        backend=backend,
        text_encoder=text_encoder,
        family=checkpoint.family,
        denoiser=denoiser,
        denoiser_inputs=interface.input_names,
        decoders=decoders,
        encoder=encoder,
        geometry=checkpoint.geometry,
        parity=parity,
        recipe_source=checkpoint.recipe_source,
        threads=threads,
        max_chunks=_max_chunks(checkpoint, backend, interface),
    )


def _max_chunks(checkpoint: Checkpoint, backend: str, denoiser: Interface) -> int:
    """Return how many chunks of a prompt the denoiser reads. torch runs any number, but a model that was trained with a
    text encoder shorter than CLIP's own has never read more."""
    (embeds,) = (spec for spec in denoiser.inputs if spec.name == "prompt_embeds")
    takes_more = embeds.shape[1] == "tokens"
    if not takes_more and checkpoint.has_clip_alone and backend.startswith("torch "):
        takes_more = checkpoint.load_tokenizer().max_tokens >= CLIP_TOKENS
    return MAX_CHUNKS if takes_more else 1


def makes_large_pictures(checkpoint: Checkpoint) -> bool:
    """Return whether all cores are fastest for one picture of the first native size, in every component."""
    return math.prod(checkpoint.recipe.native_sizes[0]) >= LARGE_PIXELS


def _text_encoder(checkpoint: Checkpoint, device: torch.device, text: TextConfig) -> TextEncoder:
    """Return the text encoder of a stock pipeline. Models whose prompts have the same embeddings share it.

    Args:
        device: of the denoiser, where the embeddings go.
    """
    on = text.on(device)

    def load() -> TextEncoder:
        encoders = checkpoint.load_text_encoders(on, text.precision)
        return TextEncoder(PipelineEncoder(checkpoint.family, encoders, device))

    key = (checkpoint.text_content(), text.precision, str(on), str(device))
    return checkpoint.texts.shared(key, checkpoint.folder, load, "prompts")


def _check_sizes(checkpoint: Checkpoint) -> None:
    multiple = checkpoint.geometry.size_multiple
    for width, height in checkpoint.recipe.native_sizes:
        if width % multiple or height % multiple:
            raise RecipeError(
                f"{checkpoint.folder / RECIPE_FILE}: native_sizes has {width}x{height}, but the model makes only "
                f"multiples of {multiple} pixels; publish the checkpoint again with sizes that it "
                "was trained at"
            )
