"""Published scorers of text-to-image pictures, with weights from disk. They download nothing.

| scorer | measures | weights |
|---|---|---|
| `CLIPScore` | whether the picture shows the words | a transformers CLIPModel folder |
| `AestheticScore` | whether the picture is pleasing | the folder of CLIP ViT-L/14, and the LAION head |
| `HPSScore` | whether people would prefer the picture (HPS v2.1) | one open_clip state dict |

Pictures are uint8 [H, W, 3]. Each picture has one prompt. `tests/training/measure/test_real_packages.py` compares the
scores with those of the packages that publish them.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.initialization import no_init_weights

from tdm_runtime.model.decoder import Pixels
from training.measure.open_clip_layout import from_open_clip, vit_h_14
from training.measure.weights import AESTHETIC, CLIP_FILES, CLIP_L, HPS, TOKENIZER_FILES, load_state

BATCH_SIZE = 32
CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), dtype=np.float32)
CLIP_STD = np.array((0.26862954, 0.26130258, 0.27577711), dtype=np.float32)
STRAIGHT = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)

Scores = NDArray[np.float64]
"""A number for each picture, [N]."""
Prepare = Callable[[Pixels, int], Tensor]
"""Returns a picture as a CLIP model reads it, float [3, side, side]."""


def clip_pixels(picture: Pixels, side_px: int) -> Tensor:
    """Prepare a picture as CLIP's own processor does: resize, crop the centre and normalise."""
    height, width = picture.shape[:2]
    short = min(height, width)
    size = (width * side_px // short, height * side_px // short)
    large = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side_px) // 2, (size[1] - side_px) // 2
    cut = np.asarray(large.crop((left, top, left + side_px, top + side_px)), dtype=np.float32) / 255.0
    return torch.from_numpy((cut - CLIP_MEAN) / CLIP_STD).permute(2, 0, 1)


def hps_pixels(picture: Pixels, side_px: int) -> Tensor:
    """Prepare a picture as HPS does: resize in floating point until the longer side fits, pad with black, normalise."""
    height, width = picture.shape[:2]
    scale = side_px / max(height, width)
    size = (round(height * scale), round(width * scale))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()[None] / 255.0
    if scale != 1.0:
        pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
    rows, columns = side_px - size[0], side_px - size[1]
    pixels = F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return (pixels[0] - torch.from_numpy(CLIP_MEAN)[:, None, None]) / torch.from_numpy(CLIP_STD)[:, None, None]


def as_open_clip_reads(prompt: str) -> str:
    """Return a prompt with HTML entities decoded and quotation marks straight, before open_clip makes tokens of it."""
    return html.unescape(html.unescape(prompt.translate(STRAIGHT)))


