"""The page in a real browser: a picture goes in, the demo model's true answer comes out."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from opsin import AsyncLLM
from opsin.cli.serve import curl_line
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.page import FILES
from opsin.server.seen import Grid, token_grid
from opsin.types import MediaLayout, PixelPlan, View
from tests.server.conftest import NAME, data_url, serving
from tests.server.test_reasoning import Scripted

if TYPE_CHECKING:
    from tests.factory import LlavaShape

PICTURES = Path(__file__).resolve().parents[2] / "src" / "opsin" / "demo" / "pictures"
ASKED = "How many circles are there?"


def test_page_files_load_only_what_the_server_has(client: httpx.Client):
    for path in FILES:
        response = client.get(path)
        assert response.status_code == 200
        assert "default-src 'none'" in response.headers["content-security-policy"]
    html = client.get("/").text
    assert "http" not in html
    for named in ("page/app.js", "page/style.css", "page/icon.svg"):
        assert f'"{named}"' in html
        assert f"/{named}" in FILES
    for module in re.findall(r'import .* from "\./(.+)";', client.get("/page/app.js").text):
        assert f"/page/{module}" in FILES


def test_page_needs_no_key_and_shows_nothing_that_does(engine: AsyncLLM):
    app = create_app(engine, ServerConfig(api_key=("secret",)), model=NAME)
    with serving(app) as address, httpx.Client(base_url=address, trust_env=False) as client:
        assert client.get("/").status_code == 200
        assert client.post("/page/seen", json={"image_url": data_url(1)}).status_code == 401


def test_seen_shows_the_tiles_and_their_tokens(client: httpx.Client):
    seen = client.post("/page/seen", json={"image_url": data_url(1)}).json()
    (view,) = seen["views"]
    assert seen["num_tokens"] == view["grid"]["rows"] * view["grid"]["columns"] == 16
    assert len(view["tiles"]) == view["columns"] == 1
    assert view["tiles"][0].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "file:///etc/passwd", "nothing"])
def test_seen_bad_picture_is_a_400(client: httpx.Client, url: str):
    assert client.post("/page/seen", json={"image_url": url}).status_code == 400


def test_seen_broken_picture_is_blamed_on_its_field(client: httpx.Client):
    whole = data_url(1)
    response = client.post("/page/seen", json={"image_url": whole[: len(whole) // 8 * 4]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("image_parse_error", "image_url")


def test_seen_keeps_one_process_and_the_servers_deadline(tiny_llava: Callable[[LlavaShape], Path]):
    from tests.factory import LlavaShape

    with AsyncLLM(str(tiny_llava(LlavaShape(num_kv_heads=2))), media_workers=1, media_decode_timeout_s=2) as engine:
        app = create_app(engine, ServerConfig(), model=NAME)
        with serving(app) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:

            def seen(seed: int) -> httpx.Response:
                return client.post("/page/seen", json={"image_url": data_url(seed)})

            assert seen(1).status_code == 200
            (worker,) = engine._front.inputs._probe._idle
            assert seen(2).status_code == 200
            assert [w.process.pid for w in engine._front.inputs._probe._idle] == [worker.process.pid]
            os.kill(worker.process.pid, signal.SIGSTOP)
            stuck: list[httpx.Response] = []
            waiting = threading.Thread(target=lambda: stuck.append(seen(3)))
            waiting.start()
            while engine._front.inputs._probe._idle:
                time.sleep(0.001)
            assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200
            waiting.join(30)
            error = stuck[0].json()["error"]
            assert error["message"] == "Decoding the picture timed out after 2 s."
            assert (stuck[0].status_code, error["code"], error["param"]) == (400, "image_parse_error", "image_url")
            assert seen(3).status_code == 200


@pytest.mark.parametrize(
    ("num_features", "tiles", "expected"),
    [
        (576, [(336, 336)], Grid(24, 24)),
        (12, [(84, 112)], Grid(3, 4)),
        (12 * 3, [(84, 112)] * 3, Grid(3, 4)),
        (577, [(336, 336)], None),
        (24, [(84, 112), (112, 84)], None),
    ],
)
def test_token_grid_is_told_where_it_is_even(num_features: int, tiles: list[tuple[int, int]], expected: Grid | None):
    views = tuple(View((), height, width) for height, width in tiles)
    layout = MediaLayout(PixelPlan(1, 1, views), num_features, num_patches=1)
    assert token_grid(layout, *tiles[0]) == expected


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    with (
        AsyncLLM("demo", media_workers=1) as engine,
        serving(create_app(engine, ServerConfig(), model="demo")) as address,
    ):
        yield address


def test_line_of_the_banner_is_answered_truly(demo: str):
    line = curl_line(demo, ServerConfig(), "demo")
    pasted = subprocess.run(["sh", "-c", f"{line} --noproxy '*'"], capture_output=True, check=True)
    assert json.loads(pasted.stdout)["choices"][0]["message"]["content"] == "a blue circle"


@pytest.fixture
def page(browser: Any, demo: str) -> Iterator[Any]:
    """The page, on a phone in the dark; whatever it does, its console must stay silent."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    complaints: list[str] = []

    def hear(message: Any) -> None:
        refused = message.text.startswith("Failed to load resource: the server responded with a status of 400")
        if message.type in ("error", "warning") and not refused:
            complaints.append(message.text)

    page.on("console", hear)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(demo)
    yield page
    assert complaints == []
    context.close()


