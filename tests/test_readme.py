"""The README is true: its commands parse, its Python runs, its files exist, its tables are the committed results."""

import re
import shlex
from pathlib import Path

import pytest
from folders import llm_folder
from source_tree import ROOT

from mitrain.cli import parser
from mitrain.core.config import read_yaml

README = (ROOT / "README.md").read_text(encoding="utf-8")
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = [line.split("#")[0].strip() for line in re.findall(r"^mitrain .*$", BASH, re.M)]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    arguments = parser().parse_args(shlex.split(command)[1:])
    assert callable(arguments.run)
    for word in shlex.split(command):
        if word.startswith(("configs/", "launch/")):
            assert (ROOT / word).is_file()


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 8


def test_the_python_example_runs(tmp_path):
    code = re.search(r"<!-- python -->\n```python\n(.*?)```", README, re.S)[1]
    llm_folder(tmp_path / "llm")
    scope: dict = {}
    exec(code.replace("path/to/llm", str(tmp_path / "llm")), scope)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    assert not hasattr(scope["model"], "mit") and any(p.requires_grad for p in scope["mit"].parameters())


def test_yaml_examples_are_yaml():
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert blocks and all(isinstance(read_yaml(block, "README"), dict) for block in blocks)


def test_links_point_at_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_tables_are_the_committed_results():
    found = re.findall(r"<!-- results: (\S+) -->\n(.*?)<!-- end -->", README, re.S)
    assert found
    for path, shown in found:
        assert shown.strip() == Path(ROOT / path).read_text(encoding="utf-8").strip(), f"put {path} into the README"
