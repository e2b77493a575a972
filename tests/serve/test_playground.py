"""The page at `/`: what is sent, and what a person sees of it in headless Chromium."""

import hashlib
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from serve.metrics import Metrics
from serve.page import FILES, FOLDER
from serve.routes import create_api
from serve.schemas import AppArgs
from serve.served_model import Pools, ServedModel
from tests.serve.conftest import engine_of, models_of, save_tiny
from yan_core.config import BaselineConfig

KEY = "correct horse"
KEYS = {"ann": hashlib.sha256(KEY.encode()).hexdigest()}
CONTEXT, QUESTION = "Mary went to the kitchen.", "Where is Mary?"
WAIT_S = 15
PHONE, DESKTOP = (360, 740), (1280, 900)


# --- without a browser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES)
def test_the_page_is_open_and_strict(start, path):
    client = start(keys=KEYS)
    for answer in (client.get(path), client.head(path)):
        assert answer.status_code == 200
        assert answer.headers["content-type"] == FILES[path][1]
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';") and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert client.head(path).content == b""
    assert client.get(path).content == (FOLDER / FILES[path][0]).read_bytes()
    assert client.get("/v1/models").status_code == 401


def test_there_is_nothing_else_in_the_folder_of_the_page(client):
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(name for name, _ in FILES.values())
    for path in (
        "/playground",
        "/playground/",
        "/playground/x.js",
        "/playground/..%2Fpage.py",
        "/playground/index.html",
    ):
        assert client.get(path, follow_redirects=False).status_code == 404
    assert client.post("/").status_code == 405
    assert not any(path in FILES for path in client.get("/openapi.json").json()["paths"])


def test_nothing_is_inline_or_from_elsewhere_or_markup():
    texts = {name: (FOLDER / name).read_text() for name, _ in FILES.values()}
    for name, text in texts.items():
        text = text.replace('xmlns="http://www.w3.org/2000/svg"', "")  # a name, which nothing fetches
        assert not re.search(r"https?:|[\"'(]//|@import|url\(", text), name
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", texts["script.js"])
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)", texts["index.html"])


def test_a_card_tells_the_architecture(client):
    assert client.get("/v1/models").json()["data"][0]["architecture"] == "yan"


# --- in a browser -----------------------------------------------------------------------------------------------------


def needs_chromium() -> None:
    """Skip where there is no browser to drive."""
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed: apt-get install chromium chromium-driver")
    pytest.importorskip("selenium", reason="selenium is not installed: it is in the extra dev")


@contextmanager
def serving(folders: Mapping[str, Path], keys: Mapping[str, str]) -> Iterator[str]:
    """The API over models at a free port of this machine; gives its address."""
    args, metrics, pools = AppArgs(model="m"), Metrics("one"), Pools()
    engines = {name: engine_of(folder) for name, folder in folders.items()}
    for engine in engines.values():
        engine.warm_up(args.num_steps)
    models = models_of([ServedModel(name, engine, metrics, 8, pools) for name, engine in engines.items()])
    server = uvicorn.Server(uvicorn.Config(create_api(models, metrics, args, keys), log_level="warning"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until = time.monotonic() + WAIT_S
        while not server.started:
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
            pools.draws.shutdown()
            pools.texts.shutdown()


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny YAN and a tiny AR baseline."""
    needs_chromium()
    pytest.importorskip("transformers", reason="the baseline needs the extra baselines")
    architecture = BaselineConfig(d_model=32, num_blocks=1, num_heads=2, max_positions=64)
    return {
        "tiny": model_folder,
        "rival": save_tiny(tmp_path_factory.mktemp("ar") / "model", architecture=architecture),
    }


@pytest.fixture(scope="module")
def address(folders: dict[str, Path]) -> Iterator[str]:
    """A server that anyone may ask."""
    with serving(folders, {}) as found:
        yield found


class Page:
    """The playground in a browser."""

    def __init__(self, driver: Any) -> None:
        """Drive a browser."""
        self.driver = driver

    def open(self, address: str, size: tuple[int, int] = DESKTOP, dark: bool = False) -> None:
        """Load it as a new visitor."""
        width, height = size
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.cdp("Emulation.setEmulatedMedia", features=scheme)
        self.driver.get(address)
        self.js("sessionStorage.clear()")
        self.driver.refresh()

    def cdp(self, command: str, **settings: Any) -> None:
        """A command of Chrome's DevTools."""
        self.driver.execute_cdp_cmd(command, settings)

    def js(self, script: str, *args: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *args)

    def id(self, name: str) -> Any:
        """An element."""
        return self.driver.find_element("id", name)

    def all(self, selector: str) -> list[Any]:
        """Elements."""
        return self.driver.find_elements("css selector", selector)

    def text(self, name: str) -> str:
        """What an element says, in full."""
        return self.js("return document.getElementById(arguments[0]).textContent", name)

    def set(self, name: str, value: Any) -> None:
        """Give a control a value, as a person's hand does."""
        self.js(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true})); e.dispatchEvent(new Event('change'))",
            name,
            str(value),
        )

    def until(self, fact: Callable[[], Any], what: str) -> None:
        """Wait for a fact."""
        end = time.monotonic() + WAIT_S
        while not fact():
            assert time.monotonic() < end, f"{what}; status: {self.text('status')}; error: {self.text('error')}"
            time.sleep(0.02)

    def ready(self) -> None:
        """Wait for the models."""
        self.until(lambda: self.all("#model option"), "models listed")

    def fill(self) -> None:
        """Write the task's fields."""
        self.ready()
        for box, text in zip(self.all("#fields textarea"), (CONTEXT, QUESTION), strict=True):
            box.clear()
            box.send_keys(text)

    def ask(self) -> None:
        """Send, and wait for the answer."""
        self.id("ask").click()
        self.until(lambda: "answered in" in self.text("status"), "an answer")


