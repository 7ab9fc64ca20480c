"""examples/own_loop.py: a loop outside mitrain learns colours, and the control does not."""

import runpy

import numpy as np
from folders import COLOURS, llm_folder, vision_folder
from PIL import Image
from source_tree import ROOT

SCRIPT = runpy.run_path(str(ROOT / "examples" / "own_loop.py"))


def colour_folders(path, each):
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (path / name).mkdir(parents=True)
        for number in range(each):
            noise = rng.integers(-20, 20, (16, 16, 3)) + np.array(colour)
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path / name / f"{number}.png")
    return path


def test_the_loop_learns_saves_and_loads(tmp_path, capsys):
    llm, vision = llm_folder(tmp_path / "llm"), vision_folder(tmp_path / "vision")
    pictures, out = colour_folders(tmp_path / "colours", each=8), tmp_path / "adapter"
    words = [
        str(pictures),
        "--llm",
        str(llm),
        "--encoder",
        str(vision),
        "--steps",
        "60",
        "--lr",
        "2e-2",
        "--out",
        str(out),
    ]
    scores = SCRIPT["main"](words)
    assert scores == {"held-out pictures": 1.0, "another sample's picture": 0.0}
    printed = capsys.readouterr().out
    assert "loaded again it says 'blue' of 3.png" in printed
    assert {path.name for path in out.iterdir()} >= {"mitrain.json", "mitrain.safetensors"}
