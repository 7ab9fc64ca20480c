"""Ranks that would not run the same end before the first step, each with one line that names what differs."""

import json
import shutil

import pytest
import yaml
from PIL import Image
from ranks import make_world
from safetensors import torch as safetensors

RANKS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A world whose configuration names its models and data from the folder it is used in, and a finished run."""
    path = make_world(tmp_path_factory.mktemp("unequal"))
    config = yaml.safe_load((path / "config.yaml").read_text())
    here = "/proc/self/cwd"  # one absolute name for a folder of each rank's own, as on hosts that share no disk
    config["model"] = {"llm": f"{here}/llm", "encoders": {"image": {"name": f"{here}/vision", "layer": 2}}}
    config["data"]["root"] = f"{here}/data"
    config["train"]["steps"] = 2
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def world(base, tmp_path):
    for rank in range(RANKS):
        shutil.copytree(base, tmp_path / str(rank))
    return tmp_path


def ended(forge, world, call, *words):
    environment = {"MITRAIN_CACHE": str(world / "cache"), "MITRAIN_TIMEOUT": "120"}
    return forge.start(RANKS, f"unequal_worker:{call}", world, *words, **environment).wait()


def lines_of(found) -> list[list[str]]:
    assert [rank.code for rank in found] == [2] * RANKS, "".join(rank.err for rank in found)
    return [[line for line in rank.err.splitlines() if not line.startswith("run folder:")] for rank in found]


def complaints(found) -> list[str]:
    lines = lines_of(found)
    assert [len(said) for said in lines] == [1] * RANKS, lines
    return [said[0] for said in lines]


def answers(root):
    lines = [json.loads(line) for line in (root / "data" / "train.jsonl").read_text().splitlines()]
    lines[3]["answer"] = next(c for c in lines[3]["candidates"] if c != lines[3]["answer"])
    (root / "data" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def picture(root):
    path = next(iter(sorted((root / "data").rglob("*.png"))))
    with Image.open(path) as image:
        changed = image.rotate(90)
    changed.save(path)


def weights(root):
    path = root / "llm" / "model.safetensors"
    tensors = safetensors.load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][0, 0] += 1e-3
    safetensors.save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (answers, "data.train.answer of rank 1 is not rank 0's"),
        (picture, "data.train.image.content of rank 1 is not rank 0's"),
        (weights, "base.text.weights of rank 1 is not rank 0's"),
    ],
)
def test_other_data_or_weights_on_a_rank_are_named_before_the_first_step(forge, world, spoil, says):
    spoil(world / "1")
    found = ended(forge, world, "command", "-", "train", "config.yaml", "--run-dir", world / "run")
    for rank, line in enumerate(complaints(found)):
        who = "mitrain, rank 1" if rank else "mitrain"
        assert line.startswith(f"{who}: the ranks would not run the same: ") and says in line
    assert not (world / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        ("code", "code.sources of rank 1 is not rank 0's"),
        ("train.lr=0.5", 'arguments.overrides is ["train.lr=0.1"] on rank 0, ["train.lr=0.5"] on rank 1'),
    ],
)
def test_other_code_or_arguments_on_a_rank_are_named(forge, world, spoiled, says):
    words = ("train", "config.yaml", "--run-dir", world / "run", "train.lr=0.1")
    found = ended(forge, world, "command", spoiled, *words)
    for line in complaints(found):
        assert says in line
    assert not (world / "run").exists()


@pytest.fixture(scope="module")
def trained(base, forge, tmp_path_factory):
    """A run, and beside it the folders of the ranks that trained it."""
    path = tmp_path_factory.mktemp("trained")
    for rank in range(RANKS):
        shutil.copytree(base, path / str(rank))
    found = ended(forge, path, "command", "-", "train", "config.yaml", "--run-dir", path / "run", "--json")
    assert [rank.code for rank in found] == [0] * RANKS, "".join(rank.err for rank in found)
    return path


def test_an_evaluation_is_of_one_split_one_checkpoint_and_one_data_set(forge, trained, tmp_path):
    found = ended(forge, trained, "command", "test", "eval", trained / "run", "--split", "val")
    for line in complaints(found):
        assert 'arguments.split is "val" on rank 0, "test" on rank 1' in line
    world = shutil.copytree(trained, tmp_path / "world")
    for rank in range(RANKS):
        shutil.copytree(trained / "run", world / str(rank) / "run")
    answers(world / "1")
    adapter = sorted((world / "1" / "run" / "checkpoints").glob("step-*"))
    for path in adapter[1:]:
        shutil.rmtree(path)
    found = ended(forge, world, "command", "-", "eval", "run", "--split", "train", "--checkpoint", "latest")
    for line in complaints(found):
        assert "data.train.answer of rank 1" in line
        assert len(adapter) == 1 or "checkpoint.step is 2 on rank 0, 1 on rank 1" in line


def test_a_rank_without_memory_says_so_in_a_line_and_the_other_ends(forge, world):
    found = ended(forge, world, "out_of_memory", "train", "config.yaml", "--run-dir", world / "run", "--json")
    first, second = complaints(found)
    assert second.startswith("mitrain, rank 1: out of memory (") and "tried to allocate" in second
    assert second.endswith("set model.quantize=int8")
    assert first.startswith("mitrain: rank 0 lost the others (")


@pytest.mark.parametrize(
    ("errors", "says"),
    [
        (("no x: give y", "no x: give y"), [["mitrain: no x: give y"], []]),
        (("no x: give y", "no z: give y"), [["mitrain: no x: give y"], ["mitrain, rank 1: no z: give y"]]),
        (("-", "no z: give y"), [["mitrain: rank 0 lost the others ("], ["mitrain, rank 1: no z: give y"]]),
        (("no x: give y", "-"), [["mitrain: no x: give y"], ["mitrain, rank 1: rank 1 lost the others ("]]),
    ],
)
def test_what_fails_alike_is_said_once_and_what_fails_elsewhere_by_its_rank(forge, errors, says):
    found = lines_of(forge.start(RANKS, "unequal_worker:fail", *errors).wait())
    for own, lines in zip(says, found, strict=True):
        assert len(own) == len(lines) and all(map(str.startswith, lines, own)), found