@pytest.fixture(scope="module")
def browser(folders: dict[str, Path]) -> Iterator[Any]:
    """Headless Chromium; `folders` is asked for so that a skip comes first."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    """The page with its models; the test ends with no error on the console and no request to anyone else."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    found = Page(browser)
    found.open(address)
    found.ready()
    yield found
    # Chromium itself writes what the API refuses on the console.
    errors = [line["message"] for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]
    assert [line for line in errors if not re.search(r"/v1/\w+ - Failed to load resource", line)] == []
    sent = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith(f"{address}/") for url in urls), urls


def test_an_answer_comes_with_its_latency_and_experts(page):
    page.fill()
    page.ask()
    times = dict(re.findall(r"(Latency|Round trip|Sample|Queue)([\d.]+) ms", page.text("times")))
    assert set(times) == {"Latency", "Round trip", "Sample", "Queue"}
    assert 0 < float(times["Latency"]) <= float(times["Round trip"])
    tokens = page.all("#answer .token")
    assert tokens
    for token in tokens:
        expert = token.get_attribute("data-expert")
        assert token.get_attribute("title") == f"expert {expert}"
        assert token.get_attribute("class").split() == ["token", f"e{int(expert) % 8}"]
        assert expert in page.js("return getComputedStyle(arguments[0], '::after').content", token)
    assert "expert" in page.text("legend")


WATCH = """
window.formed = [];
new MutationObserver(() => {
  const text = document.getElementById('answer').textContent;
  if (text && text !== window.formed.at(-1)) window.formed.push(text);
}).observe(document.getElementById('answer'), {childList: true});
"""
"""Keeps every text that the answer has on its way."""


def test_words_form_and_the_slider_shows_the_text_of_its_step(page, client):
    body = {"fields": {"context": CONTEXT, "question": QUESTION}, "num_steps": 5, "trajectory": True}
    for seed in range(100):  # a random model does not change its mind on every way
        expected = client.post("/v1/generate", json=body | {"seed": seed}).json()["trajectory"]
        if len({step["text"] for step in expected}) > 1:
            break
    else:
        raise AssertionError("no seed whose text changes on its way")
    page.fill()
    page.set("num_steps", 5)
    page.set("seed", seed)
    page.js(WATCH)
    page.ask()
    assert page.js("return window.formed") == [text for text, _ in groupby(step["text"] for step in expected)]
    assert page.id("t").get_attribute("max") == "4"
    for i, step in enumerate(expected):
        page.set("t", i)
        assert page.text("answer") == step["text"]
        assert [int(token.get_attribute("data-expert")) for token in page.all("#answer .token")] == step["experts"]
        assert page.text("t-shown") == f"t = {step['t']:.2f}"
    page.set("t", 0)
    page.id("play").click()
    page.until(lambda: page.id("t").get_property("value") == "4", "replayed")
    assert page.text("answer") == expected[-1]["text"]


def test_candidates_are_listed_with_scores(page):
    page.fill()
    page.set("num_candidates", 4)
    page.ask()
    items = page.all("#candidates li")
    assert len(items) == 4 and all(re.search(r"score -?[\d.]+$", item.text) for item in items)
    assert page.id("t").get_attribute("max") == "2"


