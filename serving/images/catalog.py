"""Models by name: checkpoints, and LoRAs on them, which can be added and removed while the server runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from serving.config import LoraSource, ModelSource, ServerConfig
from serving.errors import unknown_model
from serving.schema.lora_settings import LoraSettings, read_lora_settings
from tdm_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from tdm_runtime.checkpoint.lora.lora_file import FOLDER_FILES, read_lora
from tdm_runtime.checkpoint.stock.pipeline_folder import MODEL_INDEX
from tdm_runtime.checkpoint.stock.text_precision import TextPool
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.engine.warm_up import warm_up
from tdm_runtime.errors import CheckpointError, TDMError
from tdm_runtime.model.choice import load_checkpoint
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.lora import LoraBase

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
"""Seconds between two looks at the folder of LoRAs. A changed file is loaded when two looks find it unchanged."""
Stamp = tuple[int, ...]


@dataclass(frozen=True)
class Served:
    """A model that requests can name."""

    model: LoadedModel
    created: int
    """Time when the checkpoint was written or the LoRA was loaded, Unix seconds."""


@dataclass(frozen=True)
class Base:
    """A checkpoint and its model."""

    checkpoint: Checkpoint
    model: LoadedModel


def load_base(source: ModelSource, config: ServerConfig, texts: TextPool | None = None) -> Base:
    """Load a checkpoint. Files that the command has already hashed are not hashed again.

    Args:
        texts: Text encoders of the models that share an engine with it.

    Raises:
        CheckpointError, BackendError: the checkpoint cannot be served.
    """
    checkpoint = open_checkpoint(source.folder, config.file_hashes, texts=texts)
    model = load_checkpoint(checkpoint, config.backend)
    if source.name is not None:
        model = replace(model, recipe=replace(model.recipe, name=source.name))
    logger.info("%s runs on %s", model.name, model.choice or model.backend)
    return Base(checkpoint, model)


class Catalog:
    """Finds models by name. Every change replaces the whole mapping, so readers need no lock."""

    def __init__(self, engine: DiffusionEngine, bases: Sequence[Base], config: ServerConfig) -> None:
        """Warm up every model, then follow the folder of LoRAs.

        Raises:
            TDMError: a LoRA does not fit its base, or two models have one name.
        """
        self._engine = engine
        self._bases = {base.model.name: base for base in bases}
        self._lora_bases: dict[str, LoraBase] = {}
        self._served: dict[str, Served] = {}
        self._threads = config.backend.threads or None
        self._retired: list[LoadedModel] = []
        """LoRAs that were removed or replaced and that unfinished samples may still use."""
        for base in bases:
            warm_up(engine, base.model)
            changed_s = (base.checkpoint.base_folder / MODEL_INDEX).stat().st_mtime
            self._add(Served(base.model, int(changed_s)))
        for lora in config.loras:
            self._add(self._loaded(lora))
        self._folder = None if config.lora_folder is None else LoraFolder(config.lora_folder)
        self._is_closing = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="lora-folder", daemon=True)
        if self._folder is not None:
            self.look_again()
            self.look_again()  # LoRAs that are in the folder at the start are served from the start
            self._watching.start()

    def served(self) -> list[Served]:
        """Return all models, the default first."""
        return list(self._served.values())

    def find(self, name: str | None) -> Served:
        """Return the model of this name; None is the default model.

        Raises:
            APIError: 404, no model has this name.
        """
        served = self._served
        if name is None:
            return next(iter(served.values()))
        if name not in served:
            raise unknown_model(name, served)
        return served[name]

    def close(self) -> None:
        """Stop watching the folder."""
        self._is_closing.set()
        if self._watching.ident is not None:
            self._watching.join()

    def look_again(self) -> None:
        """Load LoRAs that were added or changed in the folder; remove those that are gone."""
        if self._folder is None:
            return
        for lora in self._folder.changed():
            try:
                self._replace(self._loaded(lora))
                logger.info("LoRA %s is served from %s", lora.name, lora.path)
            except Exception as error:  # the others are served
                is_known = isinstance(error, TDMError)
                logger.error("LoRA %s cannot be served: %s", lora.name, error, exc_info=not is_known)
        for name in self._folder.gone():
            if (old := self._served.get(name)) is not None and old.model.base is not None:
                self._served = {key: served for key, served in self._served.items() if key != name}
                self._retired.append(old.model)
                logger.info("LoRA %s is gone", name)
        self._forget_retired()

    def _watch(self) -> None:
        while not self._is_closing.wait(LOOK_AGAIN_S):
            try:
                self.look_again()
            except Exception:
                logger.exception("the folder of LoRAs could not be read; trying again")

    def _loaded(self, lora: LoraSource) -> Served:
        """Attach a LoRA to its base, between two calls of the engine.

        Raises:
            CheckpointError: the LoRA does not fit its base, or there is no such base.
        """
        name = lora.base or next(iter(self._bases))
        if name not in self._bases:
            raise CheckpointError(f"the base of {lora.name} is {name!r}; this server has {', '.join(self._bases)}")
        base = self._bases[name]
        if name not in self._lora_bases:
            self._lora_bases[name] = LoraBase(base.checkpoint, base.model, self._threads)
        lora_base = self._lora_bases[name]
        prepared = lora_base.prepare(lora.name, [(read_lora(lora.path, base.checkpoint.family), lora.scale)])
        attached: list[LoadedModel] = []
        self._engine.run_on_thread(lambda: attached.append(lora_base.attach(prepared)))
        if not any(served.model.base == name for served in self._served.values()):
            warm_up(self._engine, attached[0])  # LoRAs of one base have the same costs
        return Served(attached[0], int(time.time()))

    def _add(self, served: Served) -> None:
        if (name := served.model.name) in self._served:
            raise CheckpointError(
                f"two models are called {name!r}; give each a name of its own with --model NAME=FOLDER"
            )
        self._served = {**self._served, name: served}

    def _replace(self, served: Served) -> None:
        name = served.model.name
        old = self._served.get(name)
        if old is not None and old.model.base is None:
            raise CheckpointError(f"{name!r} is the name of a checkpoint; call the LoRA something else")
        if old is not None:
            self._retired.append(old.model)
        self._served = {**self._served, name: served}

    def _forget_retired(self) -> None:
        """Free LoRAs that no unfinished picture uses."""
        for model in [model for model in self._retired if not self._engine.is_used(model)]:
            assert model.base is not None, "checkpoints are not retired"
            lora_base = self._lora_bases[model.base]
            self._engine.run_on_thread(lambda lora_base=lora_base, model=model: lora_base.detach(model))  # type: ignore[misc]
            self._retired.remove(model)


class LoraFolder:
    """A folder of LoRAs, and what has changed in it since the last look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, Stamp] = {}
        """Stamps at the last look."""
        self._reported: dict[str, Stamp] = {}
        """Stamps of the versions that `changed` returned."""
        self._gone: list[str] = []

    def changed(self) -> list[LoraSource]:
        """Return LoRAs that were added or changed and that two looks found unchanged."""
        files = dict(self._files())
        stamps = {name: self._stamp(name, file) for name, file in files.items()}
        still = [name for name, stamp in stamps.items() if self._seen.get(name) == stamp != self._reported.get(name)]
        self._gone = [name for name in self._reported if name not in stamps]
        self._seen = stamps
        self._reported = {name: stamp for name, stamp in self._reported.items() if name in stamps}
        self._reported |= {name: stamps[name] for name in still}
        return [lora for name in still if (lora := self._source(name, files[name])) is not None]

    def gone(self) -> list[str]:
        """Return the names of LoRAs that the last look no longer found."""
        return self._gone

    def _files(self) -> Iterator[tuple[str, Path]]:
        for entry in sorted(self._folder.iterdir()):
            if entry.name.startswith("."):  # macOS writes ._NAME beside NAME
                continue
            if entry.suffix == ".safetensors" and entry.is_file():
                yield entry.stem, entry
            elif entry.is_dir() and any((entry / file).is_file() for file in FOLDER_FILES):
                yield entry.name, entry

    def _stamp(self, name: str, file: Path) -> Stamp:
        places = [file, self._folder / f"{name}.json", *(file / inside for inside in FOLDER_FILES)]
        found = [place.stat() for place in places if place.exists()]
        return tuple(number for stat in found for number in (stat.st_mtime_ns, stat.st_size))

    def _source(self, name: str, file: Path) -> LoraSource | None:
        beside = self._folder / f"{name}.json"
        try:
            settings = read_lora_settings(beside.read_bytes()) if beside.is_file() else LoraSettings()
            return LoraSource(name, file, settings.scale, settings.base)
        except (OSError, ValueError) as error:
            logger.error("LoRA %s is not served: %s cannot be used (%s)", name, beside, error)
            return None
