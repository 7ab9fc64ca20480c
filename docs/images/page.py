"""The picture of `mitrain serve` in use: asks about a picture in headless Chromium, with both controls.

    python docs/images/page.py RUN fortress.png doe.png --text "The thing in this picture belongs to the category of"

Needs the extra [serve], the package playwright and Chromium. The first picture is the other input of the control.
"""

import argparse
import io
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright


def ask(page: Page, address: str, pictures: list[str], text: str) -> bytes:
    """The page after an answer and its two controls, as a PNG file."""
    page.goto(address)
    page.wait_for_selector("body[data-ready=yes]")
    page.fill("#text", text)
    for picture in pictures:
        page.set_input_files("#file-image", picture)
    for title, button in (("answer", "#ask"), ("another input", "#other"), ("infusion off", "#off")):
        page.click(button)
        page.locator(f".answer[data-title='{title}']").locator(".bar, img").first.wait_for()
    return page.screenshot(full_page=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("pictures", nargs=2)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("page.webp"))
    given = parser.parse_args(words)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    command = [sys.executable, "-m", "mitrain", "serve", given.run, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
        try:
            address = next(line for line in server.stderr if "answers at" in line).split("answers at ")[1].split(";")[0]
            page = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
            page.set_default_timeout(300_000)
            page.set_viewport_size({"width": 1000, "height": 640})
            shot = ask(page, address, given.pictures, given.text)
        finally:
            server.send_signal(signal.SIGTERM)
    Image.open(io.BytesIO(shot)).save(given.out, quality=85)


if __name__ == "__main__":
    main()
