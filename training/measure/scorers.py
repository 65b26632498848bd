"""Published scorers of text-to-image pictures, with weights from disk. They download nothing.

| scorer | measures | weights |
|---|---|---|
| `CLIPScore` | whether the picture shows the words | a transformers CLIPModel folder |
| `AestheticScore` | whether the picture is pleasing | the folder of CLIP ViT-L/14, and the LAION head |
| `HPSScore` | whether people would prefer the picture (HPS v2.1) | one open_clip state dict |
| `InceptionFeatures` | features for the Frechet distance (FID) | one TorchScript file |

Pictures are uint8 [H, W, 3]. Each picture has one prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tdm_runtime.model.decoder import Pixels
from training.measure.metrics import Features

BATCH_SIZE = 32
CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), dtype=np.float32)
CLIP_STD = np.array((0.26862954, 0.26130258, 0.27577711), dtype=np.float32)
INCEPTION_SIDE_PX = 299
INCEPTION_FEATURES = 2048


class CLIPEmbedder:
    """A CLIP model with its tokenizer. It maps pictures and prompts to unit vectors [N, D] of one space."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._side_px = int(model.config.vision_config.image_size)
        self._max_tokens = int(model.config.text_config.max_position_embeddings)

    @classmethod
    def open(cls, folder: Path) -> CLIPEmbedder:
        """Load a CLIPModel folder with a tokenizer, as transformers saves it.

        Raises:
            FileNotFoundError: The folder does not exist.
        """
        require_file(
            folder / "config.json",
            "put a transformers CLIPModel folder with its tokenizer there, such as openai/clip-vit-large-patch14",
        )
        return cls(
            CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True),
            CLIPTokenizer.from_pretrained(folder, local_files_only=True),
        )

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Pixels]) -> Tensor:
        """Embed pictures: unit vectors [N, D]."""
        found = []
        for start in range(0, len(pictures), BATCH_SIZE):
            batch = torch.stack([clip_pixels(p, self._side_px) for p in pictures[start : start + BATCH_SIZE]])
            found.append(self._model.get_image_features(pixel_values=batch).pooler_output)
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
            found.append(self._model.get_text_features(input_ids=tokens["input_ids"]).pooler_output)
        return F.normalize(torch.cat(found), dim=-1)

    def similarities(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each picture with its prompt, [N].

        Raises:
            ValueError: The numbers of pictures and prompts differ, or are 0.
        """
        if len(pictures) != len(prompts) or not pictures:
            raise ValueError(
                f"got {len(pictures)} pictures and {len(prompts)} prompts; give one prompt for each picture"
            )
        return (self.pictures(pictures) * self.prompts(prompts)).sum(-1)


class CLIPScore:
    """CLIP score: 100 * cosine of picture and prompt, at least 0 (Hessel et al. 2021, with the usual weight of 100)."""

    def __init__(self, embedder: CLIPEmbedder) -> None:
        self._embedder = embedder

    @classmethod
    def open(cls, folder: Path) -> CLIPScore:
        """Load a CLIPModel folder, see `CLIPEmbedder.open`."""
        return cls(CLIPEmbedder.open(folder))

    def score(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> float:
        """Return the mean over the pictures, 0..100."""
        return 100.0 * float(self._embedder.similarities(pictures, prompts).clamp(min=0).mean())


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
    """Mean aesthetic rating of pictures."""

    def __init__(self, embedder: CLIPEmbedder, head: AestheticHead) -> None:
        self._embedder, self._head = embedder, head.eval().requires_grad_(False)

    @classmethod
    def open(cls, clip_folder: Path, head_file: Path) -> AestheticScore:
        """Load CLIP ViT-L/14 and the head, `sac+logos+ava1-l14-linearMSE.pth` or the same as safetensors.

        Raises:
            FileNotFoundError: One of them is missing.
        """
        state = load_state(
            head_file,
            "get sac+logos+ava1-l14-linearMSE.pth of christophschuhmann/improved-aesthetic-predictor and put it there",
        )
        head = AestheticHead()
        head.load_state_dict(dict(state))
        return cls(CLIPEmbedder.open(clip_folder), head)

    @torch.inference_mode()
    def score(self, pictures: Sequence[Pixels], prompts: Sequence[str] = ()) -> float:
        """Return the mean over the pictures. Prompts are ignored."""
        return float(self._head(self._embedder.pictures(pictures)).mean())


class HPSScore:
    """Human Preference Score v2.1: 100 * cosine of a CLIP ViT-H/14 trained on people's choices (Wu et al. 2023)."""

    def __init__(self, embedder: CLIPEmbedder) -> None:
        self._embedder = embedder

    @classmethod
    def open(cls, file: Path, tokenizer_folder: Path, config: CLIPConfig | None = None) -> HPSScore:
        """Load the published state dict, `HPS_v2.1_compressed.pt`.

        Args:
            tokenizer_folder: Folder with the tokenizer of any CLIP model; all have the same tokens.
            config: Sizes of the model, by default those of ViT-H/14.

        Raises:
            FileNotFoundError: One of them is missing.
        """
        require_file(tokenizer_folder / "tokenizer_config.json", "put the tokenizer of any CLIPModel folder there")
        state = load_state(file, "get HPS_v2.1_compressed.pt of xswu/HPSv2 and put it there")
        model = CLIPModel(config or vit_h_14())
        model.load_state_dict(from_open_clip(state))
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        return cls(CLIPEmbedder(model, tokenizer))

    def score(self, pictures: Sequence[Pixels], prompts: Sequence[str]) -> float:
        """Return the mean over the pictures."""
        return 100.0 * float(self._embedder.similarities(pictures, prompts).mean())


class InceptionFeatures:
    """Inception-v3's pool3 features [N, 2048]. `training.measure.metrics.frechet_distance` of them is the FID."""

    def __init__(self, network: torch.jit.ScriptModule) -> None:
        self._network = network.eval()

    @classmethod
    def open(cls, file: Path) -> InceptionFeatures:
        """Load the TorchScript file that StyleGAN and clean-fid use, `inception-2015-12-05.pt`.

        Raises:
            FileNotFoundError: The file is missing.
        """
        require_file(file, "get inception-2015-12-05.pt, as StyleGAN2-ADA and clean-fid do, and put it there")
        return cls(torch.jit.load(str(file), map_location="cpu"))  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def features(self, pictures: Sequence[Pixels]) -> Features:
        """Return features of pictures, float64 [N, 2048].

        Raises:
            ValueError: The network returns features of another size.
        """
        found = []
        for start in range(0, len(pictures), BATCH_SIZE):
            batch = np.stack([_resized(p, INCEPTION_SIDE_PX) for p in pictures[start : start + BATCH_SIZE]])
            found.append(self._network(torch.from_numpy(batch).permute(0, 3, 1, 2), return_features=True))
        features: Features = torch.cat(found).double().numpy()
        if features.shape != (len(pictures), INCEPTION_FEATURES):
            raise ValueError(
                f"the network returned features of shape {list(features.shape)} instead of "
                f"{[len(pictures), INCEPTION_FEATURES]}; use inception-2015-12-05.pt"
            )
        return features


def clip_pixels(picture: Pixels, side_px: int) -> Tensor:
    """Prepare a picture for CLIP: resize, crop the centre and normalise. Return float [3, side_px, side_px]."""
    height, width = picture.shape[:2]
    scale = side_px / min(height, width)
    size = (max(side_px, round(width * scale)), max(side_px, round(height * scale)))
    large = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side_px) // 2, (size[1] - side_px) // 2
    cut = np.asarray(large.crop((left, top, left + side_px, top + side_px)), dtype=np.float32) / 255.0
    return torch.from_numpy((cut - CLIP_MEAN) / CLIP_STD).permute(2, 0, 1)


