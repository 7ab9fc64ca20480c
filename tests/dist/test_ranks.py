"""Two real processes with gloo: every number that one process gives, and no step that one rank takes alone."""

from folders import own_cache
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from ranks import PATH, ROOT, SAMPLES, STEPS, losses, make_world, run_folder
from worker import CLIPPED, trained

from commands import as_json
from mitrain.training import checkpoint
from mitrain.training.checkpoint.folder import complete_checkpoints
from mitrain.cli import main

RANKS = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, data and a configuration; beside them a run of one process, whole and as interrupted after step 3."""
    with own_cache(make_world(tmp_path_factory.mktemp("ranks"))) as path:
        assert main(["train", str(path / "config.yaml"), "name=one", "--runs", str(path), "--json"]) == 0
        shutil.copytree(run_folder(path, "one"), path / "one-interrupted")
        shutil.rmtree(path / "one-interrupted" / "checkpoints" / "step-00000006")
        (path / "one-interrupted" / "summary.json").unlink()
        yield path


def environment(world) -> dict[str, str]:
    return {"MITRAIN_CACHE": str(world / "two-cache"), "MITRAIN_TIMEOUT": "120"}


@pytest.fixture(scope="module")
def ranks(world, forge, tmp_path_factory):
    """What every check of worker.py found on each rank."""
    out = tmp_path_factory.mktemp("found")
    ended = forge.start(RANKS, "worker:run", world, out, **environment(world)).wait()
    assert [rank.code for rank in ended] == [0] * RANKS, "".join(rank.err for rank in ended)
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return [{**f, "stdout": rank.out} for f, rank in zip(found, ended, strict=True)]


def test_ranks_that_meet_again_find_nothing_of_the_group_before(forge, tmp_path):
    """As where one process trains twice: the store is the same, and held what gloo had written of the sockets then."""
    ended = forge.start(RANKS, "worker:meets", tmp_path, MITRAIN_TIMEOUT="10").wait(timeout=120)
    assert [rank.code for rank in ended] == [0] * RANKS, "".join(rank.err for rank in ended)
    for rank in range(RANKS):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[[n, n + 1], ""] for n in range(3)]


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
    assert [found["interrupted"] for found in ranks] == [[4, 75, 0]] * RANKS
    folder = run_folder(world / "two", "stopped")
    assert [m.step for _, m in complete_checkpoints(folder / "checkpoints")] == [3, 4, 6]
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
    assert two == as_json(capsys, "eval", folder, "--split", "test", "--generate", "--samples", "13")
    assert two["samples"] == 13 and "exact_match" in two


def test_a_model_that_diverges_on_one_rank_fails_on_all_and_is_not_saved(world, forge, tmp_path):
    folder, settings = tmp_path / "spoilt", ("train.save_every=1", "train.eval_every=2", "--json")
    arguments = ("worker:spoilt", 1, 3, world / "config.yaml", *settings, "--run-dir", folder)
    ended = forge.start(RANKS, *arguments, **environment(world)).wait()
    assert [rank.code for rank in ended] == [2] * RANKS, "".join(rank.err for rank in ended)
    first = ended[0].err  # what all ranks meet alike it says for them
    assert "is not finite at step 3" in first and "the checkpoint of step 2 is the last finite one" in first
    assert [m.step for _, m in complete_checkpoints(folder / "checkpoints")] == [1, 2]


def recorded(out, world: int, name: str) -> list[list[str]]:
    """The samples of every micro-batch of a run's part on ``world`` ranks, whose shares are put together."""
    shares = [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in range(world)]
    return [[sample for share in parts for sample in share] for parts in zip(*shares, strict=True)]


