"""The page of `tdm-train user-study` in a real browser, to the end; the tally equals the clicks."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tdm_runtime.media.video_file import encode_frames, read_frames
from training.cli import main
from training.measure.tally import Votes, read_key, tally
from training.measure.user_study import without_metadata

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PROMPTS = ["a red heart", "</script><b>a \"cat\"</b> & 'dog' 狐", "a fox", "a hen"]
COLOURS = {"a": 200, "b": 40}
"""Shade of each side's pictures, by which a test tells what it sees. Readers of the page have only pixels too."""


@pytest.fixture
def sides(tmp_path: Path) -> list[str]:
    """Arguments of `make`: two folders of pictures, and their prompts."""
    for side, shade in COLOURS.items():
        (tmp_path / side).mkdir()
        for number in range(len(PROMPTS)):
            picture = Image.new("RGB", (40, 30), (shade, shade, shade + number))
            picture.save(tmp_path / side / f"{number}-secret-name-{side}.png", comment="made by side " + side)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return ["--a", str(tmp_path / "a"), "--b", str(tmp_path / "b"), "--prompts", str(file)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing; pip install -e '.[dev]'")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing; apt-get install chromium")
    with playwright_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


def make(output: Path, sides: list[str], *more: str) -> dict[str, Any]:
    """Make a study and return its key."""
    assert main(["user-study", "make", *sides, "--output", str(output), *more]) == 0
    return dict(read_key(output / "key.json"))


def opened(browser: Browser, output: Path, **options: Any) -> Page:
    """Open the page of a study. It must ask for nothing but its own files, and have no error."""
    page = browser.new_context(accept_downloads=True, **options).new_page()
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "blob:", "data:")) else pytest.fail(request.url),
    )
    page.goto((output / "page" / "index.html").as_uri())
    return page


