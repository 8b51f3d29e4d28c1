"""The page in a real browser: headless Chromium, driven by Playwright, as wide as a desktop and as a phone.

With the variable SCREENSHOTS=docs, the pictures of the documentation are taken anew.
"""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hydra_hf
from hydra_hf import HydraPipeline
from hydra_hf.demo.abilities import CAT_AND_STAR
from hydra_hf.demo.space import write_space
from hydra_hf.pipelines.answering import answer
from toy_models import toy_pipeline


pytest.importorskip("gradio", reason="the page needs gradio: pip install hydra_hf[demo]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright's client: pip install playwright")
pytestmark = pytest.mark.slow

from hydra_hf.demo.page import launch  # noqa: E402


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WIDTHS = {"desktop": (1280, 720), "phone": (390, 844)}
TIMEOUT = 120_000  # milliseconds, for machines with other work


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as driver:
        if path is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}, or name one in the variable CHROMIUM")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pipeline() -> HydraPipeline:
    return HydraPipeline.from_pretrained(hydra_hf.TINY)


@pytest.fixture(scope="module")
def url(pipeline):
    app, url, _ = launch(pipeline, hydra_hf.TINY, prevent_thread_lock=True, quiet=True)
    yield url
    app.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def images_url(tmp_path_factory):
    """A random model that knows nothing of clips and edits."""
    app, url, _ = launch(toy_pipeline(), str(tmp_path_factory.mktemp("random")), prevent_thread_lock=True, quiet=True)
    yield url
    app.blocks.close(verbose=False)