def ask(page: Any, text: str) -> str:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    answer = page.locator("article.assistant").last
    answer.get_by_role("button", name="Again").wait_for()
    return answer.locator(".text").inner_text()


@pytest.mark.browser
def test_page_picked_picture_is_answered_truly(page: Any):
    page.get_by_label("Add pictures").set_input_files(PICTURES / "animals.png")
    page.locator("#pictures img").wait_for()
    answer = ask(page, "What is in the picture?")
    assert all(animal in answer for animal in ("dog", "elephant", "penguin"))
    facts = page.locator("article.assistant .facts").inner_text()
    assert "256 of them pictures" in facts
    assert "ms to first token" in facts
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.browser
def test_page_dropped_picture_is_shown_as_the_model_saw_it(page: Any):
    data = list((PICTURES / "animals.png").read_bytes())
    page.evaluate(
        """(bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
        }""",
        data,
    )
    page.locator("#pictures img").wait_for()
    answer = ask(page, "What is in the picture?")
    assert all(animal in answer for animal in ("dog", "elephant", "penguin"))
    page.get_by_title("What the model saw").click()
    page.locator("dialog canvas").wait_for()
    assert "256 tokens" in page.locator("dialog").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


@pytest.mark.browser
def test_page_pasted_pictures_are_asked_about_together(page: Any):
    files = [list((PICTURES / name).read_bytes()) for name in ("animals.png", "shapes.png")]
    page.evaluate(
        """(files) => {
            const transfer = new DataTransfer();
            for (const bytes of files) {
                transfer.items.add(new File([new Uint8Array(bytes)], "a.png", {type: "image/png"}));
            }
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}));
        }""",
        files,
    )
    page.locator("#pictures img").nth(1).wait_for()
    assert ask(page, "Which picture has more animals?") == "the first"
    assert "512 of them pictures" in page.locator("article.assistant .facts").inner_text()


@pytest.mark.browser
def test_page_answer_is_stopped_and_asked_for_again(page: Any):
    page.route("**/v1/chat/completions", lambda route: None)  # an answer that does not come
    page.get_by_label("Message").fill("Hello")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    page.keyboard.press("Escape")
    answer = page.locator("article.assistant")
    answer.get_by_text("stopped").wait_for()
    page.unroute("**/v1/chat/completions")
    answer.get_by_role("button", name="Again").click()
    answer.get_by_text("ms to first token").wait_for()
    assert answer.locator(".text").inner_text()


@pytest.mark.browser
def test_page_is_as_dark_as_the_reader_wants_it(page: Any):
    def lightness() -> float:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"[0-9]+", colour)[:3]))

    assert lightness() < 150
    page.emulate_media(color_scheme="light")
    assert lightness() > 600


