"""What is refused before torch is imported: the same words as the whole reading has, and nothing that it would take."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mitrain.core import config, glance
from mitrain.core.errors import ConfigError, UserError
from mitrain.training import schema


@pytest.fixture(autouse=True)
def _without_torch(monkeypatch):
    """As in a fresh process: with torch at hand the first look leaves keys to the whole reading."""
    monkeypatch.setattr(glance, "sys", SimpleNamespace(modules={}))


@pytest.mark.parametrize(
    "assignment",
    [
        "train.stps=3",
        "dat.x=3",
        "adapter.name=mitt",
        "adapter.rnk=3",
        "task.name=anwser",
        "task.promt=x",
        "model.encoders.image.nam=x",
        "model.lm=x",
        "train.optimizer.beta=1",
        "zero.stge=3",
        "data.splitz={train: x}",
    ],
)
def test_a_wrong_key_is_told_in_the_words_of_the_whole_reading(assignment):
    with pytest.raises(ConfigError) as early:
        glance.look("quickstart", [assignment])
    with pytest.raises(ConfigError) as late:
        schema.load("quickstart", [assignment])
    texts = [str(error.value).partition(" [")[0] for error in (early, late)]  # other tests may have added to the lists
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "assignment",
    [
        "train.steps=abc",
        "train.steps=0",
        "train.steps=1.5",
        "train.steps=true",
        "train.steps=3000000000",
        "train.lr=-1",
        "train.lr=[1]",
        "train.eval_every=abc",
        "train.optimizer.betas=[1]",
        "train.optimizer.betas=[2, 0.9]",
        "train.optimizer=3",
        "train.schedule.name=cosin",
        "train.rates={a: x}",
        "train.check_largest=yes",
        "telemetry.trackers=[wndb]",
        "telemetry.trackers=wandb",
        "name=a/b",
        "seed=-1",
        "cache=maybe",
        "model.llm=5",
        "model.dtype=fp8",
        "model.encoders.image.size=3",
        "model.encoders.image.levels=[x]",
        "adapter.layers=[1, x]",
        "adapter.layers={a: 1}",
        "adapter.modalities={image: 0}",
        "adapter.base=2",
        "task.metric=a b",
        "data.root=5",
        "data.splits=[a]",
        "data.stream=0",
        "train.batch=1e40",
    ],
)
def test_a_wrong_value_is_told_in_the_words_of_the_whole_reading(assignment):
    with pytest.raises(ConfigError) as early:
        glance.look("quickstart", [assignment])
    with pytest.raises(ConfigError) as late:
        schema.load("quickstart", [assignment])
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize(
    "assignment",
    [
        "train.steps='12'",
        "train.eval_every=epoch",
        "train.eval_every=0.5",
        "train.patience=null",
        "train.rates={adapter: 1}",
        "train.schedule={name: multistep, milestones: [1, 0.5]}",
        "adapter.layers=5",
        "adapter.layers=[5]",
        "adapter.layers=last half",
        "model.llm_shape={hidden_size: 64}",
        "model.encoders.image=clip",
        "telemetry.trackers=[wandb, mlflow]",
    ],
)
def test_a_right_value_passes(assignment):
    glance.look("quickstart", [assignment])
    schema.load("quickstart", [assignment])


def test_a_missing_key_is_told_in_the_words_of_the_whole_reading(tmp_path):
    values = config.read_file("quickstart")
    del values["model"]["llm"]
    (tmp_path / "a.yaml").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigError, match="missing key 'model.llm'") as early:
        glance.look(str(tmp_path / "a.yaml"))
    with pytest.raises(ConfigError) as late:
        schema.load(tmp_path / "a.yaml")
    assert str(early.value) == str(late.value)


def test_every_shipped_configuration_passes():
    for name in config.shipped():
        if not name.startswith("studies/"):
            glance.look(name, ["train.rates={adapter.others: 1e-3}"])


MISTAKES = [
    (["train", "nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
    (["train", "quikstart"], "no configuration file 'quikstart' (did you mean 'quickstart'?)"),
    (["train", "quickstart", "train.stps=3"], "unknown key 'train.stps' (did you mean 'steps'?)"),
    (["train", "quickstart", "train.steps=abc"], "train.steps='abc': give a whole number"),
    (["plan", "quickstart", "train.steps=abc"], "train.steps='abc': give a whole number"),
    (["resume", "model", "train.lr=1"], "'train.lr=1' would change what a resumed run computes"),
    (["resume", "model", "zero.stage=7"], "zero.stage=7: "),
    (["resume", "rns"], "'rns' is no run folder"),
    (["train", "--resume", "model", "train.steps=abc", "--allow-changes"], "train.steps='abc': give a whole number"),
    (["train", "quickstart", "data={name: labelled, root: .}"], "data.splits: there is no file 'train.jsonl' in '.'"),
    (["train", "quickstart", "model.llm=moddel"], "model.llm='moddel' is no prepared model, no folder, and not in"),
    (["train", "quickstart", "data.source=null", "data.root=nowhere"], "data.root='nowhere' is no folder"),
    (["config", "quickstart", "seeed=1"], "unknown key 'seeed' (did you mean 'seed'?)"),
    (["data", "inspect", "quickstart", "seeed=1"], "unknown key 'seeed'"),
    (["train", "--resume", "rns"], "'rns' is no run folder (it has no config.yaml) (did you mean 'runs'?)"),
    (["eval", "runs/x"], "'runs/x' is no run folder"),
    (["predict", "runs", "--image", "a.png"], "'runs' is no run folder"),
    (["predict", "model", "--image", "a.png"], "there is no file 'a.png' (did you mean 'b.png'?)"),
    (["serve", "nowhere"], "'nowhere' is no run folder"),
    (["export", "nowhere", "--out", "x"], "'nowhere' is no run folder"),
    (["report", "model", "nowhere", "--out", "x"], "'nowhere' is no run folder"),
    (["compare", "nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
]


def test_a_mistake_is_told_without_torch(tmp_path):
    for name in ("runs/empty", "model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b.png").touch()
    shutil.copy(config.SHIPPED / "quickstart.yaml", tmp_path / "model" / "config.yaml")
    code = (
        "import sys, json, mitrain.cli as c\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    print(c.main(words), 'torch' in sys.modules)\n"
    )
    words = json.dumps([words for words, _ in MISTAKES])
    done = subprocess.run([sys.executable, "-c", code, words], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["2 False"] * len(MISTAKES)
    for line, (_, said) in zip(done.stderr.splitlines(), MISTAKES, strict=True):
        assert line.startswith(f"mitrain: {said}")
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "model", "b.png"}


def test_a_repository_on_the_hub_is_left_to_be_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    glance.run_folder("user/adapter")
    Path("user").mkdir()
    with pytest.raises(UserError, match="'user/adapter' is no run folder"):
        glance.run_folder("user/adapter")
