"""Choice of the backend that runs a checkpoint: the requested one, or the fastest one measured."""

from __future__ import annotations

import contextlib
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pydantic
import torch

from tdm_runtime.backends import TORCH_BACKENDS, BackendName, Precision
from tdm_runtime.backends.cpu import cores, cpu_features
from tdm_runtime.backends.machine import TOOLS, gpu_architecture, gpu_name, installed
from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, Checkpoint, open_checkpoint
from tdm_runtime.checkpoint.manifest import MANIFEST_FILE, export_command
from tdm_runtime.checkpoint.recipe import Adapter
from tdm_runtime.errors import ArtifactError, BackendError
from tdm_runtime.model.artifacts import Artifacts, BackendConfig
from tdm_runtime.model.load import makes_large_pictures
from tdm_runtime.model.loaded_model import LoadedModel, denoise
from tdm_runtime.model.parity import MIN_PSNR_DB, lowest_psnr_db
from tdm_runtime.params import SamplingParams
from tdm_runtime.whole_file import write_whole

CHOICE_FILE = "choice.json"
"""File beside the artifacts that keeps the choice."""
ROUNDS = 20
"""Most calls in a measurement."""
ROUNDS_S = 1.0
"""Seconds after which a measurement ends, even before `ROUNDS` calls."""
FEW_THREADS_BELOW_S = 0.5
"""Seconds a picture. Only models faster than this are measured with fewer threads than cores too."""
THREADS_BATCH = 8
"""Most pictures in a call that compares thread counts. Threads matter most where many requests are in flight."""
THREADS_CALL_S = 0.1
"""Seconds that such a call may take. Slower models are compared with fewer pictures."""
THREADS_S = 4.0
"""Seconds after which this comparison ends."""
FEW_THREADS_GAIN = 1.1
"""How many times as fast a smaller thread count must be. Other work on the machine slows calls on all cores the most,
and the choice is kept when that work has ended."""
CHECK_ROUNDS = 5
"""Most calls in the measurement that checks a kept choice at each start; slow models have none."""
BUSY = 1.4
"""How many times as fast as its kept time a model must be for the choice to be measured again."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a checkpoint."""

    backend: BackendName
    precision: Precision
    threads: int

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}"

    def __str__(self) -> str:
        return f"{self.name} with {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True)
class Choice:
    """The fastest candidate on one machine, and what it was compared with."""

    machine: str
    chosen: Candidate
    picture_ms: Mapping[str, float]
    """Candidate -> milliseconds of a picture on all cores (`picture_seconds`); of the chosen one with its threads."""
    excluded: Mapping[str, str]
    """Candidate -> reason why it was not measured."""

    @property
    def picture_s(self) -> float:
        """Seconds of a picture of the chosen candidate."""
        return 1e-3 * self.picture_ms[self.chosen.name]

    def __str__(self) -> str:
        others = [f"{name} {ms:.3g} ms" for name, ms in self.picture_ms.items() if name != self.chosen.name]
        others += [f"{name} not considered: {why}" for name, why in self.excluded.items()]
        compared = f" ({'; '.join(others)})" if others else ""
        return f"{self.chosen}, {1e3 * self.picture_s:.3g} ms a picture{compared}"


_ADAPTER = pydantic.TypeAdapter(Choice)


def load_model(
    folder: Path | str = DEFAULT_CHECKPOINT,
    config: BackendConfig = BackendConfig(),
    device: str | None = None,
    adapters: Sequence[Adapter] = (),
) -> LoadedModel:
    """Open, check and load a checkpoint.

    Args:
        folder: Checkpoint folder; the embedded checkpoint by default.
        config: Backend, precision and artifacts.
        device: Replaces `config.device`.
        adapters: LoRAs to merge into the weights, beside those of the recipe.

    Raises:
        CheckpointError: The folder cannot be served; the message says why and what to do.
        BackendError: The backend cannot run here, or its artifacts belong to another checkpoint or machine.
    """
    checkpoint = open_checkpoint(Path(folder), adapters=adapters)
    return load_checkpoint(checkpoint, replace(config, device=device or config.device))


def load_checkpoint(checkpoint: Checkpoint, config: BackendConfig = BackendConfig()) -> LoadedModel:
    """Load an opened checkpoint.

    Raises:
        CheckpointError, BackendError: See `load_model`.
    """
    try:
        return _loaded(checkpoint, config)
    except ArtifactError as error:
        if not config.allow_fallback:
            raise
        model = _loaded(
            checkpoint, BackendConfig("torch", threads=config.threads, device=config.device, text=config.text)
        )
        return replace(model, choice=f"{model.backend} in place of {config.backend}: {error}")


