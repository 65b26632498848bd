"""Training, saving and loading of the small networks of the report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.run.loop import LoopConfig, Trainable, descend, learning_rate_at, run_loop, set_learning_rate, update_ema

Network = TypeVar("Network", bound=nn.Module)


class NetworkConfig(Protocol):
    """Settings that the networks share."""

    @property
    def loop(self) -> LoopConfig: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def ema_decay(self) -> float: ...


def train_network(
    file: Path,
    stage: str,
    model: Network,
    config: NetworkConfig,
    loss_of: Callable[[int, torch.Generator], Tensor],
    evaluate: Callable[[Network], dict[str, float]],
    evaluate_every: int,
) -> None:
    """Train or resume in the folder of `file`. Write the average of the weights to `file` in float16.

    Args:
        loss_of: Returns the loss of `model` in an iteration, from its number and its random numbers.
        evaluate: Returns figures of the average for the log.
        evaluate_every: Iterations between two evaluations.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    # Faster; the average, which is saved, keeps the usual format.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)

    def train_step(step: int, generator: torch.Generator) -> dict[str, float]:
        set_learning_rate(optimizer, learning_rate_at(step, config.loop.steps, config.learning_rate))
        loss = loss_of(step, generator)
        norm = descend(optimizer, loss)
        update_ema(average, model, step, config.ema_decay)
        return {"loss": loss.item(), "grad_norm": norm}

    run_loop(
        file.parent,
        stage,
        config.loop,
        Trainable({"model": model, "average": average}, {"model": optimizer}),
        train_step,
        evaluate=lambda _: evaluate(average),
        evaluate_every=evaluate_every,
    )
    save_file({name: tensor.half() for name, tensor in average.state_dict().items()}, file)


def load_network(network: Network, file: Path, trainer: str, made: str) -> Network:
    """Fill a network with trained weights, in float32 and in eval mode.

    Args:
        trainer: Name of the function that makes the file in a folder.
        made: Name of the file that it makes.

    Raises:
        FileNotFoundError: The file is missing. The message says how to make it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; run {trainer}(folder) and copy {made} from that folder")
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    return network.eval().requires_grad_(False)