def test_a_run_goes_through_two_three_and_one_rank_and_sees_every_sample_once_an_epoch(world, forge, tmp_path):
    """Micro-batches of 7 are uneven shares on 2 and on 3 ranks; 84 samples are three epochs and a half of 24."""
    folder, batches = tmp_path / "elastic", []
    for size, stop in ((2, 2), (3, 4), (1, STEPS)):
        arguments = ("worker:train_until", tmp_path, stop, world / "config.yaml", "--run-dir", folder, "--json")
        ended = forge.start(size, *arguments, **environment(world)).wait()
        assert [rank.code for rank in ended] == [0 if stop == STEPS else 75] * size, "".join(rank.err for rank in ended)
        assert json.loads(ended[0].out)["step"] == stop and not any(rank.out for rank in ended[1:])
        batches += recorded(tmp_path, size, f"until-{stop}")
    assert losses(folder) == pytest.approx(losses(run_folder(world, "one")), rel=1e-5)
    assert [len(batch) for batch in batches] == [7] * 2 * STEPS
    seen = [sample for batch in batches for sample in batch]
    epochs = [seen[start : start + SAMPLES] for start in range(0, len(seen), SAMPLES)]
    assert [len(set(epoch)) for epoch in epochs] == [SAMPLES, SAMPLES, SAMPLES, SAMPLES // 2]


def test_ranks_without_samples_and_without_batches_of_an_evaluation_take_part(world, forge, tmp_path):
    """Four ranks: two samples a micro-batch, three batches of val, of which one has three samples."""
    few = ("train.batch=2", "train.eval_every=2", "--json")
    arguments = ("worker:train_until", tmp_path, STEPS, world / "config.yaml", *few, "--run-dir", tmp_path / "four")
    ended = forge.start(4, *arguments, **environment(world)).wait()
    assert [rank.code for rank in ended] == [0] * 4, "".join(rank.err for rank in ended)
    shares = [json.loads((tmp_path / f"until-6-{rank}.json").read_text()) for rank in range(4)]
    assert sorted({len(part) for share in shares for part in share}) == [0, 1]
    assert main(["train", str(world / "config.yaml"), *few, "--run-dir", str(tmp_path / "alone")]) == 0
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    four, alone = (
        [checkpoint.load(path).state["best"] for path, _ in complete_checkpoints(tmp_path / name / "checkpoints")]
        for name in ("four", "alone")
    )
    assert four == alone and len(four) > 1
    scored = forge.start(
        4, "worker:command", "eval", tmp_path / "four", "--split", "test", "--generate", "--json", **environment(world)
    ).wait()
    assert [rank.code for rank in scored] == [0] * 4 and not any(rank.out for rank in scored[1:])
    assert json.loads(scored[0].out)["samples"] == 13


def test_the_launcher_script_trains_on_two_ranks(world):
    command = ["bash", str(ROOT / "launch/local.sh"), "2", "train", str(world / "config.yaml"), "name=launched"]
    done = subprocess.run(
        [*command, "--runs", str(world / "two"), "--json"],
        env={**os.environ, **environment(world), "PYTHONPATH": PATH, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    folder = run_folder(world / "two", "launched")
    assert json.loads(done.stdout)["run"] == str(folder)
    assert losses(folder) == pytest.approx(losses(run_folder(world, "one")), rel=1e-5)


@pytest.mark.parametrize(
    ("task", "data", "row"),
    [
        ("regress", "rated", lambda r: {"text": r["prompt"], "target": len(r["answer"])}),
        ("caption", "captions", lambda r: {"text": [f"a {r['answer']} square", r["answer"]]}),
    ],
)
def test_numbers_and_drawn_captions_are_the_same_on_two_ranks(world, forge, tmp_path, capsys, task, data, row):
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (world / "data" / f"{split}.jsonl").read_text().splitlines()]
        made = [{"image": r["image"], **row(r)} for r in rows]
        (world / "data" / f"{task}-{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    config = yaml.safe_load((world / "config.yaml").read_text())
    config["task"] = {"name": task, **({"temperature": 2.0, "max_new_tokens": 4} if task == "caption" else {})}
    splits = {split: f"{task}-{split}.jsonl" for split in ("train", "val", "test")}
    config["data"] = {"name": data, "root": str(world / "data"), "splits": splits}
    config["train"] |= {"steps": 2, "eval_every": 2, "eval_batch": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    arguments = ("eval", str(tmp_path / "run"), "--split", "test", "--json")
    capsys.readouterr()
    assert main([*arguments]) == 0
    one = json.loads(capsys.readouterr().out)
    two = forge.start(RANKS, "worker:command", *arguments, **environment(world)).wait()
    assert [rank.code for rank in two] == [0] * RANKS, "".join(rank.err for rank in two)
    assert json.loads(two[0].out) == one and one["samples"] > 6
