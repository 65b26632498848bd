"""Published weight files of the scorers: where each one belongs, where to get it, and how to read it.

Nothing here downloads. A missing file gives an error that names the place, the file and its source.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Published:
    """A file or folder that somebody publishes, under the name that `tdm-train measure` looks for in `--weights`."""

    name: str
    source: str
    """Address of the page or file to get it from."""

    def require(self, place: Path) -> Path:
        """Return `place`, a file.

        Raises:
            FileNotFoundError: There is no such file. The message says what to get, from where, and where to put it.
        """
        if not place.is_file():
            raise FileNotFoundError(f"{place} is missing; get {self.name} from {self.source} and put it there")
        return place

    def require_folder(self, folder: Path, files: Sequence[str]) -> Path:
        """Return `folder`, which must hold `files`.

        Raises:
            FileNotFoundError: Some of the files are missing; the message names them all, as above.
        """
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise FileNotFoundError(
                f"{folder} lacks {', '.join(missing)}; get them from {self.source} and put them there"
            )
        return folder


CLIP_L = Published("clip-vit-large-patch14", "https://huggingface.co/openai/clip-vit-large-patch14")
"""A transformers folder. Its tokenizer serves HPS too: all CLIP models have the same tokens."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CLIP_FILES = ("config.json", "model.safetensors", *TOKENIZER_FILES)
AESTHETIC = Published(
    "sac+logos+ava1-l14-linearMSE.pth", "https://github.com/christophschuhmann/improved-aesthetic-predictor"
)
HPS = Published("HPS_v2.1_compressed.pt", "https://huggingface.co/xswu/HPSv2")
INCEPTION = Published(
    "pt_inception-2015-12-05-6726825d.pth", "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"
)
"""State dict of pytorch-fid."""
INCEPTION_FILES = (INCEPTION.name, "weights-inception-2015-12-05-6726825d.pth", "inception-2015-12-05.pt")
"""Files with the same Inception weights: those of pytorch-fid, torch-fidelity, and StyleGAN2-ADA and clean-fid."""


def load_state(file: Path, published: Published) -> Mapping[str, Tensor]:
    """Read a state dict from safetensors, or from a pickle that holds tensors only.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file cannot be read.
    """
    published.require(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{file} cannot be read ({reason}); get {published.name} from {published.source} again"
        ) from None
    found: Mapping[str, Tensor] = state.get("state_dict", state)
    return found


def is_torchscript(file: Path) -> bool:
    """Return whether a file is a TorchScript archive, which holds code beside tensors."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())
