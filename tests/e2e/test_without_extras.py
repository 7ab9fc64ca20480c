"""The main job needs no extra and no Linux: attach, train, eval, predict and export with every optional package made
unimportable, and on what this machine can play of macOS."""

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
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
{system}
import mitrain
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

MACOS = """
import contextlib, ctypes.util, io, multiprocessing, os, sysconfig  # ctypes.util as on this system: some lack macOS's part

sysconfig.get_config_vars()  # of the Python that runs this

with contextlib.suppress(ImportError):
    import psutil  # chooses its own parts by the platform

def hidden(real):
    def without_proc(path, *args, **kwargs):
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(("/proc", "/dev/shm", "/sys")):
            raise FileNotFoundError(2, "No such file or directory", os.fsdecode(path))
        return real(path, *args, **kwargs)
    return without_proc

class CDLL(ctypes.CDLL):
    def __init__(self, name=None, *args, **kwargs):
        if name and name.endswith(".so.6"):
            raise OSError(f"dlopen({name}): no such file")
        super().__init__(name, *args, **kwargs)

    def __getattr__(self, name):
        if name == "prctl":
            raise AttributeError(name)
        return super().__getattr__(name)

def fork():
    raise OSError("fork is not used on macOS")

sys.platform, ctypes.CDLL = "darwin", CDLL
os.uname = lambda: os.uname_result(("Darwin", "mac", "25.0", "", "arm64"))
for module, names in ((os, "open stat lstat readlink listdir scandir"), (io, "open")):
    for name in names.split():
        setattr(module, name, hidden(getattr(module, name)))
__builtins__.open = io.open
for name in "sched_getaffinity posix_fadvise posix_fallocate pidfd_open memfd_create copy_file_range".split():
    delattr(os, name)
os.fork = fork
multiprocessing.set_start_method("spawn")
"""


@pytest.mark.parametrize("system", ["", MACOS], ids=["here", "macOS"])
def test_attach_train_eval_predict_and_export_need_no_extra(tmp_path, monkeypatch, system):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    config = str(configured(make_world(tmp_path), "mit", "classify"))
    script = RUN.format(without=WITHOUT, system=system, world=str(tmp_path), config=config)
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
