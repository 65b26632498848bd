"""The playground in a real browser, against the real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests.serving.conftest import RunningServer
from tests.serving.web.reverse_proxy import reverse_proxy

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request, Route

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install -e '.[dev]'")
expect = sync_api.expect
expect.set_options(timeout=20_000)

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
GENERATIONS = "**/v1/images/generations"
AWKWARD_PROMPT = """it's "a" $HOME `fox` \\ 狐"""
RESOURCE_ERROR = "Failed to load resource"
"""Message that the browser writes to the console for any status other than 200."""

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing; apt-get install chromium")

Open = Callable[..., "Page"]
"""Opens the playground: `fragment` behind its address, the rest as the browser's context takes it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Browser, server: RunningServer) -> Iterator[Open]:
    """Return a function that opens pages. At the end no page may have an error or a policy violation in its console."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_page(
        fragment: str = "", prepare: Callable[[Page], object] = lambda page: None, url: str = "", **options: Any
    ) -> Page:
        permissions = ["clipboard-read", "clipboard-write"]
        context = browser.new_context(permissions=permissions, reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        prepare(page)
        page.goto(url or f"{server.url}/{fragment}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in complaints if not text.startswith(RESOURCE_ERROR)] == []


@pytest.fixture
def page(open_page: Open) -> Page:
    """Return a page that shows its first picture."""
    page = open_page()
    expect_picture(page)
    return page


def expect_picture(page: Page, facts: str = r"\d+x\d+ · \d steps? · seed \d+") -> None:
    expect(page.locator("#facts")).to_have_text(re.compile(facts))


def prompt_of(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Prompt")


def make(page: Page, prompt: str) -> None:
    """Write a prompt, press Enter and wait for its picture."""
    prompt_of(page).fill(prompt)
    page.keyboard.press("Enter")
    expect(page.locator("#receipt-fields")).to_contain_text(f"prompt{prompt}")


def thumbnails(page: Page) -> Locator:
    return page.get_by_role("region", name="This session").get_by_role("button")


def asked_of(page: Page, act: Callable[[], object]) -> dict[str, Any]:
    """Return the body of the picture request that the page sends during `act`."""
    with page.expect_request(GENERATIONS) as request:
        act()
    return body_of(request.value)


def body_of(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = request.post_data_json or {}
    return body


def answering(status: int, body: object, headers: dict[str, str] | None = None) -> Callable[[Route], None]:
    return lambda route: route.fulfill(status=status, headers=headers or {}, json=body)


def refusal(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Callable[[Route], None]:
    error = {"message": message, "type": "rate_limit_error", "param": None, "code": code}
    return answering(status, {"error": error}, headers)


def copied(page: Page, button: str) -> str:
    control = page.locator(f"#{button}")
    control.click()
    expect(control).to_have_text("Copied")
    return str(page.evaluate("navigator.clipboard.readText()"))


# ---- Making pictures ----


def test_typing_makes_a_picture_and_its_steps_show_before_it(page: Page) -> None:
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => window.seen.push(document.getElementById("facts").textContent))
            .observe(document.getElementById("facts"), { childList: true });
    }""")
    prompt_of(page).press("End")
    page.keyboard.type(" above a fox")
    expect(page.locator("#receipt-fields")).to_contain_text("prompta red heart above a fox")
    expect_picture(page)
    *before, last = page.evaluate("window.seen")
    assert last.startswith("64x64 · 4 steps")
    assert before[-3:] == [f"expected after step {step}" for step in (1, 2, 3)]
    expect(page.locator("#filmstrip")).to_have_text("step 1step 2step 3picture")
    expect(page.get_by_role("img", name="a red heart above a fox").first).to_be_visible()


def test_the_draft_comes_first_and_each_step_can_be_looked_at_again(page: Page) -> None:
    final = page.locator("#picture").get_attribute("src")
    assert asked_of(page, page.get_by_label("Draft first").check)["draft"] is True
    expect(page.locator("#filmstrip")).to_have_text("draftstep 2step 3picture")
    page.get_by_role("button", name="draft", exact=True).click()
    assert page.locator("#picture").get_attribute("src") != final
    page.get_by_role("button", name="picture", exact=True).click()
    assert page.locator("#picture").get_attribute("src") == final


def test_a_newer_prompt_aborts_the_older(page: Page) -> None:
    def hold_the_fox(route: Route) -> None:
        if "fox" not in body_of(route.request)["prompt"]:
            route.continue_()

    page.route(GENERATIONS, hold_the_fox)
    assert asked_of(page, lambda: prompt_of(page).fill("a fox"))["prompt"] == "a fox"
    with page.expect_event("requestfailed") as failed:
        prompt_of(page).fill("a big pizza")
    assert failed.value.failure == "net::ERR_ABORTED"
    expect(page.locator("#receipt-fields")).to_contain_text("prompta big pizza")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_events_are_parsed_wherever_their_bytes_are_cut(page: Page) -> None:
    events = page.evaluate("""async () => {
        const { readEvents } = await import("/playground/static/sse.js");
        const text = ": comment\\r\\nevent: a\\r\\ndata: {\\"é\\":\\r\\ndata:1}\\r\\n\\r\\n"
            + "data: 狐\\n\\nevent: b\\rdata\\r\\rdata: cut";
        const bytes = new TextEncoder().encode(text);
        const found = [];
        for (let size = 1; size <= bytes.length; size++) {
            let at = 0;
            const pull = (c) => at < bytes.length ? c.enqueue(bytes.slice(at, at += size)) : c.close();
            const events = [];
            for await (const event of readEvents(new ReadableStream({ pull }))) events.push(event);
            found.push(JSON.stringify(events));
        }
        return [...new Set(found)];
    }""")
    assert [json.loads(found) for found in events] == [
        [{"type": "a", "data": '{"é":\n1}'}, {"type": "message", "data": "狐"}, {"type": "b", "data": ""}]
    ]


# ---- Budgets and refusals ----


def test_auto_follows_the_budget_and_shows_whether_it_was_met(page: Page) -> None:
    expect(page.get_by_label("Latency budget")).to_be_hidden()
    page.get_by_label("auto").check()
    expect(page.locator("#outcome-steps")).to_have_text("4 (auto)")
    asked = asked_of(page, lambda: page.get_by_label("Latency budget").fill("60000"))
    assert (asked["num_inference_steps"], asked["latency_budget_ms"]) == ("auto", 60000)
    expect(page.locator("#outcome-budget-tile")).to_have_text("Budget kept60.0 s")
    expect(page.locator("#outcome-predicted")).to_have_text(re.compile(r"^[\d.]+ ms$"))


def test_an_impossible_budget_shows_the_servers_message(page: Page) -> None:
    page.get_by_label("auto").check()
    page.get_by_label("Latency budget").fill("0.01")
    expect(page.get_by_role("alert")).to_contain_text("latency_budget_ms leaves")
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()  # it would be refused again
    expect_picture(page)  # the one before stays
    page.get_by_label("Latency budget").fill("")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_refusal_with_a_retry_time_is_retried_once_at_that_time(page: Page) -> None:
    page.clock.install()
    for code in ("latency_budget_unavailable", "queue_full"):
        headers = {"retry-after": "60", "retry-after-ms": "59900"}
        page.route(GENERATIONS, refusal(429, code, f"{code}: wait", headers), times=1)
        page.get_by_role("button", name="Make").click()
        expect(page.get_by_role("alert")).to_have_text(f"{code}: wait")
        expect(page.locator("#retry-note")).to_have_text("The server has room in about 59.9 s; trying once more then.")
        page.clock.fast_forward(59_900)
        expect(page.get_by_role("alert")).to_be_hidden()


def test_after_a_second_refusal_the_user_can_try_again(page: Page) -> None:
    page.route(GENERATIONS, refusal(429, "queue_full", "32 wait", {"retry-after": "0"}), times=2)
    page.get_by_role("button", name="Make").click()
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect_picture(page)


def test_an_error_in_the_middle_of_a_stream_is_shown(page: Page) -> None:
    event = {"error": {"message": "the picture failed", "type": "server_error", "param": None, "code": "not_finite"}}
    body = f"event: error\ndata: {json.dumps(event)}\n\n"
    page.route(GENERATIONS, lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.get_by_role("button", name="Make").click()
    expect(page.get_by_role("alert")).to_have_text("the picture failed")


def test_an_api_key_is_asked_for_kept_in_the_tab_and_never_copied(open_page: Open) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer secret-key":
            route.continue_()
        else:
            refusal(401, "invalid_api_key", "this server wants a key")(route)

    page = open_page(prepare=lambda page: page.route("**/v1/**", guard))
    expect(page.get_by_role("alert")).to_have_text("this server wants a key")
    field = page.get_by_role("textbox", name="API key")
    expect(field).to_have_attribute("type", "password")
    field.fill("wrong-key")
    field.press("Enter")
    expect(field).to_have_value("")
    expect(field).to_be_visible()
    field.fill("secret-key")
    field.press("Enter")
    expect_picture(page)
    expect(field).to_be_hidden()
    for text in (copied(page, "copy-curl"), copied(page, "copy-python")):
        assert "TDM_API_KEY" in text
        assert "secret-key" not in text
    assert "secret-key" not in page.content() + page.url
    page.reload()
    expect_picture(page)
    page.get_by_role("button", name="Forget API key").click()
    assert page.evaluate("sessionStorage.length") == 0


# ---- Seeds, history, comparison ----


def test_the_seed_stays_while_locked_and_the_dice_roll_it(page: Page) -> None:
    seed = page.get_by_label("Seed", exact=True)
    first = seed.input_value()
    make(page, "a fox")
    expect(seed).to_have_value(first)
    page.get_by_role("button", name="Roll").click()
    expect(seed).not_to_have_value(first)
    second = seed.input_value()
    page.get_by_label("Lock").uncheck()
    make(page, "a big pizza")
    expect(seed).not_to_have_value(second)
    seed.fill("7")
    expect(page.get_by_label("Lock")).to_be_checked()  # a typed seed is meant to be used
    expect_picture(page, "seed 7")


def test_history_restores_everything(page: Page) -> None:
    page.get_by_label("auto").check()
    page.get_by_label("Latency budget").fill("60000")
    page.get_by_label("Draft first").check()
    page.get_by_label("Seed", exact=True).fill("7")
    make(page, "a fox")
    expect_picture(page, "seed 7")
    source, facts = page.locator("#picture").get_attribute("src"), page.locator("#outcome").inner_text()
    page.locator("#steps").get_by_label("2").check()
    page.get_by_label("Draft first").uncheck()
    page.get_by_role("button", name="Roll").click()
    make(page, "a big pizza")
    thumbnails(page).get_by_role("img", name="a fox, 4 steps, seed 7").last.click()
    expect(prompt_of(page)).to_have_value("a fox")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("7")
    expect(page.get_by_label("auto")).to_be_checked()
    expect(page.get_by_label("Latency budget")).to_have_value("60000")
    expect(page.get_by_label("Draft first")).to_be_checked()
    assert (page.locator("#picture").get_attribute("src"), page.locator("#outcome").inner_text()) == (source, facts)
    expect(page.locator("#filmstrip")).to_have_text("draftstep 2step 3picture")


def test_overwritten_prompts_do_not_enter_the_history(page: Page) -> None:
    page.evaluate("performance.now = () => 1")  # as fast as one types
    before = thumbnails(page).count()
    for prompt in ("a fox", "a fox on", "a fox on yellow"):
        prompt_of(page).fill(prompt)
        expect(page.locator("#receipt-fields")).to_contain_text(f"prompt{prompt}seed")
    expect(thumbnails(page)).to_have_count(before + 1)


def test_compare_shows_one_seed_at_every_step_count(page: Page) -> None:
    asked: list[dict[str, Any]] = []
    page.on("request", lambda request: asked.append(body_of(request)))
    page.get_by_role("button", name="Compare").click()
    region = page.get_by_role("region", name="One seed at every step count")
    expect(region.get_by_role("img")).to_have_count(4)
    expect(region.get_by_role("listitem").nth(3)).to_have_text(re.compile(r"^4 steps [\d.]+ ms$"))
    assert [body["num_inference_steps"] for body in asked] == [1, 2, 3, 4]
    assert len({body["seed"] for body in asked}) == 1
    assert len({image.get_attribute("src") for image in region.get_by_role("img").all()}) == 4
    region.get_by_role("listitem").first.get_by_role("button").click()
    expect_picture(page, "· 1 step ·")
    expect(page.locator("#steps").get_by_label("1")).to_be_checked()


# ---- Taking it away ----


@pytest.mark.parametrize("name", ["curl", "python"])
def test_copied_code_runs(page: Page, tmp_path: Path, name: str) -> None:
    page.evaluate("sessionStorage.setItem('tdm-api-key', 'secret-key')")
    page.get_by_label("auto").check()
    page.get_by_label("Latency budget").fill("60000")
    make(page, AWKWARD_PROMPT)
    expect(page.locator("#outcome-budget-tile")).to_have_text("Budget kept60.0 s")
    text = copied(page, f"copy-{name}")
    assert re.search('"num_inference_steps": ?"auto", ?"latency_budget_ms": ?60000', text)
    if name == "curl" and not shutil.which("curl"):
        pytest.skip("curl is not installed")
    command = ["bash", "-c", text] if name == "curl" else [sys.executable, "-c", text]
    environment = os.environ | {"TDM_API_KEY": "secret-key"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    with Image.open(tmp_path / "picture.png") as picture:
        receipt = json.loads(picture.text["tdm_receipt"])  # type: ignore[attr-defined]
    assert receipt["prompt"] == AWKWARD_PROMPT
    assert str(receipt["seed"]) == page.get_by_label("Seed", exact=True).input_value()


def test_a_download_carries_its_parameters_and_receipt(page: Page, tmp_path: Path) -> None:
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert re.fullmatch(r"a-red-heart-seed\d+-steps4\.png", download.value.suggested_filename)
    download.value.save_as(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG"
        text = picture.text  # type: ignore[attr-defined]
    assert text["parameters"].startswith("a red heart\nSteps: 4")
    page.get_by_text("Receipt", exact=True).click()
    expect(page.locator("#receipt-fields")).to_contain_text(json.loads(text["tdm_receipt"])["pixels_sha256"])
    expect(page.locator("#receipt-command")).to_have_text(f"tdm-generate --verify {download.value.suggested_filename}")


def test_a_link_carries_the_settings(page: Page, open_page: Open) -> None:
    page.locator("#steps").get_by_label("3").check()
    page.get_by_label("Seed", exact=True).fill("11")
    make(page, "a fox & a cat")
    expect_picture(page, "3 steps · seed 11")
    link = copied(page, "copy-link")
    there = open_page(fragment=link.split("/")[-1])
    expect_picture(there, "3 steps · seed 11")
    expect(prompt_of(there)).to_have_value("a fox & a cat")
    assert there.locator("#picture").get_attribute("alt") == "a fox & a cat"


# ---- The page itself ----


def test_several_models_and_sizes_can_be_chosen(open_page: Open) -> None:
    def add_models(route: Route) -> None:
        answer = route.fetch().json()
        (card,) = answer["data"]
        lora = {
            "id": "lora",
            "base": card["id"],
            "sizes": ["64x64", "96x64"],
            "step_counts": [1, 2],
            "default_steps": 2,
        }
        route.fulfill(json={**answer, "data": [card, card | lora]})

    page = open_page(prepare=lambda page: page.route("**/v1/models", add_models))
    expect_picture(page)
    expect(page.get_by_label("Size")).to_be_hidden()
    page.get_by_label("Model").select_option("lora")
    expect(page.get_by_role("radio")).to_have_count(3)
    asked = asked_of(page, lambda: page.get_by_label("Size").select_option("96x64"))
    assert (asked["model"], asked["size"], asked["num_inference_steps"]) == ("lora", "96x64", 2)
    expect(page.get_by_role("alert")).to_contain_text("lora")  # the server's words: it has none


def test_the_badge_shows_health_and_queue(page: Page) -> None:
    for status, body, shown in (
        (200, {"status": "ready", "live": 3, "max_live": 128}, "ready · 3 of 128 in flight"),
        (200, {"status": "ready"}, "ready"),
        (503, {"error": {"message": "stopping"}}, "not ready"),
    ):
        page.route("**/ready", answering(status, body))
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        expect(page.locator("#badge")).to_have_text(shown)


def test_everything_can_be_done_from_the_keyboard(page: Page) -> None:
    prompt, keyboard = prompt_of(page), page.keyboard
    keyboard.press("/")
    expect(prompt).to_be_focused()
    keyboard.type("a car 12 /rl")  # keys of shortcuts are letters here
    expect(prompt).to_have_value("a car 12 /rl")
    keyboard.press("Enter")
    expect(page.locator("#receipt-fields")).to_contain_text("prompta car 12 /rl")
    keyboard.press("Escape")
    keyboard.press("2")
    expect_picture(page, "· 2 steps ·")
    keyboard.press("[")
    expect_picture(page, "· 4 steps ·")
    keyboard.press("a")
    expect(page.get_by_label("Latency budget")).to_be_visible()
    keyboard.press("l")
    expect(page.get_by_label("Lock")).not_to_be_checked()
    keyboard.press("c")
    expect(page.locator("#comparison-strip img")).to_have_count(4)
    with page.expect_download():
        keyboard.press("d")
    page.get_by_text("Keyboard", exact=True).click()
    page.get_by_label("Single keys").uncheck()
    keyboard.press("l")
    expect(page.get_by_label("Lock")).not_to_be_checked()


def test_a_tab_reaches_the_controls_in_the_order_of_the_page(page: Page) -> None:
    prompt_of(page).focus()
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.name || document.activeElement.id"))
        outline = "getComputedStyle(document.activeElement.closest('.segments') ?? document.activeElement).outlineStyle"
        assert page.evaluate(outline) == "solid"  # where the focus is, is seen
    wanted = [
        "make",
        "download",
        "copy-curl",
        "copy-python",
        "copy-link",
        "steps",
        "seed",
        "dice",
        "seed-lock",
        "draft",
    ]
    assert [name for name in reached if name in wanted] == wanted


def test_every_control_has_a_name(page: Page) -> None:
    page.get_by_label("auto").check()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#comparison-strip img")).to_have_count(4)
    page.evaluate("for (const node of document.querySelectorAll('[hidden]')) node.hidden = false")
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "checkbox", "combobox", "image", "link", "radio", "region", "spinbutton", "switch", "textbox"}
    named = [node for node in tree if not node["ignored"] and node["role"]["value"] in roles]
    assert {node["role"]["value"] for node in named} >= {"button", "combobox", "image", "link", "radio", "switch"}
    assert [node for node in named if not node.get("name", {}).get("value")] == []


@pytest.mark.parametrize("end", ["/", ""])
def test_the_page_works_behind_a_proxy_under_a_path(open_page: Open, server: RunningServer, end: str) -> None:
    """With and without a slash at the end of its address; requests, links and copied code keep the path."""
    with reverse_proxy(server.url) as url:
        page = open_page(url=url + end)
        expect_picture(page)
        assert page.url.startswith(f"{url}{end}#prompt=")
        expect(page.locator("#health")).to_have_text("ready")
        for name, path in (("API schema", "/openapi.json"), ("Metrics", "/metrics")):
            link = page.get_by_role("link", name=name).evaluate("link => link.href")
            assert link == url + path
        assert f"{url}/v1/images/generations" in copied(page, "copy-curl")


def test_a_phone_scrolls_in_one_direction(open_page: Open) -> None:
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    expect_picture(page)
    make(page, "w" * 200)
    page.get_by_label("auto").check()
    page.get_by_label("Latency budget").fill("60000")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#comparison-strip img")).to_have_count(4)
    for name in ("Receipt", "Keyboard"):
        page.get_by_text(name, exact=True).click()
    page.evaluate("for (const node of document.querySelectorAll('[hidden]')) node.hidden = false")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_colours_follow_the_system_and_text_stands_out(open_page: Open) -> None:
    luminances = {}
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        expect_picture(page)
        colours = page.evaluate("""() => ["body", "#model-facts", "#make"].flatMap((selector) => {
            const style = getComputedStyle(document.querySelector(selector));
            return [style.color, style.backgroundColor];
        })""")
        ink, paper, quiet, _, on_accent, accent = map(luminance, colours)
        luminances[scheme] = paper
        for front, back in ((ink, paper), (quiet, paper), (on_accent, accent)):
            assert (max(front, back) + 0.05) / (min(front, back) + 0.05) >= 4.5  # WCAG 2.2, AA
    assert luminances["dark"] < 0.1 < 0.8 < luminances["light"]


def luminance(colour: str) -> float:
    """Return WCAG's relative luminance of `rgb(r, g, b)`."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# ---- Drawing ----


@pytest.fixture
def live(page: Page) -> list[dict[str, Any]]:
    """The messages that the page sends over its live connection."""
    sent: list[dict[str, Any]] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda text: sent.append(json.loads(text))))
    return sent


def strengths(page: Page) -> Locator:
    return page.get_by_role("group", name="How much is made anew")


def test_a_picture_is_changed_by_another_prompt_and_closing_starts_from_noise_again(
    page: Page, live: list[dict[str, Any]]
) -> None:
    page.get_by_role("button", name="Edit", exact=True).click()
    expect(page.locator("#facts")).to_contain_text("3 of 4 steps")
    assert live[0]["image"].startswith("data:image/png;base64,") and live[0]["strength"] == 0.75
    make(page, "a banana")
    strengths(page).get_by_role("radio", name="50 %").check()
    expect(page.locator("#facts")).to_contain_text("2 of 4 steps")
    expect(page.locator("#latency-legend")).to_contain_text("image")
    expect(page.locator("#filmstrip button").last).to_have_text("picture")
    body = asked_of(page, lambda: page.locator("#drawing-close").click())
    assert "image" not in body and "strength" not in body
    expect(page.locator("#drawing")).to_be_hidden()
    page.keyboard.press("[")  # the picture before, with its drawing
    expect(page.locator("#drawing")).to_be_visible()


def test_the_picture_follows_a_stroke_and_undo_takes_it_back(page: Page, live: list[dict[str, Any]]) -> None:
    page.get_by_role("button", name="Draw or open a picture").click()
    canvas = page.locator("#canvas")
    expect_picture(page, r"64x64 · 3 of 4 steps")
    blank = canvas.evaluate("canvas => canvas.toDataURL()")
    live.clear()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 30, box["y"] + 30)
    page.mouse.down()
    while len(live) < 3:
        page.mouse.move(box["x"] + 40 + len(live) * 20, box["y"] + 60, steps=5)
    assert all(body["partial_images"] == 0 for body in live), "previews would only delay the next picture"
    expect(page.locator("#facts")).to_contain_text("3 of 4 steps")
    page.mouse.up()
    drawn = canvas.evaluate("canvas => canvas.toDataURL()")
    expect(page.locator("#frame")).to_have_attribute("aria-busy", "false")
    assert live[-1]["image"] == drawn != blank and len({body["seed"] for body in live}) == 1
    page.get_by_role("button", name="Undo").click()
    assert canvas.evaluate("canvas => canvas.toDataURL()") == blank


