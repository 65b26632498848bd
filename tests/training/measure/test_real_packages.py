"""Scores equal those of the packages that publish the scorers, from files in their formats with random weights.

The packages are no dependency of the project. To run these tests, install them into an environment that has it:
`pip install -r tests/training/measure/requirements.txt`. No weights are downloaded.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tests.training.measure.random_inception import random_inception
from training.measure.inception import InceptionFeatures
from training.measure.metrics import frechet_distance
from training.measure.open_clip_layout import vit_h_14
from training.measure.scorers import AestheticScore, CLIPEmbedder, CLIPScore, HPSScore, hps_pixels

PICTURES = [
    np.random.default_rng(n).integers(0, 256, (*size, 3), dtype=np.uint8)
    for n, size in enumerate([(64, 64), (90, 61), (33, 50), (56, 56)])
]
PROMPTS = [
    "a red heart",
    "Two  DOGS &amp; a \u201ccafé\u2019s\u201d",
    "狐",
    " ".join(["a very long prompt of many words"] * 20),
]
WIDTHS = {"text": 12, "vision": 160, "joint": 8}
"""Of the small model. The head width of vision is 80, as in ViT-H/14."""


def package(name: str) -> Any:
    """Import a package or skip the test."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision of another build of torch raises RuntimeError
        pytest.skip(f"{name} cannot be imported ({error}); see tests/training/measure/requirements.txt")


@pytest.fixture(scope="module")
def clip_tokenizer() -> CLIPTokenizer:
    """Tokenizer of transformers with CLIP's real vocabulary, which open_clip ships."""
    theirs = package("open_clip").get_tokenizer("ViT-H-14")
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(token, token): number for token, number in theirs.encoder.items()}
    return CLIPTokenizer(vocabulary, sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.get))


def small_config() -> CLIPConfig:
    """Return ViT-H/14 with narrow layers, two in each tower."""
    sizes = {"num_hidden_layers": 2, "hidden_act": "gelu", "projection_dim": WIDTHS["joint"]}
    text, vision = WIDTHS["text"], WIDTHS["vision"]
    return CLIPConfig(
        projection_dim=WIDTHS["joint"],
        text_config=sizes | {"hidden_size": text, "intermediate_size": 4 * text, "num_attention_heads": 2},
        vision_config=sizes
        | {"hidden_size": vision, "intermediate_size": 4 * vision, "num_attention_heads": 2}
        | {"patch_size": 14, "image_size": 56},
    )


