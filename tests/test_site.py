"""The site of docs/ is built without a warning, shows every page and public name, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys

import pytest
from source_tree import ROOT

import mitrain

pytest.importorskip("material", reason="needs the extra [docs]")
pytest.importorskip("mkdocstrings_handlers.python", reason="needs the extra [docs]")
LOADED = re.compile(r"<(?:script|img|iframe|link rel=\"(?!canonical)[^\"]*\")[^>]*?(?:src|href)=\"?(https?:[^\" >]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return out


def test_every_page_is_there_and_nothing_is_loaded_from_elsewhere(site):
    pages = {path.parent.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("index.html")}
    ours = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert {name.removesuffix("index").rstrip("/") or "." for name in ours} | {
        "contributing",
        "changelog",
    } <= pages.keys()
    assert [found for text in pages.values() for found in LOADED.findall(text)] == []
    assert (site / "source/launch/env.sh.txt").read_bytes() == (ROOT / "launch/env.sh").read_bytes()
    assert 'href="../../source/launch/env.sh.txt"' in pages["guide/cluster"]
    for name, text in pages.items():
        images = re.findall(r'<img[^>]*?src="([^":]+)"', text)
        assert [image for image in images if not (site / name / image).resolve().is_file()] == [], name
    assert "method.svg" in pages["."] and "page.webp" in pages["readme"]


def test_the_reference_has_every_public_name(site):
    reference = (site / "api/mitrain/index.html").read_text(encoding="utf-8")
    assert [name for name in mitrain.__all__ if name != "__version__" and f'id="mitrain.{name}"' not in reference] == []
    kernels = (site / "api/kernels/index.html").read_text(encoding="utf-8")
    assert 'id="mitrain_kernels.infused_attention.infused_attention"' in kernels
    assert "<p>Args:</p>" in kernels  # and not run into its lines