def vit_h_14() -> CLIPConfig:
    """Return the config of CLIP ViT-H/14 as open_clip builds it."""
    return CLIPConfig(
        projection_dim=1024,
        text_config={
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "hidden_act": "gelu", "projection_dim": 1024,
        },
        vision_config={
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
            "hidden_act": "gelu", "patch_size": 14, "image_size": 224, "projection_dim": 1024,
        },
    )  # fmt: skip


OPEN_CLIP_NAMES: Mapping[str, str] = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
"""open_clip's name -> transformers' name, for tensors outside the layers."""
TRANSPOSED = ("text_projection", "visual.proj")
"""Names of matrices that open_clip stores transposed."""
OPEN_CLIP_LAYER_NAMES: Mapping[str, str] = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
LAYER_NAME = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert an open_clip state dict to transformers' CLIPModel layout.

    Raises:
        KeyError: A name does not belong to open_clip.
    """
    converted: dict[str, Tensor] = {}
    for full_name, tensor in state.items():
        name = full_name.removeprefix("module.")
        if name == "attn_mask":  # a constant in older files
            continue
        if match := LAYER_NAME.fullmatch(name):
            converted |= _layer_tensors(match, tensor)
        elif name in OPEN_CLIP_NAMES:
            converted[OPEN_CLIP_NAMES[name]] = tensor.T.contiguous() if name in TRANSPOSED else tensor
        else:
            raise KeyError(f"{full_name!r} is no name of an open_clip ViT; give the state dict of HPS v2.1")
    return converted


def _layer_tensors(match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    """Convert one tensor of a layer. The joint input projection of attention becomes three tensors."""
    tower = "vision_model" if match[1] else "text_model"
    prefix, part, kind = f"{tower}.encoder.layers.{match[2]}", match[3], match[4]
    if part == "attn.in_proj":
        thirds = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{letter}_proj.{kind}": third.clone() for letter, third in thirds}
    return {f"{prefix}.{OPEN_CLIP_LAYER_NAMES[part]}.{kind}": tensor}


def load_state(file: Path, remedy: str) -> Mapping[str, Tensor]:
    """Read a state dict from safetensors, or from a pickle that holds tensors only.

    Raises:
        FileNotFoundError: The file is missing. The message says what to put there.
    """
    require_file(file, remedy)
    if file.suffix == ".safetensors":
        return load_file(file)
    state: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    found: Mapping[str, Tensor] = state.get("state_dict", state)
    return found


def require_file(file: Path, remedy: str) -> None:
    """Check that a weight file exists.

    Raises:
        FileNotFoundError: The file is missing. The message names it and says what to put there.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; {remedy} (this scorer downloads nothing)")


def _resized(picture: Pixels, side_px: int) -> Pixels:
    """Resize by bicubic interpolation with antialiasing, as clean-fid does."""
    return np.asarray(Image.fromarray(picture).resize((side_px, side_px), Image.Resampling.BICUBIC))