def small_open_clip(model_class: Any, **options: Any) -> Any:
    """Return the same model as open_clip or hpsv2 build it, with random weights."""
    torch.manual_seed(0)
    vision = {"image_size": 56, "layers": 2, "width": WIDTHS["vision"], "head_width": 80, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": WIDTHS["text"], "heads": 2, "layers": 2}
    model = model_class(embed_dim=WIDTHS["joint"], vision_cfg=vision, text_cfg=text, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def test_hps_equals_hpsv2(clip_tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hpsv2 reads the same file, and prepares pictures of all shapes and prompts by itself."""
    scoring, architecture = package("hpsv2.img_score"), package("hpsv2.src.open_clip.model")
    transform = package("hpsv2.src.open_clip.transform")
    model = small_open_clip(architecture.CLIP, output_dict=True)
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": model.state_dict()}, file)
    prepare = transform.image_transform(56, is_train=False, resize_longest_max=True)
    monkeypatch.setattr(scoring, "model_dict", {"model": model, "preprocess_val": prepare})
    pairs = list(zip(map(Image.fromarray, PICTURES), PROMPTS, strict=True))
    expected = [100 * float(scoring.score(picture, prompt, cp=str(file))[0]) for picture, prompt in pairs]
    clip_tokenizer.save_pretrained(tmp_path / "clip")
    found = HPSScore.open(file, tmp_path / "clip", small_config()).scores(PICTURES, PROMPTS)
    assert found == pytest.approx(expected, abs=1e-3)
    assert np.ptp(found) > 1.0
    for picture in PICTURES:
        assert torch.allclose(hps_pixels(picture, 56), prepare(Image.fromarray(picture)), atol=1e-5)


def test_open_clip_embeds_as_ours(clip_tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """The state dict of today's open_clip is read too; open_clip embeds the pictures and prompts that we embed."""
    open_clip = package("open_clip")
    model = small_open_clip(open_clip.CLIP)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    clip_tokenizer.save_pretrained(tmp_path / "clip")
    pixels = torch.stack([hps_pixels(picture, 56) for picture in PICTURES])
    with torch.no_grad():
        pictures = model.encode_image(pixels, normalize=True)
        prompts = model.encode_text(open_clip.get_tokenizer("ViT-H-14")(PROMPTS), normalize=True)
    found = HPSScore.open(tmp_path / "state.pt", tmp_path / "clip", small_config()).scores(PICTURES, PROMPTS)
    assert found == pytest.approx((100 * (pictures * prompts).sum(-1)).numpy(), abs=1e-3)


def test_vit_h_14_is_that_of_open_clip() -> None:
    theirs = package("open_clip").get_model_config("ViT-H-14")
    ours = vit_h_14()
    vision, text = ours.vision_config, ours.text_config
    assert theirs["embed_dim"] == ours.projection_dim
    assert theirs["vision_cfg"] == {
        "image_size": vision.image_size, "layers": vision.num_hidden_layers, "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads, "patch_size": vision.patch_size,
    }  # fmt: skip
    assert theirs["text_cfg"] == {
        "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
        "heads": text.num_attention_heads, "layers": text.num_hidden_layers,
    }  # fmt: skip


def test_clip_score_equals_torchmetrics(clip_tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    functional = package("torchmetrics.functional.multimodal.clip_score")
    transformers = package("transformers")
    torch.manual_seed(0)
    model = CLIPModel(small_config()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    clip_tokenizer.save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessorPil(**sizes), clip_tokenizer)

    class Vectors:
        """The model with the outputs of transformers 4, which torchmetrics 1.9 expects."""

        config = model.config

        def to(self, device: torch.device) -> Vectors:
            return self

        def get_image_features(self, pixels: Tensor) -> Tensor:
            return model.get_image_features(pixel_values=pixels).pooler_output

        def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
            return model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

    ours = CLIPScore.open(tmp_path)
    pairs = list(zip(PICTURES, PROMPTS[:3], strict=False))  # torchmetrics cuts the end token off a long prompt
    for picture, prompt in pairs:
        pixels = torch.from_numpy(picture).permute(2, 0, 1)
        with torch.no_grad():
            theirs = functional.clip_score(pixels, prompt, lambda: (Vectors(), processor))
        assert ours.scores([picture], [prompt])[0] == pytest.approx(float(theirs), abs=0.02)


def test_aesthetic_score_equals_two_packages_that_read_the_published_head(
    clip_tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    predictor_class = package("aesthetics_predictor").AestheticsPredictorV2Linear
    config = small_config()
    config.projection_dim = config.vision_config.projection_dim = config.text_config.projection_dim = 768
    predictor = predictor_class(config.vision_config).eval()
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.1)
    head = {name: tensor for name, tensor in predictor.state_dict().items() if name.startswith("layers.")}
    torch.save(head, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    clip = CLIPModel(config)
    clip.load_state_dict({n: t for n, t in predictor.state_dict().items() if n not in head}, strict=False)
    clip.save_pretrained(tmp_path / "clip")
    clip_tokenizer.save_pretrained(tmp_path / "clip")
    embedder = CLIPEmbedder.open(tmp_path / "clip")
    pixels = torch.stack([embedder._prepare(picture, 56) for picture in PICTURES])
    with torch.no_grad():
        expected = predictor(pixel_values=pixels).logits[:, 0]
    found = AestheticScore.open(tmp_path / "clip", tmp_path / "sac+logos+ava1-l14-linearMSE.pth").scores(PICTURES)
    assert found == pytest.approx(expected.numpy(), rel=1e-4)
    assert np.ptp(found) > 0.01


class TorchScriptInception(nn.Module):
    """Stand-in for the archive of StyleGAN2-ADA: the part `layers`, which clean-fid calls, is a network of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 2048, 7, stride=31), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_features_and_distance_equal_clean_fid(tmp_path: Path) -> None:
    """clean-fid reads the folder and the archive, resizes, and computes the distance."""
    fid, features = package("cleanfid.fid"), package("cleanfid.features")
    torch.jit.script(TorchScriptInception()).save(str(tmp_path / "inception-2015-12-05.pt"))
    network = features.InceptionV3W(str(tmp_path), download=False)
    ours = InceptionFeatures.open(tmp_path / "inception-2015-12-05.pt")
    found = []
    for name, pictures in (("a", PICTURES), ("b", PICTURES[::-1][:3])):
        (tmp_path / name).mkdir()
        for n, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / name / f"{n}.png")
        theirs = fid.get_folder_features(
            str(tmp_path / name), network, num_workers=0, device=torch.device("cpu"), verbose=False
        )
        found.append((ours.features(pictures), theirs.astype(np.float64)))
        assert found[-1][0] == pytest.approx(found[-1][1], abs=1e-5)
    (ours_a, theirs_a), (ours_b, theirs_b) = found
    some = slice(64)  # clean-fid takes a minute for the root of a 2048 x 2048 matrix
    distance = fid.fid_from_feats(theirs_a[:, some], theirs_b[:, some])
    assert frechet_distance(ours_a[:, some], ours_b[:, some]) == pytest.approx(distance, rel=1e-3)


def test_the_network_equals_those_of_torch_fidelity_and_pytorch_fid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One state dict, three networks. At 299 pixels nobody resizes; pytorch-fid scales pixels its own way."""
    theirs, pytorch_fid = package("torch_fidelity.feature_extractor_inceptionv3"), package("pytorch_fid.inception")
    state = random_inception()
    file = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)  # as pytorch-fid's release of 2018
    pictures = np.random.default_rng(0).integers(0, 256, (2, 299, 299, 3), dtype=np.uint8)
    found = InceptionFeatures.open(file).features(list(pictures))
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    network = theirs.FeatureExtractorInceptionV3("inception", ["2048"], str(file))
    with torch.no_grad():
        assert found == pytest.approx(network(pixels)[0].numpy(), rel=1e-4, abs=1e-4)
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: state)
    other = pytorch_fid.InceptionV3([3], resize_input=False).eval()
    with torch.no_grad():
        # It computes 2 x - 1 of what it gets; TensorFlow's graph has (pixel - 128) / 128.
        expected = other(((pixels.float() - 128) / 128 + 1) / 2)[0][:, :, 0, 0]
    assert found == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-4)


def test_the_distance_equals_torch_fidelity() -> None:
    metric = package("torch_fidelity.metric_fid")
    first, second = (np.random.default_rng(n).normal(n, 1 + n, (200, 16)) for n in range(2))
    statistics = [metric.fid_features_to_statistics(torch.from_numpy(features)) for features in (first, second)]
    theirs = metric.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(first, second) == pytest.approx(float(theirs), rel=1e-6)
