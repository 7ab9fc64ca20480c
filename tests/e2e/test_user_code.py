"""A metric and a loss of the user's own: the guide's example as it stands, what is refused, and whose code is run."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import as_json
from folders import colour_world, rewrite, run_settings
from source_tree import ROOT

from mitrain.cli import main
from mitrain.core import user_code
from mitrain.core.errors import ConfigError
from mitrain.tasks.heads import is_count

GUIDE = (ROOT / "docs" / "guide" / "training.md").read_text(encoding="utf-8").partition("## A metric or a loss of")[2]
NUMBERS = {"red": -3.0, "green": -1.0, "blue": 1.0, "yellow": 3.0}
MORE = """
def without_minimises(samples, predictions):
    return predictions[0].vector

def mean_square(outputs, targets):
    return ((outputs - targets) ** 2).sum(), len(targets)

def mae(samples, predictions): return 0.5
def words(samples, predictions): return "good"
def fails(samples, predictions): return 1 / 0
def mean(outputs, targets): return (outputs - targets).abs().mean()
def detached(outputs, targets): return (outputs - targets).abs().sum().detach(), 3
def of_nothing(outputs, targets): return (outputs - targets).abs().sum(), 0
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with colour_world(tmp_path_factory.mktemp("own"), train=16, val=8, width=48) as path:
        rewrite(path / "data", lambda row: {"image": row["image"], "text": "this", "target": NUMBERS[row["answer"]]})
        (path / "scores.py").write_text(re.search(r"```python\n(.*?)```", GUIDE, re.S)[1] + MORE)
        yield path


@pytest.fixture(autouse=True)
def nothing_trusted(monkeypatch):
    """Each test begins as a process does; the module of the world is imported anew."""
    monkeypatch.setenv(user_code.TRUSTED, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "scores", raising=False)
    yield
    sys.modules.pop("scores", None)


def train(world, task, steps=4):
    config = run_settings(
        world,
        vision={"layer": 2},
        name="own",
        adapter={"name": "mit", "layers": [1, 2]},
        task={"name": "regress", **task},
        data={"name": "rated", "root": str(world / "data")},
        train={"steps": steps, "batch": 8, "lr": 1e-2, "eval_every": 2, "save_every": 2},
    )
    (world / "own.yaml").write_text(yaml.safe_dump(config))
    return main(["train", str(world / "own.yaml"), "--runs", str(world / "runs"), "--json"])


def val_of(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "val"]


def logged_losses(run):
    return [json.loads(x)["loss"] for x in (Path(run) / "metrics.jsonl").read_text().splitlines() if '"loss"' in x]


def test_the_example_of_the_guide(world, capsys, caplog, monkeypatch):
    task = yaml.safe_load(re.search(r"```yaml\n(.*?)```", GUIDE, re.S)[1])["task"]
    assert train(world, task) == 0
    made = json.loads(capsys.readouterr().out)
    found = val_of(made["run"])
    assert made["best"] == max(line["within_half"] for line in found) and "mae" in found[0]
    assert json.loads((Path(made["run"]) / "summary.json").read_text())["metric"] == "within_half"
    # The run is now opened as if it were someone else's: predictions need no code, a score does.
    monkeypatch.setenv(user_code.TRUSTED, "")
    del sys.modules["scores"]
    picture = str(world / "data" / "images" / "17.png")
    assert main(["predict", made["run"], "--image", picture, "--text", "this"]) == 0
    for command in (["eval", made["run"]], ["resume", made["run"]]):
        capsys.readouterr()
        assert main(command) == 2 and "scores" not in sys.modules
        said = capsys.readouterr().err.strip().splitlines()
        assert len([line for line in said if line.startswith("mitrain: task.metric=scores:within_half is code")]) == 1
        assert "--trust-code FOLDER" in said[-1]
    exported = world / "export"
    assert main(["export", made["run"], "--out", str(exported)]) == 0 and "scores" not in sys.modules
    assert main(["eval", str(exported)]) == 2 and "scores" not in sys.modules
    out = world / "predictions.jsonl"
    told = as_json(capsys, "eval", exported, "--trust-code", world, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert told["within_half"] == sum(abs(r["predicted"] - r["target"]) <= 0.5 for r in rows) / 8
    (world / "scores.py").write_text((world / "scores.py").read_text() + "# another version\n")
    changed = ["train.steps=6", "--allow-changes", "--trust-code", str(world)]
    assert main(["resume", made["run"], *changed]) == 0
    assert "code.task.metric differs" in caplog.text


def test_a_loss_of_ones_own_trains_as_the_same_loss_of_mitrain_and_a_metric_may_only_be_told(world, capsys):
    runs = []
    for task in ({"loss": "mse"}, {"loss": "scores:mean_square", "metric": "scores:without_minimises"}):
        assert train(world, task) == 0
        runs.append(json.loads(capsys.readouterr().out))
    one, own = (runs[i]["run"] for i in (0, 1))
    assert logged_losses(one) == logged_losses(own) != []
    assert runs[0]["best"] == runs[1]["best"] == min(line["mae"] for line in val_of(own))
    assert all("without_minimises" in line for line in val_of(own))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"metric": "scores"}, "task.metric='scores': give the import path of a function, as package.module:function"),
        ({"loss": "l3"}, "Input should be 'l1', 'mse' or 'huber', or give the import path of a function"),
        ({"metric": "nowhere:f"}, "the module 'nowhere' cannot be imported (ModuleNotFoundError"),
        ({"metric": "scores:within_haf"}, "scores.py has no function 'within_haf' (did you mean 'within_half'?)"),
        ({"metric": "scores:words"}, "returned 'good': let it return one finite number"),
        ({"metric": "scores:mae"}, "'mae' is a score of the task itself: give the function another name"),
        ({"metric": "scores:fails"}, "failed (ZeroDivisionError: division by zero, "),
        ({"loss": "scores:within_half"}, "task.loss=scores:within_half failed ("),
        ({"loss": "scores:mean"}, "let it return a sum over the batch"),
        ({"loss": "scores:detached"}, "let it return a sum over the batch"),
        ({"loss": "scores:of_nothing"}, "above 0"),
    ],
    ids=lambda value: ",".join(value.values()) if isinstance(value, dict) else "",
)
def test_a_line_says_what_is_wrong(world, capsys, task, said):
    assert train(world, task, steps=2) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mitrain: ")]
    assert said in lines[-1] and "task." in lines[-1]


def test_what_a_metric_may_return(monkeypatch, tmp_path):
    (tmp_path / "scores.py").write_text("def f(samples, predictions):\n    return samples\nf.minimises = 'yes'\n")
    user_code.trust(tmp_path)
    for value in (1, 0.5, torch.tensor(0.5), torch.tensor(0.5).numpy()):
        assert user_code.score("scores:f", value, [], {})["f"] == float(value)
    for value in (None, float("nan"), torch.ones(2), [1.0], 10**400):
        with pytest.raises(ConfigError, match="one finite number"):
            user_code.score("scores:f", value, [], {})
    with pytest.raises(ConfigError, match="set it to True or False"):
        user_code.minimises("scores:f")


def test_what_a_loss_may_count():
    assert all(map(is_count, (3, 0.5, torch.tensor(2.0), torch.tensor(2.0, device="meta"))))
    assert not any(map(is_count, (None, 0, -1, float("inf"), torch.zeros(()), torch.ones(2))))