@pytest.fixture
def visit(browser):
    """Opens a page at a width of `WIDTHS`; afterwards, nothing must have been asked of another machine, and no script have failed."""
    contexts, outside, errors = [], [], []

    def visit(url: str, width: str = "desktop"):
        size = dict(zip(("width", "height"), WIDTHS[width]))
        context = browser.new_context(viewport=size, has_touch=width == "phone", color_scheme="light")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        page.on(
            "request", lambda request: request.url.startswith((url, "data:", "blob:")) or outside.append(request.url)
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.get_by_role("button", name="Draw", exact=True).wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert outside == []
    assert errors == []


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def take_example(page, text: str) -> None:
    page.get_by_text(text, exact=True).locator("visible=true").first.click()


def picture_in(page, name: str) -> Image.Image:
    """The picture that an image of the page shows."""
    element = page.locator(f"#{name} img")
    element.wait_for()
    page.wait_for_function("name => document.querySelector(`#${name} img`).naturalWidth > 0", arg=name)
    return Image.open(io.BytesIO(page.request.get(element.get_attribute("src")).body())).convert("RGB")


def shoot(page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)  # of transitions
        screenshot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        screenshot.quantize(256, dither=Image.Dither.NONE).save(Path(folder, f"demo-{name}.png"), optimize=True)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_drawing_is_shown_step_by_step_and_is_the_pipelines(visit, url, pipeline, width):
    page = visit(url, width)
    assert page.evaluate("document.documentElement.scrollWidth") == WIDTHS[width][0]
    page.evaluate(
        """() => {
            window.seen = new Set();
            const look = () => window.seen.add(
                document.querySelector('#status').innerText + ' ' + (document.querySelector('#picture img')?.src ?? ''));
            new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});
        }"""
    )
    page.get_by_label("What to draw").fill("two apples")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("Done: 24 steps, seed 0").wait_for()
    seen = page.evaluate("[...window.seen]")
    steps = {int(number) for text in seen for number in re.findall(r"Step (\d+) of 24", text)}
    assert len(steps) >= 3
    assert len({text.split()[-1] for text in seen if "http" in text}) >= 3  # pictures
    expected = pipeline("two apples", generator=torch.Generator().manual_seed(0)).images[0]
    assert np.array_equal(np.asarray(picture_in(page, "picture")), np.asarray(expected))
    page.locator("h1").scroll_into_view_if_needed()
    shoot(page, f"draw-{width}")


@pytest.mark.parametrize("width", WIDTHS)
def test_an_example_is_asked_about(visit, url, pipeline, width):
    page = visit(url, width)
    open_tab(page, "Ask")
    take_example(page, question := "is the cat left or right of the star?")
    picture_in(page, "picture")
    page.get_by_role("button", name="Ask", exact=True).click()
    (expected,) = answer(pipeline.model, pipeline.processor, [Image.open(CAT_AND_STAR)], [question])
    reply = page.locator("#answer textarea")
    playwright.expect(reply).to_have_value(expected, timeout=TIMEOUT)
    shoot(page, f"ask-{width}")


def test_a_picture_is_rebuilt_and_painted(visit, url):
    page = visit(url)
    page.locator("button.gallery-item").first.click()
    original = np.asarray(picture_in(page, "picture"), dtype=float)
    open_tab(page, "Rebuild")
    page.get_by_role("button", name="Rebuild", exact=True).click()
    assert np.abs(np.asarray(picture_in(page, "rebuilt"), dtype=float) - original).mean() < 10
    open_tab(page, "Maps")
    page.get_by_role("button", name="Paint", exact=True).click()
    depth, boundaries = (np.asarray(picture_in(page, name), dtype=float) for name in ("depth", "segment"))
    assert (np.abs(depth - depth.mean(-1, keepdims=True)).mean() < 10).all()  # grey
    assert np.abs(depth - boundaries).mean() > 10
    shoot(page, "maps-desktop")


def test_only_what_the_model_can_do_is_shown(visit, url, images_url):
    assert visit(images_url).get_by_role("tab").all_inner_texts() == ["Draw", "Ask", "Rebuild", "Maps"]
    phone = visit(url, "phone")
    tabs = phone.get_by_role("tab")
    assert tabs.all_inner_texts() == ["Draw", "Ask", "Edit", "Rebuild", "Maps", "Clips"]
    assert all(tab.is_visible() for tab in tabs.all())
    assert phone.evaluate("document.documentElement.scrollWidth") == WIDTHS["phone"][0]


def test_an_edit_is_the_pipelines_and_becomes_the_picture(visit, url, pipeline):
    page = visit(url)
    open_tab(page, "Edit")
    take_example(page, instruction := "remove the star")
    picture_in(page, "picture")
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_text("Done: 24 steps, seed 0").wait_for()
    edited, source = picture_in(page, "edited"), Image.open(CAT_AND_STAR)
    (expected,) = pipeline(instruction, image=source, generator=torch.Generator().manual_seed(0)).images
    assert np.array_equal(np.asarray(edited), np.asarray(expected))
    shoot(page, "edit-desktop")
    before = page.locator("#picture img").get_attribute("src")
    page.get_by_role("button", name="Keep as the picture").click()
    page.wait_for_function("src => document.querySelector('#picture img').src != src", arg=before)
    assert np.array_equal(np.asarray(picture_in(page, "picture")), np.asarray(expected))


def test_a_clip_is_drawn_and_asked_about(visit, url):
    pytest.importorskip("av", reason="clips need PyAV: pip install hydra_hf[video]")
    page = visit(url)
    open_tab(page, "Clips")
    page.get_by_label("What happens").fill("a cat moves to the right")
    page.get_by_role("button", name="Draw clip").click()
    page.locator("#clip video").wait_for()
    page.wait_for_function("document.querySelector('#clip video').videoWidth > 0")
    page.get_by_label("Question about the clip").fill("what moves?")
    page.get_by_role("button", name="Ask about the clip").click()
    playwright.expect(page.locator("#clip_answer textarea")).to_have_value(re.compile("cat"), timeout=TIMEOUT)
    page.locator("h1").scroll_into_view_if_needed()
    shoot(page, "clips-desktop")


def test_stop_ends_a_drawing_and_the_next_one_is_drawn(visit, url):
    page = visit(url)
    page.get_by_text("Settings", exact=True).locator("visible=true").click()
    steps = page.get_by_role("spinbutton", name="Steps")
    page.wait_for_timeout(2000)  # what is typed while the settings still open is taken back
    steps.fill("100")
    steps.press("Tab")  # a number counts once its field is left
    page.get_by_label("What to draw").fill("a cat")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text(re.compile(r"Step \d+ of 100")).wait_for()
    page.get_by_role("button", name="Stop", exact=True).locator("visible=true").click()
    page.wait_for_timeout(2000)  # a click that comes before the stop has arrived is stopped with it
    steps.fill("3")
    steps.press("Tab")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("Done: 3 steps, seed 0").wait_for()


def test_what_is_missing_or_unknown_is_said(visit, url):
    page = visit(url)
    open_tab(page, "Ask")
    page.get_by_label("Question", exact=True).fill("is there a zebra?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("There is no picture yet").wait_for()
    page.get_by_text("Words that this model does not know: zebra").wait_for()


@pytest.mark.parametrize("command", [["app.py"], ["-m", "hydra_hf.cli", "demo"]], ids=["app", "hydra"])
def test_a_space_and_the_command_line_serve_the_page(visit, tmp_path, command):
    write_space(tmp_path / "space", hydra_hf.TINY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {**os.environ, "PYTHONPATH": "", "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(tmp_path)}
    command = [sys.executable, "-u", *command]
    with subprocess.Popen(command, cwd=tmp_path / "space", env=settings, stdout=subprocess.PIPE, text=True) as app:
        try:
            lines = iter(app.stdout.readline, "")
            assert any(f"http://127.0.0.1:{port}" in line for line in lines)
            page = visit(f"http://127.0.0.1:{port}/")
            assert page.get_by_text("hydra-tiny").count() == 1
        finally:
            app.terminate()
