"""A run on streamed samples, pictures in Parquet's cells: interrupted in the middle of a block and on two ranks."""

from folders import own_cache
import json
import shutil

import pyarrow
import pytest
import yaml
from pyarrow import parquet
from ranks import losses, make_world

from mitrain.cli import main

RANKS = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """As `make_world`, its 24 training records in three files; one of the pictures is torn."""
    path = make_world(tmp_path_factory.mktemp("streams"))
    rows = [json.loads(line) for line in (path / "data" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = {"bytes": (path / "data" / row["image"]).read_bytes(), "path": row["image"]}
    rows[5]["image"]["bytes"] = rows[5]["image"]["bytes"][:40]
    for number in range(3):
        part = pyarrow.Table.from_pylist(rows[8 * number : 8 * number + 8])
        parquet.write_table(part, path / "data" / f"part-{number}.parquet", row_group_size=3)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["data"] |= {"stream": 5, "bad_share": 0.3, "splits": {"train": "part-*.parquet", "val": "val.jsonl"}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    with own_cache(path):
        assert main(["train", str(path / "config.yaml"), "--run-dir", str(path / "one")]) == 0
        yield path


def halved(folder, name):
    """A copy of a finished run as it was when its step 3 had been saved."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    (copy / "summary.json").unlink()
    return copy


def test_a_stream_is_resumed_bit_for_bit(world, capsys):
    folder = halved(world / "one", "one-resumed")
    state = json.loads(next((folder / "checkpoints").glob("step-*3/state.json")).read_text())["loader"]
    assert state["position"] and (state["file"] or state["record"])  # in the middle of a block that is not the first
    assert main(["train", "--resume", str(folder)]) == 0
    assert losses(folder) == losses(world / "one")


def test_two_ranks_train_on_the_samples_of_one_and_are_resumed_bit_for_bit(world, forge):
    """Features are encoded in other groups of pictures, which moves them by rounding; float32 then gives 1e-5."""
    env = {"MITRAIN_CACHE": str(world / "cache")}
    for arguments in (("train", world / "config.yaml", "--run-dir", world / "two"), ("train", "--resume", world / "again")):
        if "--resume" in arguments:
            halved(world / "two", "again")
        ended = forge.start(RANKS, "worker:command", *arguments, **env).wait()
        assert [rank.code for rank in ended] == [0] * RANKS, "".join(rank.err for rank in ended)
    assert losses(world / "two") == pytest.approx(losses(world / "one"), rel=1e-5)
    assert losses(world / "again") == losses(world / "two")
    assert "skipped" in ended[0].err and "part-0.parquet#000000005/image" in ended[0].err


def test_a_changed_file_is_named_before_a_step(world, capsys):
    folder = halved(world / "one", "one-changed")
    path = world / "data" / "part-1.parquet"
    kept, table = path.read_bytes(), parquet.read_table(path)
    parquet.write_table(table.slice(1), path)
    try:
        assert main(["train", "--resume", str(folder)]) == 2
    finally:
        path.write_bytes(kept)
    said = capsys.readouterr().err
    assert "data.train.files differs" in said and "--allow-changes" in said


def test_what_counts_in_epochs_is_refused(world, capsys):
    for change in ("train.epochs=2", "train.fraction=0.5", "train.eval_every=epoch"):
        assert main(["train", str(world / "config.yaml"), change, "--run-dir", str(world / "none")]) == 2
        assert "how many samples a stream has is not known" in capsys.readouterr().err
    assert not (world / "none").exists()
