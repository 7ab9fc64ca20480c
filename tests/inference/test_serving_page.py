"""The page of mitrain serve in a real browser; skipped where there is none, or no Playwright to drive it."""

import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from exported import PROMPT, make_run, make_world
from PIL import Image
from source_tree import ROOT

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("python_multipart", reason="needs the extra [serve]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright, which drives the browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian, Ubuntu: apt install chromium)")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("page"))


@pytest.fixture
def browser():
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(params=["answer", "segment"])
def served(request, world):
    command = [sys.executable, "-m", "mitrain", "serve", str(make_run(world, request.param)), "--port", "0"]
    environment = os.environ | {"MITRAIN_CACHE": str(world / "cache"), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        line = next(line for line in process.stderr if "answers at" in line)
        yield request.param, line.split("answers at ")[1].split(";")[0]
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM and rest == "mitrain: stopped by SIGTERM\n"


def test_a_stranger_asks_about_two_pictures_and_sees_the_controls(served, world, browser):
    task, address = served
    images = sorted((world / "data" / "images").glob("*.png"))[:2]
    page = browser.new_page(viewport={"width": 1000, "height": 760})
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("body[data-ready=yes]")
    page.fill("#text", PROMPT if task == "answer" else "red square")
    page.click("#other")
    assert "choose a second file first" in page.inner_text("#state")
    for image in images:
        page.set_input_files("#file-image", str(image))
    page.click("#ask")
    shown = {}
    for title, button in (("answer", None), ("another input", "#other"), ("infusion off", "#off")):
        if button:
            page.click(button)
        panel = page.locator(f".answer[data-title='{title}']")
        panel.locator(".bar, img").first.wait_for()
        shown[title] = panel.inner_text() if task == "answer" else panel.locator("img").get_attribute("src")
    assert len({text.split("\n", 1)[-1] for text in shown.values()}) == 3
    page.fill("#text", " ")
    page.click("#ask")
    page.locator(".fault").wait_for()
    assert "the text is empty" in page.inner_text(".fault")
    assert [fault for fault in faults if "400 (Bad Request)" not in fault] == []
    ask = runpy.run_path(str(ROOT / "docs" / "images" / "page.py"))["ask"]  # the picture in docs/
    shot = Image.open(io.BytesIO(ask(page, address, list(map(str, images)), PROMPT if task == "answer" else "red square")))
    assert shot.format == "PNG" and shot.width == 1000 and shot.height > 500


def test_what_the_browser_records_is_sent_as_a_wave_file(browser, tmp_path):
    """The page's own encoder, on a signal that is known."""
    from mitrain.inference import serving

    source = Path(serving.__file__).with_name("page.html").read_text(encoding="utf-8")
    function = source[source.index("function wav") : source.index("async function record")]
    made = browser.new_page().evaluate(
        f"""async () => {{ {function}
        const buffer = new AudioBuffer({{length: 800, sampleRate: 8000}}), x = buffer.getChannelData(0);
        for (let i = 0; i < 800; i++) x[i] = Math.sin(i / 5) / 2;
        return [...new Uint8Array(await wav(buffer).arrayBuffer())]; }}"""
    )
    (tmp_path / "a.wav").write_bytes(bytes(made))
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth(), file.getnframes()) == (8000, 1, 2, 800)
        sound = np.frombuffer(file.readframes(800), "<i2") / 32767
    assert np.abs(sound - np.sin(np.arange(800) / 5) / 2).max() < 1e-4
