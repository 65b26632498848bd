"""Open a checkpoint folder: diffusers layout, safetensors only.

The hashes of a recipe are checked; a stock folder without a recipe gets the one that its scheduler implies. A folder
that cannot be served is refused here, before the first request, with an error that names the remedy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from tdm_runtime.checkpoint.file_hashes import FileHashes, file_sha256
from tdm_runtime.checkpoint.folder_files import TINY_VAE, check_files, other_files, weight_files
from tdm_runtime.checkpoint.lora.lora_file import STEP_CONDITION_FILE, LoraFile, read_lora
from tdm_runtime.checkpoint.lora.merged_lora import fitting_layers, merge_loras
from tdm_runtime.checkpoint.recipe import RECIPE_FILE, Adapter, Recipe, load_recipe
from tdm_runtime.checkpoint.stock.implied_recipe import recipe_of
from tdm_runtime.checkpoint.stock.pipeline_folder import (
    MODEL_INDEX,
    family_of,
    load_model_part,
    load_text_encoders,
    read_json,
    text_parts,
    unloadable,
)
from tdm_runtime.checkpoint.stock.text_precision import TextPool, TextPrecision, lower_precision
from tdm_runtime.checkpoint.weight_shapes import check_shapes, described_model
from tdm_runtime.errors import CheckpointError, RecipeError
from tdm_runtime.families import Denoiser, Family
from tdm_runtime.families.family import TextEncoders
from tdm_runtime.families.latent_space import LatentGeometry

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny
    from transformers import CLIPTextModel

    from tdm_runtime.checkpoint.tokenizer import PromptTokenizer

Part = TypeVar("Part")

DEFAULT_CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "tdm-emoji"
CLIP_CHECKPOINT = DEFAULT_CHECKPOINT.with_name("tdm-emoji-video")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was checked and may be loaded."""

    folder: Path
    """Folder of the recipe."""
    recipe: Recipe
    family: Family
    hashes: FileHashes = field(default_factory=FileHashes, repr=False, compare=False)
    """Hashes of its files."""
    texts: TextPool = field(default_factory=TextPool, repr=False, compare=False)
    """Text encoders that are loaded already, of this checkpoint and of others that the same thread runs."""

    @cached_property
    def digest(self) -> str:
        """sha256 over the recipe and, through it or beside it, the content of every weight file."""
        if self._lists_all_files:
            return self.hashes.sha256(self.folder / RECIPE_FILE)
        return hashlib.sha256(f"{self.recipe.to_json()}\n{self._content}".encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that a compiled program depends on: weights, configs, tokenizer and recipe."""
        content = self._content if self._lists_all_files else f"{self._content}\n{self.digest}"
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def _content(self) -> str:
        """Name and sha256 of every file that determines a picture, a line each."""
        base = self.base_folder
        known = self.recipe.files if base == self.folder else {}
        recipe = (RECIPE_FILE,) if self._lists_all_files else ()
        names = {*known, *weight_files(base, self.family), *other_files(base, self.family), *recipe}
        lines = [f"{name} {known.get(name) or self.hashes.sha256(base / name)}" for name in sorted(names)]
        for (lora, scale), adapter in zip(self.loras, self.recipe.adapters, strict=True):
            lines.append(f"LoRA {lora.sha256} at {scale!r}" + (f" of {adapter.part}" if adapter.part else ""))
        return "\n".join(lines)

    @property
    def _lists_all_files(self) -> bool:
        """Whether the recipe has the hash of every file that it names."""
        return bool(self.recipe.files) and self.recipe.base is None and not self.recipe.adapters

    @property
    def base_folder(self) -> Path:
        """Folder of the weights."""
        return base_folder(self.folder, self.recipe)

    @cached_property
    def loras(self) -> tuple[tuple[LoraFile, float], ...]:
        """LoRAs that are merged into the weights, each with its scale."""
        return tuple((self._lora(one), one.scale) for one in self.recipe.adapters)

    def _lora(self, adapter: Adapter) -> LoraFile:
        lora, first = read_lora(self.folder / adapter.file, self.family), self.family.denoiser_folder
        if adapter.part in ("", first):
            return lora
        parts = self.family.denoiser_parts(read_json(self.base_folder / MODEL_INDEX))
        if adapter.part not in parts:
            raise CheckpointError(
                f"the LoRA {adapter.file} is for {adapter.part!r}, which {self.base_folder} does not have; it has "
                f"{', '.join(parts)}"
            )
        return replace(lora, layers={adapter.part: lora.layers.get(first, {})})

    def _merge_loras(self, modules: Mapping[str, nn.Module]) -> None:
        if self.loras:
            merge_loras(modules, self.loras)

    def load_denoiser(self, dtype: torch.dtype = torch.float32) -> Denoiser:
        """Load the denoiser in its family's adapter, eval mode."""
        index = read_json(self.base_folder / MODEL_INDEX)
        denoiser = self.family.build_denoiser(lambda part: self._load_denoiser_part(part, index, dtype), index)
        if (self.base_folder / STEP_CONDITION_FILE).is_file():
            denoiser.load_step_condition(self._load(STEP_CONDITION_FILE, load_file))
        self._merge_loras({self.family.denoiser_folder: denoiser, **denoiser.further_models})
        if self.recipe.guidance_scale is not None:
            denoiser.read_guidance()
        self._check_step_condition(denoiser.reads_step_count)
        return denoiser

    def _load_denoiser_part(self, part: str, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
        import diffusers

        name = str(index[part][-1])
        known = self.family.denoiser_class if name == self.family.former_denoiser_class else name
        return self._load_model(part, getattr(diffusers, known), dtype).eval()

    def check_shapes(self) -> None:
        """Check the shapes of weights whose hashes the recipe does not list, by the headers of their files.

        Raises:
            CheckpointError: weights and config are not of one model.
        """
        if not self._lists_all_files:
            for part, model_class in self._model_classes().items():
                check_shapes(self.base_folder / part, model_class)

    def check_lora(self, lora: LoraFile) -> None:
        """Check that a LoRA changes layers that this checkpoint has, in their shapes, without reading weights.

        Raises:
            CheckpointError: it belongs to another base.
        """
        classes = self._model_classes()
        for part in lora.layers:
            if part not in classes:
                raise CheckpointError(
                    f"{lora.path} changes {part}, which {self.folder} does not have; use the base of the LoRA"
                )
            fitting_layers(lora, part, described_model(self.base_folder / part, classes[part]))

    def _model_classes(self) -> dict[str, Any]:
        """Return part -> class of diffusers or transformers, for every part with weights."""
        import diffusers
        import transformers

        index = read_json(self.base_folder / MODEL_INDEX)
        texts = text_parts(index, self.family)
        return {
            self.family.denoiser_folder: getattr(diffusers, self.family.denoiser_class),
            "vae": getattr(diffusers, self.family.vae_classes[0]),
        } | {part: getattr(transformers, str(index[part][-1])) for part in self.family.text_encoders if part in texts}

    def load_vae(self, dtype: torch.dtype = torch.float32) -> Any:
        """Load the autoencoder, eval mode."""
        import diffusers

        return self._load_model("vae", getattr(diffusers, self.family.vae_classes[0]), dtype).eval()

    @property
    def recipe_source(self) -> str:
        """Where the recipe comes from."""
        return RECIPE_FILE if (self.folder / RECIPE_FILE).is_file() else "implied by scheduler_config.json"

    @property
    def has_tiny_vae(self) -> bool:
        """Whether the folder has a tiny autoencoder."""
        return (self.base_folder / TINY_VAE).is_dir()

    def load_tiny_vae(self, dtype: torch.dtype = torch.float32) -> AutoencoderTiny:
        """Load the tiny autoencoder, eval mode. It decodes the denoiser's latents without a scaling factor.

        Raises:
            CheckpointError: the checkpoint has no tiny autoencoder.
        """
        from diffusers import AutoencoderTiny

        if not self.has_tiny_vae:
            raise CheckpointError(
                f"{self.folder} has no {TINY_VAE}/; decode with the full autoencoder, or train a tiny one and publish "
                "the checkpoint anew (`tdm-train emoji tiny-autoencoder`, then `publish`)"
            )
        vae: AutoencoderTiny = self._load_model(TINY_VAE, AutoencoderTiny, dtype).eval()
        return vae

    @property
    def has_clip_alone(self) -> bool:
        """Whether one CLIP reads the prompts, which any backend runs. Else a stock pipeline encodes them."""
        return self.family.text_encoders == ("text_encoder",) and self._text_class == "CLIPTextModel"

    @cached_property
    def _text_class(self) -> str:
        return str(read_json(self.base_folder / MODEL_INDEX)["text_encoder"][-1])

    def load_text_encoders(self, device: torch.device | str = "cpu", precision: TextPrecision = "fp32") -> TextEncoders:
        """Load all tokenizers and text encoders in their stock pipeline. `texts` keeps each encoder once.

        Raises:
            CheckpointError: one of them cannot be loaded.
        """
        seen: list[object] = []

        def load_part(part: str, model_class: Any) -> nn.Module:
            content = self._part_content(part), model_class, precision, str(device)
            key = content, seen.count(content)  # twins of one model stay apart: a LoRA may change each differently
            seen.append(content)
            load = partial(self._load_text_part, part, model_class, torch.device(device), precision)
            return self.texts.shared(key, self.folder, load, part)

        width, height = self.recipe.native_sizes[0]
        return load_text_encoders(self.base_folder, self.family, width, height, device, load_part)

    def _load_text_part(self, part: str, model_class: Any, device: torch.device, precision: TextPrecision) -> nn.Module:
        """Load a text encoder. bfloat16 files are mapped and not copied; LoRAs need float32 while they are merged."""
        is_exact = precision == "fp32" or any(part in lora.layers for lora, _ in self.loras)
        dtype = torch.float32 if is_exact else torch.bfloat16
        model: nn.Module = load_model_part(self.base_folder / part, model_class, dtype)
        self._merge_loras({part: model})
        return lower_precision(model, precision).to(device)

    def _part_content(self, part: str) -> str:
        """Return hashes of all that determines the weights of a text encoder, whatever its folder is called."""
        base = self.base_folder
        files = [name for name in weight_files(base, self.family) if name.startswith(f"{part}/")]
        hashes = {name.removeprefix(f"{part}/"): self.hashes.sha256(base / name) for name in files}
        loras = [(part, lora.sha256, scale) for lora, scale in self.loras if part in lora.layers]
        return json.dumps([hashes, _settings(base / part / "config.json"), loras], sort_keys=True)

    def text_content(self) -> str:
        """Return hashes of all that determines the embedding of a prompt: weights, tokenizers and settings."""
        base, index = self.base_folder, read_json(self.base_folder / MODEL_INDEX)
        there = text_parts(index, self.family)
        tokenizers = (file for part in there if part in self.family.tokenizers for file in (base / part).iterdir())
        hashes = {str(file.relative_to(base)): self.hashes.sha256(file) for file in tokenizers if file.is_file()}
        parts = [self._part_content(part) for part in there if part in self.family.text_encoders]
        read = {key: value for key, value in index.items() if key in there or not isinstance(value, list)}
        denoiser = _settings(base / self.family.denoiser_folder / "config.json")
        what = [self.family.name, read, hashes, parts, denoiser, self.recipe.native_sizes[0]]
        return json.dumps(what, sort_keys=True)

    def load_text_model(self, dtype: torch.dtype = torch.float32) -> CLIPTextModel:
        """Load the text model of a checkpoint that has CLIP alone, eval mode."""
        from transformers import CLIPTextModel

        model: CLIPTextModel = self._load_model("text_encoder", CLIPTextModel, dtype).eval()
        self._merge_loras({"text_encoder": model})
        return model

    def load_tokenizer(self) -> PromptTokenizer:
        """Load the tokenizer of that CLIP. Every prompt becomes as many tokens as the text model has positions."""
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

    def decoder_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type that the full decoder of a model of this type runs in."""
        return self.family.decoder_dtype(self._load("vae", _read_config), dtype)

    def _config(self, part: str, key: str) -> Any:
        return self._load(part, lambda folder: _read_config(folder)[key])

    def _load_model(self, part: str, model_class: Any, dtype: torch.dtype) -> Any:
        # LoRAs are added before weights are rounded.
        return load_model_part(self.base_folder / part, model_class, torch.float32 if self.loras else dtype)

    def _load(self, part: str, load: Callable[[Path], Part]) -> Part:
        folder = self.base_folder / part
        try:
            return load(folder)
        except Exception as error:  # the libraries raise many kinds; a user can do the same about all of them
            raise unloadable(folder, error) from error

    def _check_step_condition(self, reads_step_count: bool) -> None:
        if (self.recipe.step_condition == "timestep_cond") != reads_step_count:
            raise RecipeError(
                f"{self.folder}: the recipe's step_condition is {self.recipe.step_condition!r} but the "
                f"{self.family.denoiser_folder} has {'an' if reads_step_count else 'no'} input for K; recipe and "
                "weights are not of one training run: restore the folder from its source"
            )


def open_checkpoint(
    folder: Path,
    hashes: FileHashes | None = None,
    adapters: Sequence[Adapter] = (),
    texts: TextPool | None = None,
) -> Checkpoint:
    """Check that a folder is complete, its recipe, its LoRAs and every hash that the recipe lists.

    Args:
        hashes: hashes that are known already; those that are computed here are added. None hashes every file.
        adapters: LoRAs to merge beside those of the recipe.
        texts: Text encoders that are loaded already, which the same thread runs. None shares with no other checkpoint.

    Raises:
        CheckpointError: the folder cannot be served; the message names the file and the remedy.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a checkpoint that has {RECIPE_FILE}")
    hashes = FileHashes() if hashes is None else hashes
    written = load_recipe(folder) if (folder / RECIPE_FILE).exists() else None
    base = folder if written is None else base_folder(folder, written)
    family = family_of(base)
    recipe = recipe_of(folder, family) if written is None else written
    if family.makes_clips != (recipe.frames is not None):
        wants = "frames and fps" if family.makes_clips else "no frames"
        raise RecipeError(
            f"{folder / RECIPE_FILE}: frames is {recipe.frames}, but {base} is of {family.name}, whose recipe has "
            f"{wants}; write it with `tdm-recipe`"
        )
    recipe = replace(recipe, adapters=(*recipe.adapters, *adapters))
    check_files(base, family)
    listed = recipe.files if recipe.base is None else {}
    if listed and (unlisted := sorted(set(weight_files(folder, family)) - set(listed))):
        raise RecipeError(
            f"{folder / RECIPE_FILE} has no sha256 for {', '.join(unlisted[:3])}; publish the checkpoint anew, "
            "or remove what does not belong to it"
        )
    for name, expected in recipe.files.items():
        _check_hash(folder, name, expected, hashes)
    checkpoint = Checkpoint(folder, recipe, family, hashes, TextPool() if texts is None else texts)
    _ = checkpoint.loras  # fail here, not when they are merged
    return checkpoint


def base_folder(folder: Path, recipe: Recipe) -> Path:
    """Return the folder of the weights that a recipe names."""
    return folder if recipe.base is None else (folder / recipe.base).resolve()


def _check_hash(folder: Path, name: str, expected: str, hashes: FileHashes) -> None:
    file = folder / name
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


def weight_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every weight file that is read of a folder, shards and indices too, as a recipe lists them.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    family = family_of(folder)
    check_files(folder, family)
    return {name: file_sha256(folder / name) for name in sorted(weight_files(folder, family))}


def _settings(file: Path) -> dict[str, Any]:
    """Return a config without what says only where it came from."""
    unread = ("_name_or_path", "_class_name", "_diffusers_version", "transformers_version", "dtype", "torch_dtype")
    return {key: value for key, value in read_json(file).items() if key not in unread}


def _read_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