def test_a_browser_with_a_key_opens_the_live_connection(page: Page, live: list[dict[str, Any]]) -> None:
    page.evaluate("sessionStorage.setItem('tdm-api-key', 'tdm-some-key')")
    page.get_by_role("button", name="Draw or open a picture").click()
    expect(page.locator("#facts")).to_contain_text("3 of 4 steps")
    assert live, "nothing was asked over HTTP in its place"


def test_a_drawing_is_followed_without_websockets_too(page: Page) -> None:
    page.evaluate("""() => {
        window.WebSocket = class extends EventTarget {
            static OPEN = 1;
            constructor() { super(); setTimeout(() => this.dispatchEvent(new Event("close"))); }
            close() {}
        };
    }""")
    with page.expect_request("**/v1/images/edits"):
        page.get_by_role("button", name="Draw or open a picture").click()
    expect(page.locator("#facts")).to_contain_text("3 of 4 steps")


def test_a_file_is_opened_and_the_copied_commands_name_it(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), (0, 128, 0)).save(tmp_path / "green.png")
    page.get_by_role("button", name="Draw or open a picture").click()
    page.locator("#drawing-file").set_input_files(tmp_path / "green.png")
    expect(page.locator("#facts")).to_contain_text("3 of 4 steps")
    curl, python = copied(page, "copy-curl"), copied(page, "copy-python")
    assert "/v1/images/edits" in curl and "-F image=@given.png" in curl and "base64" not in curl
    assert 'client.images.edit(\n    image=open("given.png", "rb"),' in python
