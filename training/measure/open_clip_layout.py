"""State dicts in open_clip's layout, as HPS v2.1 is published, for transformers' CLIPModel."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor
from transformers import CLIPConfig


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
        ValueError: A name does not belong to open_clip.
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
            raise ValueError(f"{full_name!r} is no name of an open_clip ViT; give the state dict of HPS v2.1")
    return converted


def _layer_tensors(match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    """Convert one tensor of a layer. The joint input projection of attention becomes three tensors."""
    tower = "vision_model" if match[1] else "text_model"
    prefix, part, kind = f"{tower}.encoder.layers.{match[2]}", match[3], match[4]
    if part == "attn.in_proj":
        thirds = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{letter}_proj.{kind}": third.clone() for letter, third in thirds}
    return {f"{prefix}.{OPEN_CLIP_LAYER_NAMES[part]}.{kind}": tensor}
