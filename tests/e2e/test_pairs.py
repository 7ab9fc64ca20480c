"""The table of methods and kinds of files in docs/methods/index.md, held to models that are built and asked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from clips import sound_file, tone, video
from folders import colour_image, llm_folder, own_cache, vision_folder, whisper_folder
from methods_world import section

from mitrain.core.errors import UserError
from mitrain.data.formats.labels import LabelSample
from mitrain.methods import METHODS
from mitrain.training import schema
from mitrain.training.build import build

TABLE = Path(__file__).parents[2] / "docs" / "methods" / "index.md"
KINDS = ("image", "speech", "video", "arrays", "text")
FILES = {"image": "a.png", "speech": "a.wav", "video": "a.mkv", "arrays": "a.npy", "text": "a.txt"}
CHANGING = {"lora", "ia3", "full"}  # with where: both
OF_VECTORS = "vlora of vectors"  # with reads: vector
ROWS = [*METHODS, OF_VECTORS]


def table() -> dict[str, list[str]]:
    """The row of each method: its cells, in the order of the kinds."""
    lines = TABLE.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| `adapter.name` | image |"))
    rows = (line.strip("| ").split("|") for line in lines[start + 2 :])
    found = {}
    for first, *cells in rows:
        if not cells:
            break
        names = [OF_VECTORS] if "reads: vector" in first else [name for name in METHODS if f"`{name}`" in first]
        found |= {name: [cell.strip() for cell in cells] for name in names}
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    llm_folder(path / "llm", width=32, layers=2)
    llm_folder(path / "other", width=24, layers=2)
    vision_folder(path / "vision", layers=2)
    whisper_folder(path / "whisper")
    colour_image("red", 1).save(path / "a.png")
    sound_file(path / "a.wav", tone(0.3))
    (path / "a.mkv").write_bytes(video())
    np.save(path / "a.npy", np.ones((3, 5), np.float32))
    (path / "a.txt").write_text("this thing is red")
    with own_cache(path):
        yield path


def configuration(world: Path, method: str, kind: str):
    encoders = {
        "image": {"name": str(world / "vision")},
        "speech": {"name": str(world / "whisper")},
        "video": {"name": str(world / "vision"), "frames": 2},
        "arrays": {"takes": "features", "width": 5},
        "text": {"takes": "text", "name": str(world / "other")},
    }
    modality = "note" if kind == "text" else kind
    adapter = {**section(method.split()[0]), **({"where": "both"} if method in CHANGING else {})}
    adapter |= {"reads": "vector"} if method == OF_VECTORS else {}
    readout = ["joint"] if method in ("mope", "aurora") else ["last", modality]
    values = {
        "model": {"llm": str(world / "llm"), "encoders": {modality: encoders[kind]}},
        "adapter": adapter,
        "task": {"name": "classify", "readout": readout},
        "data": {"name": "labelled", "root": str(world), "may_lack": [modality], "classes": ["a", "b"]},
        "cache": False,
    }
    return modality, schema.from_dict(values)


def test_the_table_has_every_method():
    assert table().keys() == {*ROWS}
    assert all(len(cells) == len(KINDS) for cells in table().values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ROWS)
def test_a_method_trains_and_lacks_a_file_as_the_table_says(world, method, kind):
    """A sample that lacks its file is masked: its vector is 0. What cannot be is refused in a line."""
    modality, config = configuration(world, method, kind)
    if table()[method][KINDS.index(kind)] == "–":
        with pytest.raises(UserError, match=method) as refused:
            build(config)
        assert "\n" not in str(refused.value)
        return
    model = build(config)
    files = model.features(world)
    samples = [
        LabelSample("0", {modality: FILES[kind]}, "this thing is", ("a",)),
        LabelSample("1", {}, "this thing is", ("b",)),
    ]
    batch = model.evaluation_batch(samples, [sample.inputs for sample in samples], files)
    assert batch.inputs.has(modality).tolist() == [True, False]
    with torch.no_grad():
        vectors = model.adapter.encode(None, batch.inputs).read_out(modality)
    assert vectors[0].any() and not vectors[1].any()
    assert all(prediction.finite for prediction in model.task.predict(batch))
    model.train()
    total, count = model.task.loss(batch)
    total.backward()
    grads = [p.grad for part in model.trainable.values() for p in part.parameters() if p.grad is not None]
    assert count == 2 and grads and all(grad.isfinite().all() for grad in grads)
    model.adapter.detach()
