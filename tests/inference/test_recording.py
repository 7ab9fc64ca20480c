"""The page's recorder in Chromium, on the browser's fake microphone: what is sent is a sound."""

import io
import re
import shutil
import wave
from email import message_from_bytes
from pathlib import Path

import numpy as np
import pytest
from source_tree import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright, which drives the browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian, Ubuntu: apt install chromium)")
FAKE = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
PAGE = ROOT / "mitrain" / "inference" / "page.html"
RUN = {"name": "speech", "task": "answer", "step": 1, "asks": "prompt", "needs_text": True, "candidates": True}
RUN |= {"inputs": {"speech": {"takes": "audio", "may_lack": False}}}


def parts_of(request):
    """A form's parts by name."""
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    message = message_from_bytes(head + request.post_data_buffer)
    name = lambda part: re.search(r'name="(\w+)"', part["Content-Disposition"])[1]  # noqa: E731
    return {name(part): part.get_payload(decode=True) for part in message.get_payload()}


def test_what_is_recorded_is_heard_and_sent():
    sent = []

    def answered(route):
        sent.append(parts_of(route.request))
        route.fulfill(json={"answer": "a beep"})

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FAKE)
        page = browser.new_page()
        page.route("http://localhost:1/", lambda route: route.fulfill(path=Path(PAGE), content_type="text/html"))
        page.route("**/run", lambda route: route.fulfill(json=RUN))
        page.route("**/predict", answered)
        page.goto("http://localhost:1/")
        page.wait_for_selector("body[data-ready=yes]")
        page.click("text=Record")
        page.wait_for_selector("text=Stop")
        page.wait_for_timeout(2500)  # the fake device beeps once a second
        page.click("text=Stop")
        page.wait_for_selector("audio")
        page.fill("#text", "what is heard?")
        page.click("#ask")
        page.wait_for_selector("text=a beep")
        browser.close()
    (form,) = sent
    assert form["text"] == b"what is heard?" and form["infused"] == b"true"
    with wave.open(io.BytesIO(form["speech"])) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2) and file.getnframes() > file.getframerate() / 2
        heard = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float)
    assert np.abs(heard).max() > 300  # not silence
