"""Bad parameters are refused with name, value and limit in a short message; values at the limits pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.params import MAX_PROMPT_CHARACTERS, MAX_SEED, SamplingParams
from tdm_runtime.sampling.schedule import DiffusionSchedule, spaced_timesteps

LONGEST_MESSAGE = 200
RECIPE = Recipe(
    name="two-sizes",
    prediction_type="v_prediction",
    noise_schedule=DiffusionSchedule(),
    solver="ddim",
    timesteps={k: tuple(spaced_timesteps("trailing", k)) for k in (1, 2, 4)},
    default_steps=4,
    native_sizes=((64, 64), (96, 64)),
)
GOOD = SamplingParams(prompt="a red apple", seed=7, num_inference_steps=4, width=64, height=64)


def refusal(**values: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        replace(GOOD, **values).check_against(RECIPE)
    assert len(str(caught.value)) <= LONGEST_MESSAGE
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "prompt is empty; say what"),
        (" \t\n\u3000", "prompt is empty; say what"),
        ("x" * (MAX_PROMPT_CHARACTERS + 1), f"{MAX_PROMPT_CHARACTERS + 1} characters; at most {MAX_PROMPT_CHARACTERS}"),
        ("x" * 10_000_000, f"10000000 characters; at most {MAX_PROMPT_CHARACTERS}"),
        ("a\0b", "NUL"),
        ("half \ud83d", "surrogate"),
        ("\udc00 half", "surrogate"),
        (None, "prompt is None; it must be a string"),
        (7, "prompt is 7; it must be a string"),
        (b"cat", "prompt is b'cat'; it must be a string"),
        (["cat"], "prompt is ['cat']; it must be a string"),
        (["x" * 10_000_000], "it must be a string"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_prompt_is_refused(prompt: object, says: str) -> None:
    error = refusal(prompt=prompt)
    assert error.param == "prompt"
    assert says in str(error)


@pytest.mark.parametrize(
    "decoder", ["jpeg", "Full", "", None, 1, ["full"], "x" * 10_000_000], ids=lambda value: repr(value)[:30]
)
def test_an_unknown_decoder_is_refused(decoder: object) -> None:
    error = refusal(decoder=decoder)
    assert error.param == "decoder"
    assert "it must be full or tiny" in str(error)


@pytest.mark.parametrize("angle", [-0.1, 7.0, float("nan"), float("inf"), 1, True, "1.0", None])
def test_a_bad_noise_angle_is_refused(angle: object) -> None:
    error = refusal(noise_angle=angle)
    assert error.param == "noise_angle"
    assert "below 2 pi" in str(error)


def test_the_full_decoder_is_the_default() -> None:
    assert GOOD.decoder == "full"
    replace(GOOD, decoder="tiny").check_against(RECIPE)


@pytest.mark.parametrize(
    "seed",
    [-1, MAX_SEED + 1, 2**53, 2**63, 2**64, -(2**63), True, False, 7.0, float("nan"), float("inf"), "7", "", None, [7]],
    ids=repr,
)
def test_a_bad_seed_is_refused(seed: object) -> None:
    error = refusal(seed=seed)
    assert error.param == "seed"
    assert str(error) == f"seed is {seed!r}; it must be a whole number from 0 to {MAX_SEED}, or left out to draw one"


@pytest.mark.parametrize("steps", [0, -1, 3, 5, 10**6, True, False, 4.0, float("nan"), "4", None, [4]], ids=repr)
def test_a_step_count_that_the_checkpoint_does_not_list_is_refused(steps: object) -> None:
    error = refusal(num_inference_steps=steps)
    assert error.param == "num_inference_steps"
    assert str(error) == f"num_inference_steps is {steps!r}; two-sizes serves 1, 2, 4"


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (0, 0),
        (-1, 1),
        (64, 96),
        (64, 63),
        (65, 64),
        (65536, 65536),
        (64.0, 64),
        (64, 64.0),
        (True, 64),
        ("64", 64),
        ("６４", "６４"),  # noqa: RUF001  full-width digits
        (None, None),
        ([64], 64),
    ],
    ids=repr,
)
def test_a_size_that_the_checkpoint_was_not_trained_at_is_refused(width: object, height: object) -> None:
    error = refusal(width=width, height=height)
    assert error.param == "size"
    assert str(error) == f"size is {width!r}x{height!r}; two-sizes makes 64x64, 96x64"


@pytest.mark.parametrize("name", ["seed", "num_inference_steps", "width", "height"])
@pytest.mark.parametrize(
    "huge", [10**4000, 10**5000, -(10**5000), "9" * 10_000_000, [0] * 1_000_000], ids=lambda v: type(v).__name__
)
def test_a_huge_value_makes_a_short_message(name: str, huge: object) -> None:
    error = refusal(**{name: huge})
    assert error.param == ("size" if name in ("width", "height") else name)


@pytest.mark.parametrize(
    "prompt",
    [
        "x",
        "x" * MAX_PROMPT_CHARACTERS,
        "\U0001f98a" * MAX_PROMPT_CHARACTERS,
        "  a fox\nunder a tree\t",
        "تفاحة حمراء",
        "לימון",
        "\u202ered apple",
        "e\u0301",
        "a\u200bb",
    ],
    ids=lambda prompt: ascii(prompt[:12]),
)
def test_any_text_within_the_limit_is_a_prompt(prompt: str) -> None:
    params = replace(GOOD, prompt=prompt)
    params.check_against(RECIPE)
    assert params.prompt == prompt


@pytest.mark.parametrize("seed", [0, 1, 2**31, MAX_SEED])
def test_every_seed_of_32_bits_passes(seed: int) -> None:
    replace(GOOD, seed=seed).check_against(RECIPE)


@pytest.mark.parametrize("steps", RECIPE.step_counts)
@pytest.mark.parametrize(("width", "height"), RECIPE.native_sizes)
def test_every_step_count_and_size_of_the_recipe_passes(steps: int, width: int, height: int) -> None:
    replace(GOOD, num_inference_steps=steps, width=width, height=height).check_against(RECIPE)


def test_a_refusal_is_a_value_error_with_a_code() -> None:
    error = refusal(seed=-1)
    assert isinstance(error, ValueError)
    assert error.code == "invalid_value"
