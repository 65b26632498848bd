"""Takes docs/playground.png of a running playground: `python -m tests.serving.web.screenshot`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tests.serving.conftest import start_server
from tests.serving.web.test_playground import CHROMIUM, FLAGS, make

TARGET = Path("docs/playground.png")
SIZE = {"width": 1200, "height": 1240}
SETTINGS = "#prompt=a+red+heart&seed=7&num_inference_steps=auto&latency_budget_ms=250"
PROMPTS = [
    "a red heart left of an avocado on a blue background",
    "a big pizza on a black background",
    "a small strawberry at the top on yellow",
    "a fox right of a penguin on a green background",
    "a rocket above the earth globe on a purple background",
]


def arrange(page: Page) -> None:
    """Show a history, a budget that was met, and all step counts side by side."""
    for prompt in PROMPTS:
        make(page, prompt)
    expect(page.locator("#outcome-kept")).to_have_text("Budget kept")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#comparison-strip img")).to_have_count(4)
    page.mouse.move(0, 0)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = start_server(Path(folder) / "log", "--checkpoint", str(DEFAULT_CHECKPOINT))
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport=SIZE, reduced_motion="reduce")  # type: ignore[arg-type]
            page.goto(f"{server.url}/{SETTINGS}")
            expect(page.locator("#receipt")).to_be_visible()
            arrange(page)
            page.screenshot(path=TARGET, full_page=True)
            browser.close()
        finally:
            server.stop()
    # The last three bits are invisible noise and half of the file.
    Image.open(TARGET).convert("RGB").point(lambda level: level & 0xF8 | level >> 5).save(TARGET, optimize=True)
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
