"""Of the site alone: pages that lie outside of docs/, links that lead there, and the form of docstrings."""

import re
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "readme.md"}
LINK = re.compile(r"(\]\(|src=\")([^)#:\s\"]+)((?:#[^)]*)?[)\"])")


class Blocks(Preprocessor):
    """What docstrings indent under ``Args:`` or another line with a colon stays as it is written, line by line."""

    def run(self, lines: list[str]) -> list[str]:
        return re.sub(r"(?m)^(\w[^\n]*:)\n(?= {4}\S)", r"\1\n\n", "\n".join(lines)).split("\n")


class Docstrings(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(Blocks(md), "docstrings", 0)


def on_config(config: Any) -> Any:
    config.markdown_extensions.append(Docstrings())
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages at the root, and every file outside of docs/ that a page links to, as it is."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    linked = {target for file in list(files.documentation_pages()) for target in targets(file)}
    for path in sorted(linked):
        if path.is_file() and not path.is_relative_to(ROOT / "docs") and name(path) not in PAGES:
            files.append(File.generated(config, f"source/{name(path)}.txt", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them: a page's place in docs/, or under source/ what lies outside."""
    here = Path(page.file.src_uri).parent

    def moved(match: re.Match) -> str:
        target = (folder_of(page.file) / match[2]).resolve()
        if target.is_dir() or not target.is_relative_to(ROOT):
            return match[0]
        # a page is a folder of its own on the site, which mkdocs takes into account in Markdown's links alone
        up = "../" if match[1].startswith("src") and page.file.name != "index" else ""
        return f"{match[1]}{up}{relative(place(target), here)}{match[3]}"

    return LINK.sub(moved, markdown)


def targets(file: File) -> set[Path]:
    return {(folder_of(file) / match[2]).resolve() for match in LINK.finditer(file.content_string)}


def folder_of(file: File) -> Path:
    """Of the page's source in the repository."""
    return ROOT if file.src_uri in PAGES.values() else (ROOT / "docs" / file.src_uri).parent


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def place(path: Path) -> str:
    """Where the site has a file of the repository."""
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs").as_posix()
    return PAGES.get(name(path), f"source/{name(path)}.txt")


def relative(target: str, here: Path) -> str:
    return Path(target).as_posix() if here == Path(".") else "../" * len(here.parts) + target