def _loaded(checkpoint: Checkpoint, config: BackendConfig) -> LoadedModel:
    artifacts = Artifacts.find(checkpoint, config)
    if config.backend != "auto":
        counts = [config.threads] if config.threads != 0 else _thread_counts(0, checkpoint)
        if len(counts) == 1:
            return artifacts.load(config.backend, config.precision, counts[0], config.device)
    kept, machine = artifacts.folder / CHOICE_FILE, _machine(artifacts, config)
    with ThreadPoolExecutor(1) as passing:  # torch's OpenMP workers end with this thread
        if (choice := _read_choice(kept)) is not None and choice.machine == machine:
            model = _chosen(artifacts, config, choice)
            if not passing.submit(_was_busy, choice, model).result():
                return model
        choice = passing.submit(_measured, artifacts, config, machine).result()
    if artifacts.manifest is not None:
        _keep_choice(kept, choice)
    return _chosen(artifacts, config, choice)


def _chosen(artifacts: Artifacts, config: BackendConfig, choice: Choice) -> LoadedModel:
    best = choice.chosen
    return replace(artifacts.load(best.backend, best.precision, best.threads, config.device), choice=str(choice))


def _was_busy(choice: Choice, model: LoadedModel) -> bool:
    """Whether other work kept the machine busy when this choice was measured: the model is much faster now."""
    known_s = choice.picture_s
    return known_s <= FEW_THREADS_BELOW_S and picture_seconds(model, CHECK_ROUNDS) < known_s / BUSY


def _keep_choice(file: Path, choice: Choice) -> None:
    with contextlib.suppress(OSError):  # a read-only folder: every start measures again
        write_whole(file, _ADAPTER.dump_json(choice, indent=2))


def _read_choice(file: Path) -> Choice | None:
    try:
        return _ADAPTER.validate_json(file.read_bytes())
    except (OSError, pydantic.ValidationError):  # the choice can be measured again
        return None


def _machine(artifacts: Artifacts, config: BackendConfig) -> str:
    """Describe all that a measurement depends on, the manifest too: `tdm-export --verify` changes parities."""
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    versions = " ".join(f"{name} {version}" for name, version in installed(TOOLS).items())
    wanted = f"{config.backend} {config.precision} {config.threads} {config.device} {config.provider}"
    manifest = file_sha256(artifacts.folder / MANIFEST_FILE)[:12] if artifacts.manifest else None
    processors = f"{cpu} ({' '.join(cpu_features())}), {cores()} cores, {gpu_name()}"
    return f"{processors}, {versions}, {wanted}, manifest {manifest}"


def _measured(artifacts: Artifacts, config: BackendConfig, machine: str) -> Choice:
    times: dict[str, tuple[Candidate, float]] = {}
    excluded: dict[str, str] = {}
    is_auto = config.backend == "auto"
    most_threads, *fewer = _thread_counts(config.threads, artifacts.checkpoint)
    for backend, precision in _candidates(artifacts, config):
        name = f"{backend} {precision}"
        try:
            if is_auto and (why := _falls_short(artifacts, backend, precision)):
                excluded[name] = why
                continue
            model = artifacts.load(backend, precision, most_threads, config.device)
            times[name] = (Candidate(backend, precision, most_threads), picture_seconds(model))
        except ArtifactError:
            raise
        except BackendError as error:
            excluded[name] = str(error)
    if not times and not excluded:
        remedy = export_command(artifacts.checkpoint, artifacts.folder, precision=config.precision)
        raise ArtifactError(f"{artifacts.checkpoint.recipe.name} was not built at {config.precision}; run `{remedy}`")
    if not times:
        reasons = "; ".join(f"{name}: {why}" for name, why in excluded.items())
        raise BackendError(f"no backend runs {artifacts.checkpoint.recipe.name} here: {reasons}")
    name = min(times, key=lambda one: times[one][1])
    chosen, seconds = times[name]
    if fewer and seconds <= FEW_THREADS_BELOW_S:
        chosen, seconds = _with_best_threads(artifacts, config.device, chosen, seconds, fewer)
    picture_ms = {one: 1e3 * (seconds if one == name else times[one][1]) for one in times}
    return Choice(machine, chosen, picture_ms, excluded)