class CLIPEmbedder:
    """A CLIP model with its tokenizer. It maps pictures and prompts to unit vectors [N, D] of one space."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, prepare: Prepare = clip_pixels) -> None:
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._prepare = prepare
        self._side_px = int(model.config.vision_config.image_size)
        self._max_tokens = int(model.config.text_config.max_position_embeddings)

    @classmethod
    def open(cls, folder: Path, device: str = "cpu") -> CLIPEmbedder:
        """Load a CLIPModel folder with a tokenizer, as transformers saves it.

        Raises:
            FileNotFoundError: The folder, or one of its files, does not exist.
        """
        CLIP_L.require_folder(folder, CLIP_FILES)
        return cls(
            CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device),
            CLIPTokenizer.from_pretrained(folder, local_files_only=True),
        )

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Pixels]) -> Tensor:
        """Embed pictures: unit vectors [N, D]."""
        found = []
        for start in range(0, len(pictures), BATCH_SIZE):
            batch = torch.stack([self._prepare(p, self._side_px) for p in pictures[start : start + BATCH_SIZE]])
            found.append(self._model.get_image_features(pixel_values=batch.to(self._model.device)).pooler_output)
        return F.normalize(torch.cat(found), dim=-1)

    @torch.inference_mode()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts: unit vectors [N, D]."""
        found = []
        for start in range(0, len(prompts), BATCH_SIZE):
            tokens = self._tokenizer(
                list(prompts[start : start + BATCH_SIZE]),
                padding="max_length",
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            )
            # No mask: CLIP was trained without one, and its text encoder is causal.
            ids = tokens["input_ids"].to(self._model.device)
            found.append(self._model.get_text_features(input_ids=ids).pooler_output)
        return F.normalize(torch.cat(found), dim=-1)

    def similarities(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> Scores:
        """Return the cosine of each picture with its prompt, [N].

        Raises:
            ValueError: The numbers of pictures and prompts differ, or are 0.
        """
        if len(pictures) != len(prompts) or not pictures:
            raise ValueError(
                f"got {len(pictures)} pictures and {len(prompts)} prompts; give one prompt for each picture"
            )
        return _as_scores((self.pictures(pictures) * self.prompts(prompts)).sum(-1))


class CLIPScore:
    """CLIP score: 100 * cosine of picture and prompt, at least 0 (Hessel et al. 2021, with the usual weight of 100)."""

    def __init__(self, embedder: CLIPEmbedder) -> None:
        self._embedder = embedder

    @classmethod
    def open(cls, folder: Path, device: str = "cpu") -> CLIPScore:
        """Load a CLIPModel folder, see `CLIPEmbedder.open`."""
        return cls(CLIPEmbedder.open(folder, device))

    def scores(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> Scores:
        """Return the score of each picture, 0..100."""
        return 100.0 * self._embedder.similarities(pictures, prompts).clip(min=0.0)


class AestheticHead(nn.Module):
    """LAION's improved aesthetic predictor: unit embeddings [B, 768] of CLIP ViT-L/14 -> ratings [B], about 1..10."""

    def __init__(self) -> None:
        super().__init__()
        # The published head has no activations. The dropouts keep the numbers in the state dict's keys.
        self.layers = nn.Sequential(
            nn.Linear(768, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return ratings [B]."""
        ratings: Tensor = self.layers(embeddings)
        return ratings.squeeze(-1)


class AestheticScore:
    """Aesthetic rating of pictures."""

    def __init__(self, embedder: CLIPEmbedder, head: AestheticHead) -> None:
        self._embedder, self._head = embedder, head.eval().requires_grad_(False)

    @classmethod
    def open(cls, clip_folder: Path, head_file: Path, device: str = "cpu") -> AestheticScore:
        """Load CLIP ViT-L/14 and the head, `sac+logos+ava1-l14-linearMSE.pth` or the same as safetensors.

        Raises:
            FileNotFoundError: One of them is missing.
            ValueError: The file holds no such head.
        """
        head = AestheticHead()
        _fill(head, dict(load_state(head_file, AESTHETIC)), head_file, AESTHETIC.name)
        return cls(CLIPEmbedder.open(clip_folder, device), head.to(device))

    @torch.inference_mode()
    def scores(self, pictures: Sequence[Pixels], prompts: Sequence[str] = ()) -> Scores:
        """Return the rating of each picture. Prompts are ignored."""
        return _as_scores(self._head(self._embedder.pictures(pictures)))


class HPSScore:
    """Human Preference Score v2.1: 100 * cosine of a CLIP ViT-H/14 trained on people's choices (Wu et al. 2023)."""

    def __init__(self, embedder: CLIPEmbedder) -> None:
        self._embedder = embedder

    @classmethod
    def open(
        cls, file: Path, tokenizer_folder: Path, config: CLIPConfig | None = None, device: str = "cpu"
    ) -> HPSScore:
        """Load the published state dict, `HPS_v2.1_compressed.pt`.

        Args:
            tokenizer_folder: Folder with the tokenizer of any CLIP model; all have the same tokens.
            config: Sizes of the model, by default those of ViT-H/14.

        Raises:
            FileNotFoundError: One of them is missing.
            ValueError: The file holds no such model.
        """
        CLIP_L.require_folder(tokenizer_folder, TOKENIZER_FILES)
        state = from_open_clip(load_state(file, HPS))
        with no_init_weights():  # random numbers for a billion weights take half a minute
            model = CLIPModel(config or vit_h_14())
        _fill(model, state, file, HPS.name)
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        return cls(CLIPEmbedder(model.to(device), tokenizer, hps_pixels))

    def scores(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> Scores:
        """Return the score of each picture."""
        return 100.0 * self._embedder.similarities(pictures, [as_open_clip_reads(prompt) for prompt in prompts])


def _fill(module: nn.Module, state: dict[str, Tensor], file: Path, name: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} does not hold the weights of {name}: {reason[:200]}") from None


def _as_scores(values: Tensor) -> Scores:
    scores: Scores = values.double().cpu().numpy()
    return scores
