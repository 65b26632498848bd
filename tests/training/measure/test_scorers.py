"""The scorers load published layouts, tested with tiny models in those layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tests.training.measure.random_inception import random_inception
from training.measure.inception import InceptionFeatures, fid_pixels
from training.measure.open_clip_layout import from_open_clip, vit_h_14
from training.measure.scorers import (
    AestheticHead,
    AestheticScore,
    CLIPEmbedder,
    CLIPScore,
    HPSScore,
    as_open_clip_reads,
    clip_pixels,
    hps_pixels,
)

PICTURES = [np.random.default_rng(n).integers(0, 256, (40, 50, 3), dtype=np.uint8) for n in range(3)]
PROMPTS = ["a red heart", "a cat", "two dogs"]
EXPECTED_FEATURES = {1: 1.3183, 320: 1.7229, 705: 1.7579, 1091: 2.3716, 1472: 5.6938, 1858: 1.9318}
"""Number of a feature and its value for the picture of the test."""


@pytest.fixture(scope="module")
def tokenizer(checkpoint_folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(checkpoint_folder / "tokenizer")


def tiny_config(tokenizer: CLIPTokenizer, projection: int = 8) -> CLIPConfig:
    """Return a small ViT-H/14: two layers, with different widths for pictures and words."""
    sizes = {"num_hidden_layers": 2, "hidden_act": "gelu", "projection_dim": projection, "intermediate_size": 24}
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPConfig(
        projection_dim=projection,
        text_config=sizes
        | tokens
        | {"hidden_size": 12, "num_attention_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config=sizes | {"hidden_size": 16, "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
    )


@pytest.fixture(scope="module")
def tiny_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(0)
    model = CLIPModel(tiny_config(tokenizer)).eval()
    for parameter in model.parameters():  # biases start at zero, which would hide a missing or swapped one
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def clip_folder(tiny_clip: CLIPModel, tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert transformers' names to open_clip's, with q, k and v in one tensor. The inverse is tested."""
    plain = {
        "logit_scale": "logit_scale",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
        "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
        "vision_model.post_layernorm.weight": "visual.ln_post.weight",
        "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    }
    found = {theirs: state[ours] for ours, theirs in plain.items()}
    found["text_projection"] = state["text_projection.weight"].T.contiguous()
    found["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
             "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip
    for tower, prefix in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        for layer in range(2):
            ours, theirs = f"{tower}.encoder.layers.{layer}", f"{prefix}.resblocks.{layer}"
            for kind in ("weight", "bias"):
                thirds = [state[f"{ours}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(thirds)
                for name, their_name in names.items():
                    found[f"{theirs}.{their_name}.{kind}"] = state[f"{ours}.{name}.{kind}"]
    return found


def test_from_open_clip_restores_every_tensor(tiny_clip: CLIPModel) -> None:
    state = tiny_clip.state_dict()
    back = from_open_clip(
        {f"module.{name}": t for name, t in to_open_clip(state).items()} | {"attn_mask": torch.ones(2)}
    )
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="no name of an open_clip ViT"):
        from_open_clip({"visual.trunk.stem.weight": torch.ones(1)})


def test_hps_scores_like_the_model_it_was_converted_from(
    tiny_clip: CLIPModel, tokenizer: CLIPTokenizer, clip_folder: Path, tmp_path: Path
) -> None:
    torch.save({"state_dict": to_open_clip(tiny_clip.state_dict())}, tmp_path / "hps.pt")
    scorer = HPSScore.open(tmp_path / "hps.pt", clip_folder, tiny_config(tokenizer))
    expected = 100 * CLIPEmbedder(tiny_clip, tokenizer, hps_pixels).similarities(PICTURES, PROMPTS)
    assert scorer.scores(PICTURES, PROMPTS) == pytest.approx(expected, rel=1e-5)
    torch.save(AestheticHead().state_dict(), tmp_path / "head.pt")
    with pytest.raises(ValueError, match=r"'layers.0.weight' is no name of an open_clip ViT"):
        HPSScore.open(tmp_path / "head.pt", clip_folder, tiny_config(tokenizer))
    with pytest.raises(ValueError, match=r"hps.pt does not hold the weights of HPS_v2.1_compressed.pt"):
        HPSScore.open(tmp_path / "hps.pt", clip_folder, tiny_config(tokenizer, projection=9))
    (tmp_path / "hps.pt").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"hps.pt cannot be read .* get HPS_v2.1_compressed.pt from"):
        HPSScore.open(tmp_path / "hps.pt", clip_folder, tiny_config(tokenizer))


def test_vit_h_14_has_the_published_shapes() -> None:
    with torch.device("meta"):
        state = CLIPModel(vit_h_14()).state_dict()
    assert state["visual_projection.weight"].shape == (1024, 1280)
    assert state["vision_model.embeddings.position_embedding.weight"].shape == (257, 1280)
    assert state["text_model.encoder.layers.23.mlp.fc1.weight"].shape == (4096, 1024)
    assert sum(tensor.numel() for tensor in state.values()) == pytest.approx(986e6, rel=0.001)


def test_clip_score_equals_the_forward_pass_of_transformers(
    tiny_clip: CLIPModel, tokenizer: CLIPTokenizer, clip_folder: Path
) -> None:
    pixels = torch.stack([clip_pixels(picture, 28) for picture in PICTURES])
    ids = tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = tiny_clip(input_ids=ids, pixel_values=pixels)
    expected = 100 * (output.image_embeds * output.text_embeds).sum(-1).clamp(min=0)
    assert CLIPScore.open(clip_folder).scores(PICTURES, PROMPTS) == pytest.approx(expected.numpy(), rel=1e-4)
    with pytest.raises(ValueError, match="3 pictures and 1 prompts"):
        CLIPScore.open(clip_folder).scores(PICTURES, PROMPTS[:1])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_aesthetic_head_is_loaded_in_its_published_layout(
    suffix: str, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    state = {f"layers.{n}.weight": torch.randn(shape) / shape[1] ** 0.5 for n, shape in sizes.items()}
    state |= {f"layers.{n}.bias": torch.randn(shape[0]) for n, shape in sizes.items()}
    file = tmp_path / f"head{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    CLIPModel(tiny_config(tokenizer, projection=768)).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    scorer = AestheticScore.open(tmp_path / "clip", file)
    x = CLIPEmbedder.open(tmp_path / "clip").pictures(PICTURES)
    for n in sizes:
        x = x @ state[f"layers.{n}.weight"].T + state[f"layers.{n}.bias"]
    assert scorer.scores(PICTURES) == pytest.approx(x[:, 0].numpy(), rel=1e-4)
    assert set(AestheticHead().state_dict()) == set(state)


def test_pictures_are_prepared_as_each_scorer_publishes() -> None:
    """CLIP crops the centre. HPS keeps the whole picture and pads with black. Both leave a fitting square alone."""
    square = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    assert torch.allclose(clip_pixels(square, 28), hps_pixels(square, 28), atol=1e-6)
    wide = np.full((20, 60, 3), 255, dtype=np.uint8)
    black, white = hps_pixels(np.zeros((28, 28, 3), np.uint8), 28)[:, 0, 0], hps_pixels(square * 0 + 255, 28)[:, 0, 0]
    assert torch.allclose(clip_pixels(wide, 28), white[:, None, None].expand(3, 28, 28), atol=1e-5)
    padded = hps_pixels(wide, 28)
    assert torch.equal(padded[:, 0, 0], black)
    assert torch.equal(
        padded[:, 9:18, :].isclose(white[:, None, None], atol=1e-5), torch.ones(3, 9, 28, dtype=torch.bool)
    )
    assert as_open_clip_reads("a \u201cfox\u201d &amp;amp; a cat") == 'a "fox" & a cat'


class TinyInception(nn.Module):
    """Returns the mean of each picture as every feature, as the part `layers` of a TorchScript archive."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = TinyLayers(size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


class TinyLayers(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1:] == (3, 299, 299)
        return pixels.mean(dim=[1, 2, 3])[:, None].expand(-1, self.size)


def test_inception_features_come_from_a_torchscript_file(tmp_path: Path) -> None:
    torch.jit.script(TinyInception(2048)).save(str(tmp_path / "inception.pt"))
    found = InceptionFeatures.open(tmp_path / "inception.pt").features(PICTURES)
    assert found.shape == (3, 2048)
    assert found.dtype == np.float64
    means = [(float(fid_pixels(picture).mean()) - 128) / 128 for picture in PICTURES]
    assert found[:, 0] == pytest.approx(means, abs=1e-4)
    torch.jit.script(TinyInception(1000)).save(str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match="1000 features instead of 2048; use pt_inception-2015-12-05"):
        InceptionFeatures.open(tmp_path / "other.pt").features(PICTURES)


def test_inception_features_come_from_a_state_dict(tmp_path: Path) -> None:
    """The numbers are those of torch-fidelity 0.4.0 with the same random weights; see `test_real_packages.py`."""
    torch.save(random_inception(), tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    picture = np.random.default_rng(0).integers(0, 256, (299, 299, 3), dtype=np.uint8)
    found = InceptionFeatures.open(tmp_path / "pt_inception-2015-12-05-6726825d.pth").features([picture])[0]
    assert [float(found[n]) for n in EXPECTED_FEATURES] == pytest.approx(list(EXPECTED_FEATURES.values()), rel=1e-3)
    torch.save(AestheticHead().state_dict(), tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"head.pth holds no Inception-v3; get pt_inception"):
        InceptionFeatures.open(tmp_path / "head.pth")


def test_the_error_for_missing_weights_names_the_file_to_get_and_its_path(tmp_path: Path, clip_folder: Path) -> None:
    for make, remedy in (
        (lambda: CLIPScore.open(tmp_path / "clip"), "clip-vit-large-patch14"),
        (lambda: AestheticScore.open(clip_folder, tmp_path / "head.pth"), "improved-aesthetic-predictor"),
        (lambda: HPSScore.open(tmp_path / "hps.pt", clip_folder), "HPS_v2.1_compressed.pt"),
        (lambda: InceptionFeatures.open(tmp_path / "inception.pt"), "pt_inception-2015-12-05-6726825d.pth"),
    ):
        with pytest.raises(FileNotFoundError, match=remedy) as caught:
            make()
        assert str(tmp_path) in str(caught.value)
        assert "https://" in str(caught.value)