def _with_best_threads(
    artifacts: Artifacts, device: str | None, chosen: Candidate, seconds: float, fewer: Sequence[int]
) -> tuple[Candidate, float]:
    """Compare thread counts by calls in turns, so that other work on the machine affects them alike.

    Args:
        seconds: of a picture on all cores.
        fewer: thread counts below the candidate's.

    Returns:
        The candidate with the best count, and the seconds of one picture with it.
    """
    candidates = [chosen, *(replace(chosen, threads=threads) for threads in fewer)]
    models, pictures = _with_threads(artifacts, device, candidates, seconds)
    best = _best_threads(least_seconds_of(pictures, ROUNDS, THREADS_S))
    return (candidates[best], picture_seconds(models[best])) if best else (chosen, seconds)


def _with_threads(
    artifacts: Artifacts, device: str | None, candidates: Sequence[Candidate], seconds: float
) -> tuple[list[LoadedModel], list[Callable[[], object]]]:
    """Return the model of each candidate, and a function that makes a batch of pictures with it.

    Args:
        seconds: of a picture.
    """
    batch = max(1, min(THREADS_BATCH, int(THREADS_CALL_S / seconds)))
    models = [artifacts.load(one.backend, one.precision, one.threads, device) for one in candidates]
    return models, [_picture(model, batch) for model in models]


def _best_threads(seconds: Sequence[float]) -> int:
    """Return the index of the best thread count. The first is that of all cores; a smaller one must be much faster."""
    all_cores_s, *fewer_s = seconds
    fewest_s = min(fewer_s)
    return 0 if fewest_s * FEW_THREADS_GAIN > all_cores_s else 1 + fewer_s.index(fewest_s)


class ThreadCheck:
    """Compares the thread count of a kept choice with the others again, in short rounds, while a server is idle."""

    def __init__(self, artifacts: Artifacts, config: BackendConfig, choice: Choice, counts: Sequence[int]) -> None:
        """Load the model with each thread count, and compile what the rounds call.

        Args:
            counts: Thread counts, that of all cores first.
        """
        self._file, self._choice = artifacts.folder / CHOICE_FILE, choice
        self._candidates = [replace(choice.chosen, threads=threads) for threads in counts]
        self._models, self._pictures = _with_threads(artifacts, config.device, self._candidates, choice.picture_s)
        self._least_s = [float("inf")] * len(counts)
        for picture in self._pictures:
            picture()

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: BackendConfig) -> ThreadCheck | None:
        """Return the check of the choice that is kept for a checkpoint, or None where there is nothing to compare.

        Models on torch are not compared: a second thread that calls it would keep workers of its own.
        """
        artifacts = Artifacts.find(checkpoint, config)
        counts, choice = _thread_counts(config.threads, checkpoint), _read_choice(artifacts.folder / CHOICE_FILE)
        if len(counts) == 1 or choice is None or choice.machine != _machine(artifacts, config):
            return None
        if choice.picture_s > FEW_THREADS_BELOW_S or choice.chosen.backend in TORCH_BACKENDS:
            return None
        return cls(artifacts, config, choice, counts)

    @torch.inference_mode()
    def round(self) -> None:
        """Make a batch of pictures with each thread count, `THREADS_CALL_S` seconds each at most."""
        for index, picture in enumerate(self._pictures):
            self._least_s[index] = min(self._least_s[index], _seconds(picture))

    def better(self) -> str | None:
        """Return a sentence about a better thread count, which is kept for the next start; None if there is none."""
        best, chosen = _best_threads(self._least_s), self._choice.chosen
        if self._candidates[best] == chosen:
            return None
        times = self._least_s[self._candidates.index(chosen)] / self._least_s[best]
        picture_ms = {**self._choice.picture_ms, chosen.name: 1e3 * picture_seconds(self._models[best], CHECK_ROUNDS)}
        changed = replace(self._choice, chosen=self._candidates[best], picture_ms=picture_ms)
        _keep_choice(self._file, changed)
        return (
            f"it runs on {chosen}, and with {changed.chosen.threads} it is {times:.2f} times as fast now; "
            "the next start uses them"
        )