def test_a_race_shows_both(page):
    page.fill()
    assert page.id("race").is_enabled() and page.text("race-hint") == "tiny against rival"
    page.id("race").click()
    page.until(lambda: page.text("verdict"), "a verdict")
    lanes = page.all(".lane")
    assert [lane.find_element("tag name", "h3").text for lane in lanes] == ["tiny", "rival"]
    for lane in lanes:
        assert re.fullmatch(r"[\d.]+ ms", lane.find_element("class name", "clock").text)
        assert lane.find_element("class name", "lane-text").text and "decoded in" in lane.text


def test_a_baseline_answers_without_what_it_cannot_do(page):
    page.fill()
    page.set("model", "rival")
    assert not page.id("num_steps").is_enabled()
    page.ask()
    assert page.text("answer") and not page.id("replay").is_displayed()


def test_an_error_is_told_and_the_next_request_works(page):
    page.fill()
    page.set("guidance_scale", 50)
    page.id("ask").click()
    page.until(lambda: page.id("error").is_displayed(), "an error")
    assert page.text("error") == "guidance_scale must be a number in [0, 20], got 50"
    assert page.id("guidance_scale").get_attribute("aria-invalid") == "true"
    page.set("guidance_scale", 1)
    page.ask()
    assert not page.id("error").is_displayed() and not page.all("[aria-invalid]")


def test_markup_is_shown_as_text(page):
    page.all("input[value=source]")[0].click()
    page.set("source", "<img src=x onerror=alert(1)> Where is Mary?")
    page.ask()
    assert not page.all("img")


def test_all_of_it_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        page.driver.switch_to.active_element.send_keys(*keys)

    seen = []
    for _ in range(12):
        page.js("document.activeElement === document.body && document.getElementById('theme').focus()")
        seen.append(page.js("return document.activeElement.id || document.activeElement.name"))
        if seen[-1] == "context":
            press(CONTEXT)
        if seen[-1] == "question":
            press(QUESTION)
        press(Keys.TAB)
    order = ["theme", "task", "model", "mode", "context", "question", "num_steps", "guidance_scale", "num_candidates"]
    assert seen == [*order, "seed", "ask", "race"]
    page.js("document.getElementsByName('question')[0].focus()")
    press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: "answered in" in page.text("status"), "an answer")
    page.js("document.getElementById('t').focus()")
    press(Keys.ARROW_LEFT)
    assert page.id("t").get_attribute("aria-valuetext") == f"t = 0.67, step 2 of 3: {page.text('answer')}"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_it_fits_and_can_be_read(page, address, size, dark):
    page.open(address, size, dark)
    page.fill()
    page.set("num_candidates", 3)
    page.ask()
    assert page.js("return document.documentElement.scrollWidth") <= size[0]
    below = page.js("return document.getElementById('answer').getBoundingClientRect().bottom - innerHeight")
    assert below <= 0, "the answer is not in sight"
    assert page.js("return document.documentElement.dataset.theme") == ("dark" if dark else "light")
    for selector in ("#answer .token", "#status", "#ask", "h1", "dt", ".hint"):
        contrast = page.js(CONTRAST, selector)
        assert contrast is None or contrast >= 4.5, (selector, contrast)
    page.id("theme").click()
    assert page.js("return document.documentElement.dataset.theme") == ("light" if dark else "dark")
    page.id("race").click()
    page.until(lambda: page.text("verdict"), "a verdict")
    assert page.js("return document.documentElement.scrollWidth") <= size[0]


CONTRAST = """
const e = document.querySelector(arguments[0]);
if (!e) return null;
const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
let behind = e;
while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
const pair = [light(getComputedStyle(e).color), light(getComputedStyle(behind).backgroundColor)].sort((a, b) => b - a);
return (pair[0] + 0.05) / (pair[1] + 0.05);
"""
"""Contrast of the first element of a selector with what is behind it, by WCAG 2."""


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(browser, folders):
    page = Page(browser)
    with serving({"tiny": folders["tiny"]}, KEYS) as address:
        page.open(address)
        page.until(lambda: "a key is wanted" in page.text("error"), "told that a key is wanted")
        page.id("key").send_keys("wrong\n")
        page.until(lambda: "not one of this server's" in page.text("error"), "told that the key is wrong")
        page.id("key").clear()
        page.id("key").send_keys(KEY)
        page.id("use-key").click()
        page.fill()
        page.ask()
        assert page.js("return [sessionStorage.getItem('yan-key'), localStorage.length]") == [KEY, 0]
        assert not page.id("race").is_enabled()
