"""The main job needs no extra: attach, train, eval, predict and export with every optional package made unimportable."""

import subprocess
import sys

import pytest
from methods_world import configured, make_world
from test_pinned import OPTIONAL

from mitrain.core.errors import MissingExtraError
from mitrain.data.formats import rle

WITHOUT = [name.replace("-", "_") for name in sorted(OPTIONAL)]
RUN = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {without} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
import torch, mitrain
from pathlib import Path
from transformers import AutoModelForCausalLM
from mitrain.cli import main

world = Path({world!r})
model = AutoModelForCausalLM.from_pretrained(world / "llm")
mit = mitrain.attach(model, mitrain.MiTConfig(modalities={{"image": 6}}, layers=[1]))
ids = torch.tensor([[3, 4, 5]])
model(input_ids=ids, labels=ids, infused={{"image": torch.randn(1, 6)}}).loss.backward()
assert all(parameter.grad is not None for parameter in mit.parameters())
run, out, picture = (str(world / name) for name in ("run", "out", "data/images/0.png"))
for words in (
    ["train", {config!r}, "--run-dir", run],
    ["eval", run],
    ["predict", run, "--image", picture, "--text", "this thing is"],
    ["export", run, "--out", out],
    ["predict", out, "--image", picture, "--text", "this thing is", "--json"],
):
    assert main(words) == 0, words
print(sorted(set({without}) & set(sys.modules)))
"""


def test_attach_train_eval_predict_and_export_need_no_extra(tmp_path, monkeypatch):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    config = str(configured(make_world(tmp_path), "mit", "classify"))
    script = RUN.format(without=WITHOUT, world=str(tmp_path), config=config)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"probabilities"' in done.stdout and done.stdout.endswith("[]\n")


def test_a_polygon_names_its_extra(monkeypatch):
    assert rle.decode_mask([[0, 0, 4, 0, 4, 4, 0, 4]], (8, 8)).sum() == 16
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    for read in (rle.check_segmentation, rle.decode_mask):
        read({"size": [2, 2], "counts": [2, 2]}, (2, 2))  # run lengths need nothing
        with pytest.raises(MissingExtraError, match=r"a mask that is a polygon needs .*pip install 'mitrain\[coco\]'"):
            read([[0, 0, 4, 0, 4, 4, 0, 4]], (8, 8))