def _candidates(artifacts: Artifacts, config: BackendConfig) -> Iterator[tuple[BackendName, Precision]]:
    if config.backend != "auto":
        precision = config.precision
        if precision is None:
            build = artifacts.manifest.find(config.backend, None) if artifacts.manifest else None
            precision = build.precision if build else "fp32"
        yield config.backend, precision
        return
    on_torch: list[tuple[BackendName, Precision]] = [("torch", "fp32")]
    if gpu_architecture():
        on_torch += [("torch", "bf16"), ("torch-compiled", "bf16"), ("cuda-graphs", "fp32"), ("cuda-graphs", "bf16")]
    built = [(build.backend, build.precision) for build in artifacts.manifest.builds] if artifacts.manifest else []
    for backend, precision in itertools.chain(on_torch, built):
        if config.precision in (None, precision):
            yield backend, precision


def _falls_short(artifacts: Artifacts, backend: BackendName, precision: Precision) -> str | None:
    """Return why "auto" must not choose a candidate, or None if it runs here and its pictures are close enough."""
    manifest = artifacts.manifest
    if backend in TORCH_BACKENDS:
        if precision == "fp32":
            return None
        pictures = artifacts.parity.of_torch(backend, precision)
    else:
        build = manifest.find(backend, precision) if manifest else None
        if manifest is None or build is None:
            return None  # loading says what to run
        if build.elsewhere:
            return f"it was built for {build.elsewhere}"
        pictures = artifacts.parity.of(manifest, build)
    lowest = lowest_psnr_db(pictures)
    return f"its pictures reach {lowest:.1f} dB here, below {MIN_PSNR_DB:g} dB" if lowest < MIN_PSNR_DB else None


def _thread_counts(wanted: int | None, checkpoint: Checkpoint) -> list[int]:
    """Return the thread counts to measure: all cores first, then smaller powers of two for small pictures."""
    if wanted:
        return [wanted]
    most = cores()
    if makes_large_pictures(checkpoint):
        return [most]
    return sorted({most, *(1 << n for n in range(most.bit_length()) if 1 << n <= most)}, reverse=True)


def picture_seconds(model: LoadedModel, rounds: int = ROUNDS) -> float:
    """Return the seconds of a picture at the default step count: its steps and its decode, without the text encoder.

    A model that makes clips is measured with the fewest frames that move: one step of its rule after the first.

    Args:
        rounds: most calls of each that are measured.
    """
    step, decode = _calls(model, 1)
    return model.recipe.default_steps * least_seconds(step, rounds) + least_seconds(decode, rounds)


def _picture(model: LoadedModel, batch: int) -> Callable[[], object]:
    """Return a function that makes a batch of the pictures of `picture_seconds`."""
    step, decode = _calls(model, batch)

    def picture() -> None:
        for _ in range(model.recipe.default_steps):
            step()
        decode()

    return picture


@torch.inference_mode()
def _calls(model: LoadedModel, batch: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return one step and the decode of a batch of the pictures of `picture_seconds`."""
    recipe = model.recipe
    width, height = recipe.native_sizes[0]
    frames = None if recipe.frames is None else min(1 + recipe.frames.step, recipe.frames.max_frames)
    params = SamplingParams("warm-up", 0, recipe.default_steps, width, height, frames=frames)
    device = model.denoiser.device
    prompt = model.conditioning(model.embedding(params), params).expand(batch)
    latents = torch.zeros(batch, *model.latent_shape(params), device=device)
    first_timestep = recipe.step_table(recipe.default_steps, width, height).timesteps[0]
    timesteps = torch.full((batch,), first_timestep, dtype=torch.float32).to(device)
    step_counts = torch.full((batch,), recipe.default_steps, device=device)
    step = partial(denoise, [model] * batch, latents, timesteps, step_counts, prompt)
    return step, partial(model.decoders["full"].decode, latents)


def least_seconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the least seconds of a few calls after a first one. A slow call is measured once.

    Args:
        rounds: most calls that are measured.
    """
    return least_seconds_of([call], rounds, ROUNDS_S)[0]


@torch.inference_mode()
def least_seconds_of(calls: Sequence[Callable[[], object]], rounds: int, limit_s: float) -> list[float]:
    """Return the least seconds of each function. They are called in turns, after a first call that does not count.

    Args:
        rounds: most measured calls of each.
        limit_s: seconds after which no further round begins.
    """
    for call in calls:
        call()
    fewest, ends_s = [float("inf")] * len(calls), time.monotonic() + limit_s
    for _ in range(rounds):
        for index, call in enumerate(calls):
            fewest[index] = min(fewest[index], _seconds(call))
        if time.monotonic() > ends_s:
            break
    return fewest


def _seconds(call: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    started_s = time.monotonic()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - started_s
