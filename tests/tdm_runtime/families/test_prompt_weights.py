"""Weighted words in prompts: the syntax, the rule against an independent calculation, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.families.prompt_weights import MAX_CHUNKS, chunks_of, parse_weights
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.text_encoder import PromptKey
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.stock_checkpoints import CASES, save_checkpoint

Pairs = list[tuple[str, float]]


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint, BackendConfig(threads=1), device="cpu")


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(CASES["SDXL-Lightning"], tmp_path_factory.mktemp("sdxl") / "folder")


@pytest.fixture(scope="module")
def sdxl(sdxl_folder: Path) -> LoadedModel:
    return load_model(sdxl_folder, BackendConfig(threads=1), device="cpu")


def weighted(model: LoadedModel, prompt: str, **changes: Any) -> SamplingParams:
    width, height = model.recipe.native_sizes[0]
    steps = model.recipe.step_counts[-1]
    return replace(SamplingParams(prompt, 7, steps, width, height, prompt_syntax="a1111"), **changes)


# -- the syntax ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "pairs"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("((red))", [("red", 1.21)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red : 0.5 )", [("red ", 0.5)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("([red])", [("red", 1.0)]),
        ("((red:2) cat)", [("red", 2.2), (" cat", 1.1)]),
        ("(a (b:2):-0.5)", [("a ", -0.5), ("b", -1.0)]),
        (r"\(red\) \[a\] \\", [(r"(red) [a] " + "\\", 1.0)]),
        (r"(a\):2) b", [("a)", 2.0), (" b", 1.0)]),
        (r"C:\dogs", [("C:dogs", 1.0)]),
        ("cat) and ]:1.3)", [("cat) and ]:1.3)", 1.0)]),
        ("a (red cat", [("a ", 1.0), ("red cat", 1.1)]),
        ("a [red (cat", [("a ", 1.0), ("red ", 1 / 1.1), ("cat", 1.0)]),
        ("(a:b) (1.5:)", [("a:b", 1.1), (" ", 1.0), ("1.5:", 1.1)]),
        ("()", [("", 1.0)]),
        ("(a)(b)", [("ab", 1.1)]),
    ],
)
def test_brackets_weigh_the_words_between_them(prompt: str, pairs: Pairs) -> None:
    found = [(part.text, part.weight) for part in parse_weights(prompt)]
    assert [text for text, _ in found] == [text for text, _ in pairs]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pairs])


@pytest.mark.parametrize("prompt", ["(a:11)", "(a:-10.5)", "(" * 40 + "a" + ")" * 40, "(a:" + "9" * 400 + ")"])
def test_a_weight_beyond_the_limit_is_refused(prompt: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"a weight in the prompt is .*; give -10 to 10"):
        parse_weights(prompt)


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text if letter.isalpha()]


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("", [""]),
        ("abc", ["abc"]),
        ("abcdefg", ["abcd", "efg"]),
        ("ab BREAK c", ["ab", "c"]),
        ("abcde BREAK f", ["abcd", "e", "f"]),
        ("BREAK a", ["", "a"]),
        ("a BREAK", ["a"]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("BREAKs", ["BREA", "Ks"]),
        ("(a BREAK b:2)", ["a", "b"]),
    ],
)
def test_break_and_a_full_chunk_begin_the_next(prompt: str, chunks: list[str]) -> None:
    assert ["".join(map(chr, chunk.ids)) for chunk in chunks_of(prompt, letters, 4)] == chunks


def test_a_lora_in_the_prompt_of_a_model_without_a_server_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="names the LoRA 'ink'; take it out"):
        chunks_of("cat <lora:ink:0.8>", letters, 4)


# -- the rule --------------------------------------------------------------------------------------

PROMPT = "a (red:1.4) apple [left] of ((a tree))"
PAIRS: Pairs = [("a", 1), ("red", 1.4), ("apple", 1), ("left", 1 / 1.1), ("of", 1), ("a tree", 1.21)]


def scaled(tokenizer: CLIPTokenizer, model: Any, pairs: Pairs, layer: int | None = None) -> Any:
    """Return the weighted hidden states [L, D] of a chunk, calculated apart: in float64, word by word."""
    ids, weights = [tokenizer.bos_token_id], [1.0]
    for text, weight in pairs:
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, weights = ids + part, weights + [weight] * len(part)
    length = tokenizer.model_max_length
    ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (length - len(ids) - 1)
    with torch.inference_mode():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    states = (output[0] if layer is None else output.hidden_states[layer])[0].double().numpy()
    raised = states * np.array(weights + [1.0] * (length - len(weights)))[:, None]
    return raised * (states.mean() / raised.mean())


def test_weights_scale_hidden_states_and_keep_their_mean(model: LoadedModel, checkpoint_folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint_folder / "tokenizer")
    text_model = CLIPTextModel.from_pretrained(checkpoint_folder / "text_encoder").float().eval()
    made = model.embedding(weighted(model, PROMPT))
    expected = scaled(tokenizer, text_model, PAIRS)
    np.testing.assert_allclose(made.conditioning.prompt_embeds[0], expected, rtol=1e-4, atol=1e-5)
    plain = model.embedding(weighted(model, PROMPT, prompt_syntax="plain")).conditioning.prompt_embeds
    assert np.abs(plain[0].numpy() - expected).max() > 0.1


def test_sdxl_weighs_each_encoder_and_keeps_the_pooled_embedding(sdxl: LoadedModel, sdxl_folder: Path) -> None:
    pipeline: Any = sdxl.text_encoder.encoder
    parts = [(CLIPTokenizer.from_pretrained(sdxl_folder / f"tokenizer{n}"), f"text_encoder{n}") for n in ("", "_2")]
    chunks: list[Pairs] = [[("a", 1), ("red", 1.5), ("fox", 1)], [("on", 1), ("ice", 0.5)]]
    made = sdxl.embedding(weighted(sdxl, "a (red:1.5) fox BREAK on (ice:0.5)")).conditioning
    rows = [
        np.concatenate([scaled(tokenizer, pipeline.module(name), pairs, layer=-2) for tokenizer, name in parts], 1)
        for pairs in chunks
    ]
    np.testing.assert_allclose(made.prompt_embeds[0], np.concatenate(rows), rtol=1e-4, atol=1e-5)
    first = sdxl.embedding(weighted(sdxl, "a red fox", prompt_syntax="plain")).conditioning
    torch.testing.assert_close(made.pooled_prompt_embeds, first.pooled_prompt_embeds)


def test_words_without_brackets_have_the_same_bits_in_either_syntax(tiny: LoadedModel, sdxl: LoadedModel) -> None:
    for model in (tiny, sdxl):
        one, other = (model.embedding(weighted(model, "a fox", prompt_syntax=s)) for s in ("a1111", "plain"))
        assert torch.equal(one.conditioning.prompt_embeds, other.conditioning.prompt_embeds)
        assert (one.num_tokens, one.max_tokens) == (other.num_tokens, other.max_tokens)


def test_two_syntaxes_share_no_cached_prompt(tiny: LoadedModel) -> None:
    before = tiny.text_encoder.cache_misses
    for _ in range(2):
        for syntax in ("plain", "a1111"):
            tiny.embedding(weighted(tiny, "an (uncommon) prompt", prompt_syntax=syntax))
    assert tiny.text_encoder.cache_misses == before + 2


def test_a_long_prompt_is_cut_where_the_denoiser_reads_one_chunk_and_read_where_it_reads_more(
    tiny: LoadedModel, sdxl: LoadedModel
) -> None:
    cut = tiny.embedding(weighted(tiny, "a (red) apple " * 30))
    assert cut.is_truncated and cut.conditioning.prompt_embeds.shape[1] == cut.max_tokens == 32
    whole = sdxl.embedding(weighted(sdxl, "abcdefghijklmnopq"))
    assert not whole.is_truncated and whole.conditioning.prompt_embeds.shape[1] == 24
    with pytest.raises(InvalidRequestError, match=f"has 9 chunks; at most {MAX_CHUNKS} of 10 tokens are read"):
        sdxl.embedding(weighted(sdxl, "a" + " BREAK a" * 8))


# -- pictures --------------------------------------------------------------------------------------


def test_pictures_of_any_syntax_and_length_are_the_same_in_company(sdxl: LoadedModel) -> None:
    prompts = ["a fox", "a (fox:1.5)", "a fox BREAK on ice", "a (fox) BREAK on ice BREAK at night"]
    params = [weighted(sdxl, prompt) for prompt in prompts]
    with DiffusionEngine(sdxl) as engine:
        made = [future.result(60).pixels for future in engine.submit_all(params)]
    for one, pixels in zip(params, made, strict=True):
        assert np.abs(generate(sdxl, one).astype(int) - pixels).max() <= 2
    assert len({pixels.tobytes() for pixels in made}) == len(prompts)


# -- refusals --------------------------------------------------------------------------------------


def test_break_is_refused_where_the_denoiser_reads_one_chunk(tiny: LoadedModel) -> None:
    with pytest.raises(InvalidRequestError, match=r"reads one: leave BREAK out") as caught:
        generate(tiny, weighted(tiny, "a fox BREAK on ice"))
    assert caught.value.param == "prompt"
    generate(tiny, weighted(tiny, "a fox BREAK on ice", prompt_syntax="plain"))


def test_families_whose_text_encoders_have_no_rule_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_checkpoint(CASES["PixArt-alpha"], tmp_path / "folder")
    model = load_model(folder, BackendConfig(threads=1), device="cpu")
    with pytest.raises(InvalidRequestError, match="is of the family pixart, whose text encoders") as caught:
        model.check(weighted(model, "a fox"))
    assert caught.value.param == "prompt_syntax"


def test_an_unknown_syntax_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(InvalidRequestError, match="prompt_syntax is 'compel'; it must be plain or a1111"):
        weighted(tiny, "a fox", prompt_syntax="compel")


def test_a_prompt_that_cannot_be_read_is_refused_before_it_is_accepted(tiny: LoadedModel) -> None:
    with DiffusionEngine(tiny) as engine, pytest.raises(InvalidRequestError, match="a weight in the prompt is 99"):
        engine.submit(weighted(tiny, "a (fox:99)"))


def test_a_key_keeps_only_what_an_embedding_depends_on(tiny: LoadedModel) -> None:
    assert tiny.text_encoder.key("a fox", 0.5, "plain", 8) == PromptKey("a fox")
    assert tiny.text_encoder.key("a fox", 0.5, "a1111", 8) == PromptKey("a fox", 1.0, "a1111", 8)
