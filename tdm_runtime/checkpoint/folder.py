"""Open a checkpoint folder: diffusers layout, safetensors only, every weight file hashed.

A folder that cannot be served is refused here, before the first request, with an error that names the remedy.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tdm_runtime.checkpoint.recipe import RECIPE_FILE, Recipe, load_recipe
from tdm_runtime.errors import CheckpointError, RecipeError
from tdm_runtime.families import FAMILIES, Denoiser, Family, family_of_pipeline
from tdm_runtime.families.latent_space import LatentGeometry

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny
    from transformers import CLIPTextModel

    from tdm_runtime.checkpoint.tokenizer import PromptTokenizer

Part = TypeVar("Part")

SERVED_FAMILIES = ("stable_diffusion",)
"""Names of the families that are served: those with one CLIP text encoder, the only one that the runtime has."""
TINY_VAE = "tiny_vae"
"""Folder of the tiny autoencoder, which is optional."""
TINY_VAE_WEIGHTS = f"{TINY_VAE}/diffusion_pytorch_model.safetensors"
TINY_VAE_FILES = (TINY_VAE_WEIGHTS, f"{TINY_VAE}/config.json")
"""Files of that folder; all are required if the folder exists."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DEFAULT_CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "tdm-emoji"


class FileHashes:
    """sha256 of files, each computed once for as long as its file stays as it is.

    Pickled, they serve other processes of the same machine. A file is hashed again when its size, times or inode have
    changed, and on another machine.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], str] = {}

    def sha256(self, file: Path) -> str:
        """Return the hex sha256 of a file.

        Raises:
            OSError: the file cannot be read.
        """
        path, stat = file.resolve(), file.stat()
        times_ns = stat.st_mtime_ns, stat.st_ctime_ns
        state = (_machine(), str(path), stat.st_dev, stat.st_ino, stat.st_size, *times_ns)
        if state not in self._known:
            self._known[state] = file_sha256(file)
        return self._known[state]


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was checked and may be loaded."""

    folder: Path
    recipe: Recipe
    family: Family
    hashes: FileHashes = field(default_factory=FileHashes, repr=False, compare=False)
    """Hashes of its files."""

    @cached_property
    def digest(self) -> str:
        """sha256 over the recipe, which itself holds the hash of every weight file."""
        return self.hashes.sha256(self.folder / RECIPE_FILE)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that a compiled program depends on: weights, configs, tokenizer and recipe."""
        tiny_vae_files = TINY_VAE_FILES if self.has_tiny_vae else ()
        names = sorted({*self.recipe.files, *other_files(self.family), *tiny_vae_files, RECIPE_FILE})
        lines = (f"{name} {self.recipe.files.get(name) or self.hashes.sha256(self.folder / name)}" for name in names)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def load_denoiser(self) -> Denoiser:
        """Load the denoiser in its family's adapter, float32, eval mode."""
        import diffusers

        model = self._load_model(self.family.denoiser_folder, getattr(diffusers, self.family.denoiser_class))
        denoiser = self.family.adapter(model.float().eval())
        self._check_step_condition(denoiser.condition_dim)
        return denoiser

    def load_vae(self) -> Any:
        """Load the autoencoder, float32, eval mode."""
        import diffusers

        return self._load_model("vae", getattr(diffusers, self.family.vae_classes[0])).float().eval()

    @property
    def has_tiny_vae(self) -> bool:
        """Whether the folder has a tiny autoencoder."""
        return (self.folder / TINY_VAE).is_dir()

    def load_tiny_vae(self) -> AutoencoderTiny:
        """Load the tiny autoencoder, float32, eval mode. It decodes the denoiser's latents without a scaling factor.

        Raises:
            CheckpointError: the checkpoint has no tiny autoencoder.
        """
        from diffusers import AutoencoderTiny

        if not self.has_tiny_vae:
            raise CheckpointError(
                f"{self.folder} has no {TINY_VAE}/; decode with the full autoencoder, or train a tiny one and publish "
                "the checkpoint anew (`tdm-train emoji tiny-autoencoder`, then `publish`)"
            )
        vae: AutoencoderTiny = self._load_model(TINY_VAE, AutoencoderTiny)
        return vae.float().eval()

    def load_text_model(self) -> CLIPTextModel:
        """Load the text model, float32, eval mode."""
        from transformers import CLIPTextModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # weights load in a moment
        model: CLIPTextModel = self._load_model("text_encoder", CLIPTextModel)
        return model.float().eval()

    def load_tokenizer(self) -> PromptTokenizer:
        """Load the tokenizer. Every prompt becomes as many tokens as the text model has positions."""
        from tdm_runtime.checkpoint.tokenizer import PromptTokenizer

        tokenizer = self._load("tokenizer", PromptTokenizer.load)
        positions = self._config("text_encoder", "max_position_embeddings")
        if tokenizer.max_tokens != positions:
            raise CheckpointError(
                f"{self.folder}: the tokenizer cuts at {tokenizer.max_tokens} tokens and the text encoder has "
                f"{positions} positions; set model_max_length in tokenizer_config.json to {positions}"
            )
        return tokenizer

    @cached_property
    def geometry(self) -> LatentGeometry:
        """Rule for the shape of the latents."""

        def read_vae(folder: Path) -> Any:
            config = _read_config(folder)
            self.family.spatial_compression(config)  # here, so that an error names the VAE
            return config

        vae = self._load("vae", read_vae)
        return self._load(self.family.denoiser_folder, lambda folder: self.family.geometry(_read_config(folder), vae))

    def _config(self, part: str, key: str) -> Any:
        return self._load(part, lambda folder: _read_config(folder)[key])

    def _load_model(self, part: str, model_class: Any) -> Any:
        model, report = self._load(part, partial(model_class.from_pretrained, output_loading_info=True))
        check_loaded(self.folder / part, report)
        return model

    def _load(self, part: str, load: Callable[[Path], Part]) -> Part:
        try:
            return load(self.folder / part)
        except Exception as error:  # the libraries raise many kinds; a user can do the same about all of them
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{self.folder / part} cannot be loaded: {reason}; restore the folder from its source"
            ) from error

    def _check_step_condition(self, dim: int | None) -> None:
        if (self.recipe.step_condition == "timestep_cond") != (dim is not None):
            raise RecipeError(
                f"{self.folder}: the recipe's step_condition is {self.recipe.step_condition!r} but the "
                f"{self.family.denoiser_folder}'s time_cond_proj_dim is {dim}; recipe and weights are not of one "
                "training run: restore the folder from its source"
            )


