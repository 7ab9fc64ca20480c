"""README and docs are true: commands parse, Python runs, links lead somewhere, tables are the committed results."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
from folders import llm_folder
from source_tree import ROOT

import mitrain
from benchmarks import command as benchmarks
from mitrain import cli
from mitrain.core.config import read_yaml

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.md"))
}
BASH = "\n".join(block for page in PAGES.values() for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page, re.S))
INLINE = sorted({line for page in PAGES.values() for line in re.findall(r"`(mitrain [a-z][^`]*)`", page)})
COMMANDS = [line.split("#")[0].strip() for line in re.findall(r"^mitrain .*$", BASH, re.M)]
RESULTS = re.compile(r"<!-- results: (\S+) -->\n(.*?)<!-- end -->", re.S)
PYTHON = [page for page, text in PAGES.items() if "<!-- python -->" in text]


def known_by(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """Who reads the words of a command, and which of them."""
    return (benchmarks.parser(), words[1:]) if words[0] == "bench" else (cli.parser(), words)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    known, words = known_by(shlex.split(command)[1:])
    assert callable(known.parse_args(words).run)
    for word in shlex.split(command):
        if word.startswith(("configs/", "launch/")):
            assert (ROOT / word).is_file()


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 30 and "README.md" in PYTHON


@pytest.mark.parametrize("command", INLINE)
def test_commands_in_the_text_exist(command):
    """They may lack what they need (`mitrain export`), but their words and options are known."""
    known, words = known_by(shlex.split(command.replace("…", ""))[1:])
    while (below := [a for a in known._actions if isinstance(a, argparse._SubParsersAction)]) and not words[0].isupper():
        known = below[0].choices[words.pop(0)]
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert options <= known._option_string_actions.keys()


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_example_runs(page, tmp_path):
    code = re.search(r"<!-- python -->\n```python\n(.*?)```", PAGES[page], re.S)[1]
    llm_folder(tmp_path / "llm")
    scope: dict = {}
    exec(code.replace("path/to/llm", str(tmp_path / "llm")), scope)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    assert not hasattr(scope["model"], "mit") and any(p.requires_grad for p in scope["mit"].parameters())


def test_yaml_examples_are_yaml():
    blocks = [(page, block) for page, text in PAGES.items() for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    assert blocks and all(isinstance(read_yaml(block, page), dict) for page, block in blocks)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert all((ROOT / page).parent.joinpath(image).is_file() for image in re.findall(r'src="([^":]*)"', PAGES[page]))
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^):]*))?\)", PAGES[page]):
        path = (ROOT / page).parent.joinpath(target) if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


def anchors(text: str) -> set[str]:
    """Of a page's headings, as code hosts make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_index():
    shown = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#:]+)", PAGES["docs/index.md"])}
    pages = {ROOT / page for page in PAGES if page.startswith("docs/") and page != "docs/index.md"}
    assert pages - shown == set()
    tabs = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in pages if f": {page.relative_to(ROOT / 'docs').as_posix()}" not in tabs] == [
        ROOT / "docs/methods/index.md"
    ]


def test_the_reference_has_every_public_name():
    names = {f"::: mitrain.{name}" for name in mitrain.__all__ if name != "__version__"}
    assert names - set(PAGES["docs/api/mitrain.md"].splitlines()) == set()


def test_the_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 10_000


def test_tables_are_the_committed_results():
    found = [(page, *block) for page, text in PAGES.items() for block in RESULTS.findall(text)]
    assert len(found) >= 8
    for page, path, shown in found:
        assert shown.strip() == Path(ROOT / path).read_text(encoding="utf-8").strip(), f"put {path} into {page}"


FEW = ["spoken-category/missing.json", "sentiment/results.json", "compare/speech-fusion/aurora-val.json"]
"""Results that no table has, each of a few numbers."""


@pytest.mark.parametrize("page", ["README.md", "docs/results/methods.md"])
def test_numbers_in_a_text_stand_in_a_table_that_a_command_made(page):
    text = PAGES[page]
    if page == "README.md":
        text = text.partition("## What it reaches")[2].partition("## Where to read on")[0]
        tables = [path.read_text(encoding="utf-8") for path in (ROOT / "docs/results").rglob("table.md")]
    else:  # those that it shows
        tables = [shown for _, shown in RESULTS.findall(text)]
    tables += [(ROOT / "docs/results" / path).read_text(encoding="utf-8") for path in FEW]
    made = {f"{float(number):.3f}" for number in re.findall(r"\d?\.\d{3,}", "\n".join(tables))}
    said = re.findall(r"(?<![\d.])0\.\d{3}\b", RESULTS.sub("", text))
    assert len(said) > 10 and not [number for number in said if number not in made]
