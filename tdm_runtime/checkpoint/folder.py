"""Open a checkpoint folder: diffusers layout, safetensors only, every weight file hashed.

Whatever is wrong with a folder is said here, before the first request, with what to do about it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tdm_runtime.checkpoint.recipe import RECIPE_FILE, Recipe, load_recipe
from tdm_runtime.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel

    from tdm_runtime.checkpoint.tokenizer import PromptTokenizer

Part = TypeVar("Part")

WEIGHT_FILES = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
OTHER_FILES = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
)
TINY_VAE = "tiny_vae"
"""Folder of the tiny autoencoder, which a checkpoint may have."""
TINY_VAE_WEIGHTS = f"{TINY_VAE}/diffusion_pytorch_model.safetensors"
TINY_VAE_FILES = (TINY_VAE_WEIGHTS, f"{TINY_VAE}/config.json")
"""All there where the folder is."""
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
    hashes: FileHashes = field(default_factory=FileHashes, repr=False, compare=False)
    """Hashes of its files."""

    @cached_property
    def digest(self) -> str:
        """sha256 over the recipe, which itself holds the hash of every weight file."""
        return self.hashes.sha256(self.folder / RECIPE_FILE)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that a compiled program depends on: weights, configs, tokenizer and recipe."""
        names = sorted({*self.recipe.files, *OTHER_FILES, *(TINY_VAE_FILES if self.has_tiny_vae else ()), RECIPE_FILE})
        lines = (f"{name} {self.recipe.files.get(name) or self.hashes.sha256(self.folder / name)}" for name in names)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def load_unet(self) -> UNet2DConditionModel:
        """Load the denoiser, float32, eval mode."""
        from diffusers import UNet2DConditionModel

        unet: UNet2DConditionModel = self._load_model("unet", UNet2DConditionModel)
        self._check_step_condition(unet.config.time_cond_proj_dim)
        return unet.float().eval()

    def load_vae(self) -> AutoencoderKL:
        """Load the autoencoder, float32, eval mode."""
        from diffusers import AutoencoderKL

        vae: AutoencoderKL = self._load_model("vae", AutoencoderKL)
        return vae.float().eval()

    @property
    def has_tiny_vae(self) -> bool:
        """Whether it came with a tiny autoencoder."""
        return (self.folder / TINY_VAE).is_dir()

    def load_tiny_vae(self) -> AutoencoderTiny:
        """Load the tiny autoencoder, float32, eval mode. Its latents are the denoiser's own, without a scaling factor.

        Raises:
            CheckpointError: the checkpoint has none.
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

        disable_progress_bar()  # of weights that load in a moment
        model: CLIPTextModel = self._load_model("text_encoder", CLIPTextModel)
        return model.float().eval()

    def load_tokenizer(self) -> PromptTokenizer:
        """Load the tokenizer; prompts become exactly as many tokens as the text model has positions."""
        from tdm_runtime.checkpoint.tokenizer import PromptTokenizer

        tokenizer = self._load("tokenizer", PromptTokenizer.load)
        positions = self._config("text_encoder", "max_position_embeddings")
        if tokenizer.max_tokens != positions:
            raise CheckpointError(
                f"{self.folder}: the tokenizer cuts at {tokenizer.max_tokens} tokens and the text encoder has "
                f"{positions} positions; set model_max_length in tokenizer_config.json to {positions}"
            )
        return tokenizer

    @property
    def latent_channels(self) -> int:
        """Of the denoiser's latents."""
        return int(self._config("unet", "in_channels"))

    @property
    def downscale(self) -> int:
        """Pixels per latent, each side."""
        return int(2 ** (len(self._config("vae", "block_out_channels")) - 1))

    def _config(self, part: str, key: str) -> Any:
        def read(folder: Path) -> Any:
            return json.loads((folder / "config.json").read_text(encoding="utf-8"))[key]

        return self._load(part, read)

    def _load_model(self, part: str, model_class: Any) -> Any:
        """Load weights that are all there and all used: the libraries would fill gaps with random numbers."""
        model, report = self._load(part, partial(model_class.from_pretrained, output_loading_info=True))
        if strangers := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
            raise CheckpointError(
                f"{self.folder / part / 'config.json'} does not describe the weights beside it: {len(strangers)} "
                f"tensors are missing or left over ({strangers[0]}, ...); restore the folder from its source"
            )
        return model

    def _load(self, part: str, load: Callable[[Path], Part]) -> Part:
        try:
            return load(self.folder / part)
        except Exception as error:  # the libraries raise many kinds; all mean the same to a user
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{self.folder / part} cannot be loaded: {reason}; restore the folder from its source"
            ) from error

    def _check_step_condition(self, dim: int | None) -> None:
        if (self.recipe.step_condition == "timestep_cond") != (dim is not None):
            raise RecipeError(
                f"{self.folder}: the recipe's step_condition is {self.recipe.step_condition!r} but the unet's "
                f"time_cond_proj_dim is {dim}; recipe and weights are not of one training run"
            )


def open_checkpoint(folder: Path, hashes: FileHashes | None = None) -> Checkpoint:
    """Check a folder's completeness, its recipe and the hash of every weight file.

    Args:
        hashes: hashes that are known already; those that are computed here are added. None hashes every file.

    Raises:
        CheckpointError: naming the file and what to do.
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
    tiny_vae_files = TINY_VAE_FILES if (folder / TINY_VAE).is_dir() else ()
    if missing := [name for name in (*WEIGHT_FILES, *OTHER_FILES, *tiny_vae_files) if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; restore the folder from its source")
    # Shards and their index count too: the libraries would read them in place of the files listed.
    weights = {*WEIGHT_FILES, *(str(file.relative_to(folder)) for file in folder.rglob("*.safetensors*"))}
    if unlisted := sorted(weights - set(recipe.files)):
        raise RecipeError(
            f"{folder / RECIPE_FILE} has no sha256 for {', '.join(unlisted[:3])}; publish the checkpoint anew, "
            "or remove what does not belong to it"
        )
    for name, expected in recipe.files.items():
        _check_hash(folder, name, expected, hashes)
    _check_model_index(folder)
    return Checkpoint(folder, recipe, hashes)


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


def _check_model_index(folder: Path) -> None:
    file = folder / "model_index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        denoiser = index["unet"][1]
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}); restore the folder from its source") from None
    if denoiser != "UNet2DConditionModel":
        raise CheckpointError(f"{file} names the denoiser {denoiser!r}; this version serves UNet2DConditionModel")


def file_sha256(file: Path) -> str:
    """Hex sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def _machine() -> str:
    """Return what tells this machine, since its last start, from others."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot_id.read_text(encoding='ascii').strip() if boot_id.is_file() else ''}"