def shown_sides(page: Page) -> list[str]:
    """Return which side is first and which second, by what one sees in the middle of each."""
    page.wait_for_selector(".pair:not(.loading)")
    shots = [Image.open(io.BytesIO(choice.screenshot())) for choice in page.locator(".choice").all()]
    shades = [shot.convert("L").getpixel((shot.width // 2, shot.height // 2)) for shot in shots]
    return ["a" if shade > 120 else "b" for shade in shades]


def saved(page: Page, folder: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save answers").click()
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    return file


def test_a_rater_clicks_to_the_end_and_the_tally_equals_the_clicks(
    browser: Browser, sides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "study"
    make(output, sides, "--question", "Which is better?", "--question", "Which fits?")
    page = opened(browser, output)
    page.get_by_role("button", name="Start").click()
    preferred = iter("aabtbata")  # of the four pairs' two questions
    clicks: dict[str, list[str]] = {"Which is better?": [], "Which fits?": []}
    for number, wanted in enumerate(preferred):
        assert page.locator("#count").inner_text() == f"{number + 1} of 8"
        sides_here = shown_sides(page)
        clicks[page.locator("#question").inner_text()].append(wanted)
        choice = "tie" if wanted == "t" else ("first", "second")[sides_here.index(wanted)]
        if number == 3:  # reads itself again where it was
            assert [len(json.loads(state)["answers"]) for state in page.evaluate("Object.values(localStorage)")] == [3]
            page.reload()
            page.get_by_role("button", name="Go on").click()
            shown_sides(page)
        if number % 2:
            page.keyboard.press({"first": "1", "second": "ArrowRight", "tie": "ArrowDown"}[choice])
        else:
            page.locator(f'.pair [data-choice="{choice}"], .answers [data-choice="{choice}"]').first.click()
        if number == 4:  # takes an answer back and gives it again
            page.keyboard.press("Backspace")
            assert page.locator("#count").inner_text() == "5 of 8"
            shown_sides(page)
            page.locator(f'.answers [data-choice="{choice}"]').click()
    file = saved(page, tmp_path)
    assert (
        main(
            ["user-study", "tally", str(file), "--key", str(output / "key.json"), "--output", str(tmp_path / "t.json")]
        )
        == 0
    )
    found = json.loads((tmp_path / "t.json").read_text())
    for question, wanted in clicks.items():
        votes = found["by_question"][question]
        assert [votes["a"], votes["b"], votes["ties"]] == [wanted.count(side) for side in "abt"]
    assert found["raters"] == 1
    assert sum(votes["a"] for _, votes in found["by_prompt"]) == sum(wanted.count("a") for wanted in clicks.values())
    assert "a among a and b" in capsys.readouterr().out


def test_the_page_shows_prompts_as_text_and_hides_the_sides(browser: Browser, sides: list[str], tmp_path: Path) -> None:
    output = tmp_path / "study"
    key = make(output, sides)
    content = (output / "page" / "index.html").read_bytes()
    for file in (output / "page").rglob("*"):
        content += file.name.encode() + (file.read_bytes() if file.is_file() else b"")
    assert not [word for word in (b"secret-name", b"made by", str(tmp_path).encode()) if word in content]
    assert sorted(pair["first"] for pair in key["pairs"]) == ["a", "a", "b", "b"]
    page = opened(browser, output)
    page.get_by_role("button", name="Start").click()
    shown = []
    for pair in key["pairs"]:
        assert shown_sides(page)[0] == pair["first"]
        shown.append(page.locator("#prompt").inner_text().removeprefix("Prompt: "))
        page.keyboard.press("0")
    assert sorted(shown) == sorted(PROMPTS)
    file = saved(page, tmp_path)
    assert tally([file], key).by_question[key["questions"][0]] == Votes(0, 0, len(PROMPTS))


def test_order_and_sides_follow_the_seed(sides: list[str], tmp_path: Path) -> None:
    first, again, other = (
        make(tmp_path / name, sides, "--seed", seed) for name, seed in (("1", "5"), ("2", "5"), ("3", "6"))
    )
    assert first == again
    assert first["pairs"] != other["pairs"]
    assert first["study"] != other["study"]
    assert main(["user-study", "make", *sides, "--output", str(tmp_path / "1")]) == 2


@pytest.mark.parametrize("clip_format", ["mp4", "webp"])
def test_clips_play_without_their_metadata(
    browser: Browser, sides: list[str], tmp_path: Path, clip_format: str
) -> None:
    for side, shade in COLOURS.items():
        frames = np.full((4, 32, 32, 3), shade, np.uint8)
        frames[:, :4, :4] = np.array([0, 90, 170, 250])[:, None, None, None]  # equal frames become one
        for number in range(len(PROMPTS)):
            (tmp_path / side / f"{number}-secret-name-{side}.png").unlink()
            clip = encode_frames(frames, clip_format, 8, "made by side", '{"receipt": 1}')  # type: ignore[arg-type]
            (tmp_path / side / f"{number}.{clip_format}").write_bytes(clip)
    source = tmp_path / "a" / f"0.{clip_format}"
    bare, suffix = without_metadata(source)
    assert suffix == f".{clip_format}"
    assert b"receipt" in source.read_bytes().replace(b"\0", b"") and b"receipt" not in bare.replace(b"\0", b"")
    assert np.array_equal(list(read_frames(bare)), list(read_frames(source.read_bytes())))
    key = make(tmp_path / "study", sides)
    page = opened(browser, tmp_path / "study")
    page.get_by_role("button", name="Start").click()
    for pair in key["pairs"]:
        assert shown_sides(page)[0] == pair["first"]
        page.keyboard.press("1")
    found = tally([saved(page, tmp_path)], key).by_question[key["questions"][0]]
    assert found == Votes(2, 2, 0)


def answers(file: Path, key: dict[str, Any], rater: str, choices: list[str]) -> Path:
    given = [{"pair": number, "question": 0, "choice": choice} for number, choice in enumerate(choices)]
    file.write_text(json.dumps({"study": key["study"], "rater": rater, "answers": given}))
    return file


def test_answers_that_do_not_belong_are_refused(
    sides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = make(tmp_path / "study", sides, "--seed", "1")
    good = answers(tmp_path / "good.json", key, "r1", ["first", "tie"])
    files = {
        "are of one rater": answers(tmp_path / "twice.json", key, "r1", ["first"]),
        "answers the page 'other'": answers(tmp_path / "other.json", key | {"study": "other"}, "r2", ["first"]),
        "which the page cannot give": answers(tmp_path / "odd.json", key, "r3", ["neither"]),
        "cannot be read": tmp_path / "missing.json",
        "holds no answers": tmp_path / "study" / "key.json",
    }
    double = answers(tmp_path / "double.json", key, "r4", ["first"] * 2)
    double.write_text(double.read_text().replace('"pair": 1', '"pair": 0'))
    files["answers question 0 of pair 0 twice"] = double
    for message, file in files.items():
        assert main(["user-study", "tally", str(good), str(file), "--key", str(tmp_path / "study" / "key.json")]) == 2
        error = capsys.readouterr().err
        assert message in error and str(file) in error
    assert main(["user-study", "tally", str(good), "--key", str(good)]) == 2
    assert "is no key of a user study" in capsys.readouterr().err


def test_intervals_are_exact_and_leave_ties_out() -> None:
    """Clopper and Pearson's limits for 9 of 10, from tables; for 10 of 10 the lower one is 0.025 ** (1 / 10)."""
    assert Votes(9, 1, 7).interval() == pytest.approx((0.5550, 0.9975), abs=1e-4)
    assert Votes(10, 0, 0).interval() == pytest.approx((0.025**0.1, 1.0))
    assert Votes(9, 1, 7).share_of_a == 0.9
    assert Votes(0, 0, 3).interval() is None


def test_a_side_can_be_a_checkpoint(sides: list[str], tiny_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    sides[1] = str(tiny_checkpoint)
    key = make(tmp_path / "study", sides, "--steps-a", "1")
    assert key["a"] == f"{tiny_checkpoint} at 1 steps"
    assert len(list((tmp_path / "study" / "a").glob("*.png"))) == len(PROMPTS)
    assert not list((tmp_path / "study" / "page").rglob("*tdm*"))
    assert main(["user-study", "make", *sides, "--steps-b", "2", "--output", str(tmp_path / "other")]) == 2
    assert "is no checkpoint" in capsys.readouterr().err
    clip = encode_frames(np.zeros((2, 16, 16, 3), np.uint8), "mp4", 8)
    (tmp_path / "b" / "0-secret-name-b.png").rename(tmp_path / "b" / "0.mp4").write_bytes(clip)
    assert main(["user-study", "make", *sides, "--steps-a", "1", "--output", str(tmp_path / "third")]) == 2
    assert "are a video and a picture file" in capsys.readouterr().err
