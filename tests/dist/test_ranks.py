"""Two real processes with gloo: every number that one process gives, and no step that one rank takes alone."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from folders import colour_records, llm_folder, vision_folder
from source_tree import ROOT
from worker import CLIPPED, trained

from mitrain import checkpoint
from mitrain.cli import main

RANKS = 2
TRAIN = {"steps": 6, "batch": 7, "accumulate": 2, "lr": 1e-2, "eval_every": 3, "save_every": 3, "keep": 9,
         "eval_batch": 5, "schedule": {"name": "constant"}}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, data and a configuration; beside them a run of one process, whole and as interrupted after step 3."""
    path = tmp_path_factory.mktemp("ranks")
    llm_folder(path / "llm", width=48)
    vision_folder(path / "vision")
    colour_records(path / "data", train=24, val=13)
    config = {
        "model": {"llm": str(path / "llm"), "vision": [{"name": str(path / "vision"), "layer": 2}]},
        "adapter": {"name": "mit", "layers": [1, 2]},
        "features": {"views": 2, "noise": 0.05, "dropout": 0.1},
        "task": {"name": "answer"},
        "data": {"name": "records", "root": str(path / "data")},
        "train": TRAIN,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MITRAIN_CACHE", str(path / "cache"))
        assert main(["train", str(path / "config.yaml"), "name=one", "--runs", str(path), "--json"]) == 0
        shutil.copytree(run_folder(path, "one"), path / "one-interrupted")
        shutil.rmtree(path / "one-interrupted" / "checkpoints" / "step-00000006")
        (path / "one-interrupted" / "summary.json").unlink()
        yield path


def run_folder(parent: Path, name: str) -> Path:
    (folder,) = parent.glob(f"{name}-2*")
    return folder


def environment(world: Path, **more: str) -> dict[str, str]:
    paths = [str(ROOT / p) for p in (".", "kernels", "tests", "tests/unit", "tests/dist")]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "MITRAIN_CACHE": str(world / "two-cache"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours, "MITRAIN_TIMEOUT": "120", **more}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(world, tmp_path_factory):
    """What every check of worker.py found on each rank."""
    out = tmp_path_factory.mktemp("found")
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("worker.py")), str(world), str(out)]
    started = [
        subprocess.Popen(
            command,
            env=environment(world, RANK=str(rank), LOCAL_RANK=str(rank), **meet),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * RANKS, said[0][1] + said[1][1]
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return [{**f, "stdout": text[0]} for f, text in zip(found, said, strict=True)]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 7))
    assert {line["samples"] for line in steps} == {14} and not any("skipped" in line for line in steps)
    return [line["loss"] for line in steps]


def test_what_ranks_tell_one_another(ranks):
    for rank, found in enumerate(ranks):
        assert found["collectives"] == {
            "sum": [3.0, 1.0],
            "agree": [True, False, True],
            "gather": ["", "x"],
            "from main": 0,
            "refused": ["rank 0 refuses", rank == 1],
            "copied": [0.0, 0.0, 0.0],
        }


@pytest.mark.parametrize("config", range(len(CLIPPED)))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_engine_on_two_ranks_is_the_engine_on_one(ranks, config, dtype, tolerance):
    results, weights = trained(CLIPPED[config], dtype, lambda count: slice(count))
    for found in ranks:
        there, weights_there = found["engine"][f"{config} {dtype}"]
        assert [r[2] for r in there] == [13.0] * 5
        for one, two in zip([results, *weights], [there, *weights_there], strict=True):
            one, two = (torch.tensor(values, dtype=torch.float64) for values in (one, two))
            torch.testing.assert_close(two, one, rtol=tolerance, atol=tolerance)
    assert ranks[0]["engine"] == ranks[1]["engine"]  # bit for bit


def test_all_ranks_skip_for_the_same_reason(ranks):
    assert ranks[0]["skips"] == ranks[1]["skips"]
    assert ranks[0]["skips"][0] == [
        ["nothing", True, None, 4.0],
        ["loss", False, "non-finite loss", 4.0],
        ["gradient", False, "non-finite gradient", 4.0],
        ["no samples here", True, None, 2.0],
        ["no samples", False, "no samples", 0.0],
        ["nothing", True, None, 4.0],
    ]


def test_ranks_share_the_filling_of_a_cache(ranks):
    assert [found["cache"][0] for found in ranks] == [6, 5]
    for found in ranks:
        assert found["cache"][1] == [[[float(i)] * 2] for i in range(11)] and found["cache"][2] == 2


def test_a_signal_on_one_rank_is_heard_by_all(ranks):
    assert [found["stop"] for found in ranks] == [[None, "SIGTERM"]] * RANKS


def test_a_run_on_two_ranks_is_the_run_of_one(world, ranks):
    """Frozen features are encoded in other groups of images, which moves them by rounding; float32 then gives 1e-5."""
    assert [found["fresh"] for found in ranks] == [0, 0]
    assert losses(run_folder(world / "two", "fresh")) == pytest.approx(losses(run_folder(world, "one")), rel=1e-5)


def test_a_run_of_one_process_is_resumed_on_two(world, ranks):
    assert [found["resumed"] for found in ranks] == [0, 0]
    one, two = losses(run_folder(world, "one")), losses(world / "one-interrupted")
    assert two[:3] == one[:3] and two[3:] == pytest.approx(one[3:], rel=1e-5)


def test_a_signal_on_one_rank_stops_the_run_and_it_goes_on_bit_for_bit(world, ranks):
    assert [found["interrupted"] for found in ranks] == [[4, 0, 0]] * RANKS
    folder = run_folder(world / "two", "stopped")
    assert [m.step for _, m in checkpoint.survey(folder / "checkpoints")] == [3, 4, 6]
    assert losses(folder) == losses(run_folder(world / "two", "fresh"))


def test_a_run_of_two_ranks_is_resumed_on_one(world, ranks):
    folder = world / "two-interrupted"
    shutil.copytree(run_folder(world / "two", "fresh"), folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    assert main(["train", "--resume", str(folder), "--json"]) == 0
    assert losses(folder) == pytest.approx(losses(run_folder(world, "one")), rel=1e-5)


def test_evaluation_and_generation_are_split_and_gathered(world, ranks, capsys):
    assert [found["scored"] for found in ranks] == [0, 0]
    assert ranks[1]["stdout"] == ""
    document = ranks[0]["stdout"]
    two = json.loads(document[document.index("\n{") :])
    folder = run_folder(world / "two", "fresh")
    assert main(["eval", str(folder), "--split", "test", "--generate", "--samples", "13", "--json"]) == 0
    assert two == json.loads(capsys.readouterr().out)
    assert two["samples"] == 13 and "exact_match" in two


def test_the_launcher_script_trains_on_two_ranks(world):
    command = ["bash", str(ROOT / "launch/local.sh"), "2", "train", str(world / "config.yaml"), "name=launched"]
    done = subprocess.run(
        [*command, "--runs", str(world / "two"), "--json"],
        env=environment(world, PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    folder = run_folder(world / "two", "launched")
    assert json.loads(done.stdout)["run"] == str(folder)
    assert losses(folder) == pytest.approx(losses(run_folder(world, "one")), rel=1e-5)
