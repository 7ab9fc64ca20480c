"""Speech beside a text, where some samples have none, trains on two ranks as in one process."""

from folders import own_cache
import csv

import pytest
import yaml
from clips import sound_file, tone
from folders import llm_folder, whisper_folder
from methods_world import section
from ranks import losses_of, run_folder

from mitrain.cli import main

CASES = [("mit", 0), ("pmf", 0)]
"""Method and ZeRO's stage; one infuses what Whisper hears, the other changes Whisper's layers."""
STEPS = 4


def written(path, method: str, stage: int):
    config = {
        "name": f"{method}-{stage}",
        "model": {"llm": str(path / "llm"), "encoders": {"speech": str(path / "whisper")}},
        "adapter": {**section(method), **({"layers": [1]} if method == "mit" else {})},
        "task": {"name": "classify", "readout": ["last", "speech"]},
        "data": {
            "name": "labelled",
            "root": str(path / "data"),
            "may_lack": ["speech"],
            "splits": {split: f"{split}.csv" for split in ("train", "val", "test")},
        },
        "train": {"steps": STEPS, "batch": 6, "lr": 1e-2, "eval_every": 2, "save_every": 2, "modality_dropout": 0.2},
        "zero": {"stage": stage},
    }
    (path / f"{method}-{stage}.yaml").write_text(yaml.safe_dump(config))
    return str(path / f"{method}-{stage}.yaml")


@pytest.fixture(scope="module")
def world(tmp_path_factory, forge):
    path = tmp_path_factory.mktemp("speech")
    llm_folder(path / "llm", width=32, layers=2)
    whisper_folder(path / "whisper")
    for split, count in (("train", 13), ("val", 5), ("test", 5)):
        (path / "data").mkdir(exist_ok=True)
        with open(path / "data" / f"{split}.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["speech", "text", "label"])
            for number in range(count):
                clip = tone(0.2 + 0.1 * (number % 3), hertz=400 * (1 + number % 2))
                name = sound_file(path / "data" / f"{split}{number}.wav", clip)
                table.writerow(["" if number % 4 == 3 else name, "this thing is", ("low", "high")[number % 2]])
    files = [written(path, *case) for case in CASES]
    with own_cache(path):
        for file in files:
            assert main(["train", file, "--runs", str(path / "one"), "--json"]) == 0
    environment = {"MITRAIN_CACHE": str(path / "cache"), "MITRAIN_TIMEOUT": "120"}
    ended = forge.start(2, "methods_worker:run", path, *files, **environment).wait()
    said = "".join(rank.err for rank in ended)
    assert [rank.code for rank in ended] == [0, 0], said
    assert "damaged" not in said
    return path


@pytest.mark.parametrize(("method", "stage"), CASES)
def test_two_ranks_train_on_speech_as_one_process(world, method, stage):
    one, two = (
        losses_of(run_folder(world / "one", f"{method}-0")),
        losses_of(run_folder(world / "two", f"{method}-{stage}")),
    )
    assert len(one) == STEPS and one[0] != one[-1]
    assert two == pytest.approx(one, rel=1e-4)
