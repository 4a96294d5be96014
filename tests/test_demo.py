"The page in a browser: a headless Chromium opens it, types, draws, and asks for what can't be drawn."
import os
import shutil
import socket
import sys
import time
from pathlib import Path
import pytest
import torch
import deco
from conftest import begin, run
from deco import demo

gradio = pytest.importorskip("gradio")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def quiet():
    os.environ |= dict(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    "The page of the model that comes with deco, served by the command."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    errors = tmp_path_factory.mktemp("demo") / "errors"
    server = begin(errors, "deco.demo", "scenes-toy", "--port", port, prepare=quiet)
    try:
        for _ in range(240):
            if server.exitcode is not None: pytest.fail(errors.read_text("utf-8"))
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0: break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.join()


@pytest.fixture(scope="module")
def page(address):
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM: pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1200, height=1000))
        page.goto(address)
        page.get_by_role("button", name="Draw").wait_for(timeout=60_000)
        yield page
        browser.close()


def fill(page, **fields):
    for name, value in fields.items():
        page.get_by_label(name.replace("_", " "), exact=True).first.fill(str(value))


def drawn(page) -> bytes:
    "The picture's bytes, once it is another than before."
    image = page.locator("img[src*='/file=']").first
    before = image.get_attribute("src") if image.count() else None
    page.get_by_role("button", name="Draw").click()
    another = """before => {
        const i = document.querySelector("img[src*='/file=']")
        return i && i.src != before
    }"""
    page.wait_for_function(another, arg=before, timeout=60_000)
    return page.request.get(image.get_attribute("src")).body()


def complaint(page) -> str:
    page.get_by_role("button", name="Draw").click()
    toast = page.locator(".toast-body").last
    toast.wait_for(timeout=30_000)
    text = toast.inner_text()
    page.locator(".toast-close").last.click()
    toast.wait_for(state="detached", timeout=30_000)
    return text


def test_draws_and_hears_the_seed(page):
    assert page.locator("[data-testid='matplotlib'] img").count() == 0
    fill(page, prompt="a photo of a red circle and a blue square", seed=3, steps=12)
    first = drawn(page)
    fill(page, seed=4)
    second = drawn(page)
    fill(page, seed=3)
    third = drawn(page)
    assert first[:4] in (b"\x89PNG", b"RIFF") and first == third != second
    lines = page.locator(".cm-content").first.inner_text()
    assert "deco.sample_prompts" in lines and "seed=3" in lines and "a red circle and a blue square" in lines
    spectrum = page.locator("[data-testid='matplotlib'] img")
    assert spectrum.evaluate("i => i.naturalWidth") > 300
    picture = Path(os.environ.get("DECO_SCREENSHOT", "/nowhere")).with_suffix(".png")
    if picture.parent.is_dir():                                                # for 46_demo: nbs/images/demo
        page.screenshot(path=str(picture))


COMPLAINTS = [(dict(prompt=" "), "prompt is empty"), (dict(prompt="x" * 10_000), "10,000 characters"),
              (dict(steps=0), "from 1 to 1000"), (dict(width=33), "multiple of patch_size"),
              (dict(height=4096), "too large"),
              (dict(negative_prompt="y" * 3000), "negative prompt has 3,000")]

@pytest.mark.parametrize("fields, text", COMPLAINTS)
def test_complaints_stand_on_the_page(page, fields, text):
    usual = dict(prompt="a photo of a circle", negative_prompt="", steps=4, width=32, height=32)
    fill(page, **usual | fields)
    assert text in complaint(page)
    fill(page, **usual, seed=len(text))                                        # for each another picture
    assert drawn(page)                                                         # and then it goes on


def test_the_command(tmp_path):
    assert "nowhere" in run(demo, "nowhere/at-all", "--device", "cpu")
    assert "--device" in run(demo, "scenes-toy", "--device", "abacus")
    model = deco.create("deco-tiny", text_width=384, text_length=16)
    deco.save(tmp_path, model, dict(size=16, text=dict(name=str(tmp_path), length=16), prompts=["x"]))
    assert "no language model" in run(demo, tmp_path, "--device", "cpu")
    assert "--port must be from 0 to 65535, not 65536" in run(demo, "scenes-toy", "--port", 65536)
    with pytest.raises(ValueError, match="--port must be"): demo.serve(demo.Demo(run="scenes-toy", port=-1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --port" in run(demo, "scenes-toy", "--port", taken.getsockname()[1])


def test_it_listens_on_this_machine_alone(address):
    "Another address of this machine is refused: 127.0.0.2 is one on Linux."
    if sys.platform != "linux": pytest.skip("needs 127.0.0.2")
    with socket.socket() as s: assert s.connect_ex(("127.0.0.2", int(address.rpartition(":")[2]))) != 0
