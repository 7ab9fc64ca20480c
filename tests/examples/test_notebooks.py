"""The notebooks run from the first cell to the last, on tiny models in place of the real ones."""

import os
import re

import nbformat
import pytest
from folders import llm_folder
from nbclient import NotebookClient
from source_tree import ROOT
from tutorials import stand_ins

NOTEBOOKS = ROOT / "examples" / "notebooks"


def run(name, folder, changes):
    """The notebook with what its cells printed; a cell that fails raises."""
    book = nbformat.read(NOTEBOOKS / name, as_version=4)
    for cell in book.cells:
        assert cell.cell_type != "code" or cell.outputs == [], "commit notebooks without outputs"
        for before, after in changes.items():
            cell.source = re.sub(before, after, cell.source)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return "\n".join(out.get("text", "") for cell in book.cells for out in cell.get("outputs", []))


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    ours = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "examples/demo"))
    monkeypatch.setenv("PYTHONPATH", ours)
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


def test_attach(tmp_path):
    llm = llm_folder(tmp_path / "llm")
    said = run("attach.ipynb", tmp_path, {"HuggingFaceTB/SmolLM2-135M-Instruct": str(llm)})
    assert "own vector:        ['red', 'green', 'blue', 'yellow']" in said
    assert "another's vector:  ['yellow', 'red', 'green', 'blue']" in said


def test_train_and_look(tmp_path, monkeypatch):
    monkeypatch.setenv("MITRAIN_CACHE", str(stand_ins(tmp_path / "cache")))
    in_the_kernel = r"import mitrain.cli; assert mitrain.cli.main('\1'.split()) == 0"  # each process would import anew
    said = run("train_and_look.ipynb", tmp_path, {r"!mitrain ([^#\n]*)": in_the_kernel})
    assert "72 train, 9 val, 9 test" in said and "'labels': [" in said and re.search(r"control +shuffle", said)
