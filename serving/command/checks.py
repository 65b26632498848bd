"""Checks of `tdm-serve` before it starts anything, so that no mistake waits for the first request."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from serving.config import LoraSource, ServerConfig
from serving.fronts.access import load_keys
from serving.fronts.address import reserve
from serving.jobs.artifacts import open_artifacts
from serving.jobs.job_service import open_store
from serving.telemetry.logs import start_logger
from tdm_runtime.backends import TORCH_BACKENDS
from tdm_runtime.backends.onnxruntime import provider_device, require_provider
from tdm_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from tdm_runtime.checkpoint.lora.lora_file import read_lora
from tdm_runtime.checkpoint.recipe import RECIPE_FILE
from tdm_runtime.checkpoint.stock.text_precision import TextConfig
from tdm_runtime.errors import ArtifactError, CheckpointError
from tdm_runtime.media.provenance import Provenance
from tdm_runtime.model.artifacts import Artifacts, BackendConfig
from tdm_runtime.safety import Safety


def check(config: ServerConfig) -> ExitStack:
    """Refuse settings that cannot be served. Build artifacts if there are none.

    Returns:
        Addresses of this server, reserved until the stack is closed.

    Raises:
        TDMError, OSError, ValueError: the message has the reason and the remedy.
    """
    if config.trace_file is not None:
        config.trace_file.open("a").close()
    checkpoints = check_models(config)
    is_here = config.front == "direct"  # behind Ray's proxy, engines may be on other machines
    if is_here and not all(checkpoint.has_clip_alone for checkpoint in checkpoints):
        config.backend.text.on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if is_here and config.backend.provider is not None:
        require_provider(config.backend.provider, provider_device(config.backend.provider))
    if config.api_keys is not None:
        load_keys(config.api_keys)
    Safety.load(config.blocked_words, config.safety_checker)
    Provenance(config.provenance)
    check_state(config)
    with reserve_addresses(config) as held:
        for checkpoint in checkpoints:
            checkpoint.check_shapes()
            check_artifacts(checkpoint, config.backend)
        return held.pop_all()


def check_models(config: ServerConfig) -> list[Checkpoint]:
    """Open the checkpoints and LoRAs that are to be served.

    Raises:
        CheckpointError: a checkpoint or a LoRA cannot be served, or two have one name.
    """
    checkpoints = [open_checkpoint(source.folder, config.file_hashes) for source in config.models]
    opened = zip(config.models, checkpoints, strict=True)
    names = [source.name or checkpoint.recipe.name for source, checkpoint in opened]
    bases = dict(zip(names, checkpoints, strict=True))
    for name, checkpoint in bases.items():
        if checkpoint.recipe_source != RECIPE_FILE:
            steps = ", ".join(map(str, checkpoint.recipe.step_counts))
            source = f"{checkpoint.recipe_source} for {steps} steps, {checkpoint.recipe.default_steps} by default"
            start_logger.info("%s has no %s; its recipe is %s", name, RECIPE_FILE, source)
    for lora in config.loras:
        names.append(lora.name)
        base = bases.get(lora.base or names[0])
        if base is None:
            raise CheckpointError(f"the base of {lora.name} is {lora.base!r}; this server has {', '.join(bases)}")
        check_lora(lora, base, config.backend.text)
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise CheckpointError(f"two models are called {doubled[0]!r}; give each a name of its own")
    if len(checkpoints) > 1 and config.backend.artifacts is not None:
        message = "leave --artifacts out, and each has a folder of its own"
        raise CheckpointError(f"--artifacts is one folder for {len(checkpoints)} checkpoints; {message}")
    if config.lora_folder is not None and not config.lora_folder.is_dir():
        raise CheckpointError(f"--lora-folder {config.lora_folder} is not a folder; make it, or leave it out")
    return checkpoints


def check_lora(lora: LoraSource, base: Checkpoint, text: TextConfig) -> None:
    """Refuse a LoRA that cannot be read, does not fit its base, or changes a text encoder that takes none.

    Raises:
        CheckpointError: the message has the reason and the remedy.
    """
    file = read_lora(lora.path, base.family)
    base.check_lora(file)
    changed = {*file.layers} & {*base.family.text_encoders}
    if changed and text.precision == "int8" and not base.has_clip_alone:
        raise CheckpointError(
            f"{lora.name} changes {min(changed)}, and text encoders at int8 take no LoRA; choose another "
            "--text-encoder-precision, or merge the LoRA with tdm-recipe --lora"
        )


def reserve_addresses(config: ServerConfig) -> ExitStack:
    """Reserve the addresses for this server until the returned stack is closed.

    Raises:
        OSError: an address is taken; the message names it and the remedy.
    """
    with ExitStack() as held:
        for port, flag in ((config.port, "--port"), (config.grpc_port, "--grpc-port")):
            try:
                if port is not None:
                    held.enter_context(reserve(config.host, port))
            except OSError as error:
                message = f"cannot listen on {config.host}:{port} ({error.strerror}); choose another with {flag}"
                raise OSError(message) from None
        return held.pop_all()


def check_state(config: ServerConfig) -> None:
    """Refuse a database or a place for files that cannot be used.

    Raises:
        ValueError, OSError: the message has the reason.
    """
    open_artifacts(config)
    open_store(config).close()


def check_artifacts(checkpoint: Checkpoint, config: BackendConfig) -> None:
    """Refuse artifacts that cannot be used. Build those of the default folder if there are none.

    Raises:
        ArtifactError: the artifacts belong to another checkpoint or machine, or could not be built.
    """
    try:
        artifacts = Artifacts.find(checkpoint, config)
        if not artifacts.is_missing(config):
            if config.backend != "auto" and config.backend not in TORCH_BACKENDS:
                artifacts.require(config.backend, config.precision)
            return
    except ArtifactError:
        if config.allow_fallback:
            return  # the replica logs which backend it runs instead, and why
        raise
    start_logger.info("building %s for this machine, once (--backend torch needs no build)", checkpoint.recipe.name)
    command = [sys.executable, "-m", "export.cli", str(checkpoint.folder)]
    if config.backend != "auto":
        command += ["--backend", config.backend]
    if config.precision is not None:
        command += ["--precision", config.precision]
    if subprocess.run(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parents[2]).returncode == 0:
        return
    if config.backend != "auto" and not config.allow_fallback:
        raise ArtifactError("the artifacts could not be built, see above; --allow-fallback serves with torch")
    start_logger.warning("the artifacts could not be built, see above; serving with torch")
