"""Takes docs/playground.png of a running playground: `python -m tests.serving.screenshot`."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from tests.serving.conftest import start_server
from tests.serving.test_playground import CHROMIUM, FLAGS, make

TARGET = Path("docs/playground.png")
SIZE = {"width": 1200, "height": 1240}
PROMPTS = [
    "a big pizza on a black background",
    "a small cat at the top on yellow",
    "a rocket above the crescent moon on a purple background",
    "a fox right of a cactus on a green background",
    "a red heart left of a butterfly on a blue background",
]


def arrange(page: Page) -> None:
    """A history, a budget that was kept, and all step counts side by side."""
    for prompt in PROMPTS:
        make(page, prompt)
    page.get_by_label("auto").check()
    page.get_by_label("Latency budget").fill("60")
    expect(page.locator("#outcome-budget")).to_have_text("60 ms kept")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#comparison-strip img")).to_have_count(4)
    page.mouse.move(0, 0)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = start_server(Path(folder) / "log")
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport=SIZE, reduced_motion="reduce")  # type: ignore[arg-type]
            page.goto(f"{server.url}/#seed=7")
            expect(page.locator("#receipt")).to_be_visible()
            arrange(page)
            screenshot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
            browser.close()
        finally:
            server.stop()
    # A palette is a third of the size and looks the same.
    screenshot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(TARGET, optimize=True)
    print(f"{TARGET}: {screenshot.size}, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