def check_loaded(folder: Path, report: Mapping[str, Collection[str]]) -> None:
    """Check that no weight is missing or unused: the libraries would fill gaps with random numbers.

    Args:
        folder: of the component.
        report: of `from_pretrained(..., output_loading_info=True)`.

    Raises:
        CheckpointError: the config describes other weights.
    """
    if strangers := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe the weights beside it: {len(strangers)} tensors are missing "
            f"or left over ({strangers[0]}, ...); restore the folder from its source"
        )


def weight_files(family: Family) -> tuple[str, ...]:
    """Return the weight files that every checkpoint of a family has, relative to its folder."""
    return (
        f"{family.denoiser_folder}/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        *(f"{part}/model.safetensors" for part in family.text_encoders),
    )


def other_files(family: Family) -> tuple[str, ...]:
    """Return the other files that every checkpoint of a family has beside its recipe."""
    return (
        "model_index.json",
        *(f"{part}/config.json" for part in (family.denoiser_folder, "vae", *family.text_encoders)),
        *(f"{part}/{name}" for part in family.tokenizers for name in ("tokenizer.json", "tokenizer_config.json")),
    )


def open_checkpoint(folder: Path, hashes: FileHashes | None = None) -> Checkpoint:
    """Check that a folder is complete, and its recipe and the hash of every weight file.

    Args:
        hashes: hashes that are known already; those that are computed here are added. None hashes every file.

    Raises:
        CheckpointError: the folder cannot be served; the message names the file and the remedy.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a checkpoint that has {RECIPE_FILE}")
    pickles = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled weights ({', '.join(pickles[:3])}), which can run code when read; "
            "convert them to safetensors and remove them"
        )
    recipe = load_recipe(folder)
    hashes = FileHashes() if hashes is None else hashes
    family = _read_family(folder)
    tiny_vae_files = TINY_VAE_FILES if (folder / TINY_VAE).is_dir() else ()
    required = (*weight_files(family), *other_files(family), *tiny_vae_files)
    if missing := [name for name in required if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; restore the folder from its source")
    # Shards and their index count too: the libraries would read them in place of the files listed.
    weights = {*weight_files(family), *(str(file.relative_to(folder)) for file in folder.rglob("*.safetensors*"))}
    if unlisted := sorted(weights - set(recipe.files)):
        raise RecipeError(
            f"{folder / RECIPE_FILE} has no sha256 for {', '.join(unlisted[:3])}; publish the checkpoint anew, "
            "or remove what does not belong to it"
        )
    for name, expected in recipe.files.items():
        _check_hash(folder, name, expected, hashes)
    return Checkpoint(folder, recipe, family, hashes)


def _check_hash(folder: Path, name: str, expected: str, hashes: FileHashes) -> None:
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise RecipeError(f"{folder / RECIPE_FILE} lists {name!r}, which lies outside the checkpoint folder")
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; restore the folder from its source")
    try:
        actual = hashes.sha256(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); make it readable") from None
    if actual != expected:
        raise CheckpointError(
            f"{file} is damaged or of another checkpoint: its sha256 is {actual[:12]}..., the recipe says "
            f"{expected[:12]}...; restore the file from the checkpoint's source (with git: `git checkout -- {file}`)"
        )


def _read_family(folder: Path) -> Family:
    """Return the family that model_index.json names. Pipelines of other names are taken for Stable Diffusion."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} lacks {file.name}; restore the folder from its source")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        family = family_of_pipeline(index.get("_class_name")) or FAMILIES["stable_diffusion"]
        denoiser = index[family.denoiser_folder][1]
    except (OSError, ValueError, AttributeError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}); restore the folder from its source") from None
    if family.name not in SERVED_FAMILIES:
        raise CheckpointError(f"{file} is of {family.name}; this version serves {', '.join(SERVED_FAMILIES)} only")
    if denoiser != family.denoiser_class:
        raise CheckpointError(f"{file} names the denoiser {denoiser!r}; this version serves {family.denoiser_class}")
    return family


def _read_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def file_sha256(file: Path) -> str:
    """Return the hex sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def _machine() -> str:
    """Return what tells this machine, since its last start, from others."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot_id.read_text(encoding='ascii').strip() if boot_id.is_file() else ''}"