@pytest.mark.browser
def test_page_tokens_tell_their_probabilities(page: Any):
    page.get_by_label("Add pictures").set_input_files(PICTURES / "animals.png")
    page.locator("#pictures img").wait_for()
    answer = ask(page, "What is in the picture?")
    page.get_by_role("button", name="Tokens").click()
    tokens = page.locator(".token")
    assert "".join(tokens.all_inner_texts()[:-1]).strip() == answer  # the last one ends it
    card = page.get_by_role("tooltip")
    tokens.first.hover()
    assert card.inner_text().count("%") == 5  # the token, and four that might have come
    assert f'"{tokens.first.inner_text()}"' in card.locator(".chosen").inner_text()
    page.get_by_label("Message").hover()
    assert not card.is_visible()
    tokens.nth(1).tap()
    assert f'"{tokens.nth(1).inner_text()}"' in card.locator(".chosen").inner_text()
    box = card.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    page.get_by_role("button", name="Text").click()
    assert page.locator(".token").count() == 0
    assert not card.is_visible()


@pytest.mark.browser
def test_page_is_used_by_keyboard_alone(page: Any):
    ask(page, "Hello")
    for _ in range(9):  # back from the message to the answer's buttons
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.textContent") == "Tokens":
            break
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "Text"  # the same button, with its new name
    for _ in range(2):  # "Again" stands between
        page.keyboard.press("Shift+Tab")
    chosen = page.get_by_role("tooltip").locator(".chosen")
    tokens = page.locator(".token")
    assert f'"{tokens.first.inner_text()}"' in chosen.inner_text()
    page.keyboard.press("ArrowRight")
    assert f'"{tokens.nth(1).inner_text()}"' in chosen.inner_text()
    page.keyboard.press("Escape")
    assert not page.get_by_role("tooltip").is_visible()


@pytest.mark.browser
def test_page_file_that_is_no_picture_is_told(page: Any):
    pick, notice = page.get_by_label("Add pictures"), page.get_by_role("status")
    pick.set_input_files({"name": "a.pdf", "mimeType": "application/pdf", "buffer": b"%PDF"})
    assert notice.inner_text() == "Only pictures can be sent along."
    pick.set_input_files(PICTURES / "animals.png")
    page.get_by_role("button", name="Remove animals.png").click()
    assert notice.inner_text() == ""
    assert page.evaluate("document.activeElement.id") == "text"


@pytest.mark.browser
def test_page_question_is_edited_and_asked_again(page: Any):
    ask(page, "Hello")
    page.get_by_role("button", name="Edit").click()
    assert page.get_by_label("Message").input_value() == "Hello"
    assert page.locator("article").count() == 0
    ask(page, "Hello again")
    assert page.locator("article").count() == 2


@pytest.mark.browser
def test_page_folds_what_the_model_thought(browser: Any, engine: AsyncLLM):
    said = ["<think>Let me", " see</think>", "Two"]
    app = create_app(Scripted(engine, said), ServerConfig(reasoning_parser="qwen3"), model=NAME)  # type: ignore[arg-type]
    with serving(app) as address:
        page = browser.new_page()
        page.goto(address)
        assert ask(page, "How many?") == "Two"
        thoughts = page.locator(".thoughts div")
        assert not thoughts.is_visible()
        page.get_by_text("Thoughts").click()
        assert thoughts.inner_text() == "Let me see"
        page.close()


@pytest.mark.browser
def test_page_shows_what_the_server_refuses(page: Any):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Top p").fill("7")
    with page.expect_response("**/v1/chat/completions"):
        page.get_by_label("Message").fill("Hello")
        page.keyboard.press("Enter")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "top_p" in alert.inner_text()


@pytest.mark.browser
def test_page_text_of_a_model_stays_text(page: Any):
    text = "# Two\n\n- a **b**\n- `c`\n\n<img src=x onerror=alert(1)> [x](javascript:alert(1))\n\n```\n<b>\n```"
    html = page.evaluate(
        """async (text) => {
            const { markdown } = await import("/page/markdown.js");
            const node = document.createElement("div");
            node.append(markdown(text));
            return node.innerHTML;
        }""",
        text,
    )
    assert "<strong>b</strong>" in html
    assert "<li>" in html
    assert "&lt;img" in html
    assert "<a" not in html
    assert "<code>&lt;b&gt;</code>" in html
