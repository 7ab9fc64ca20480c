"""The whole configuration: shipped files, consistency, the hash; and what a dry run counts from them."""

import pytest
from source_tree import ROOT

from mitrain.core.errors import ConfigError
from mitrain.training import schema
from mitrain.training.dryrun import dry_run

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LLAMA = [path for path in CONFIGS if "llama" in path.name]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path):
    config = schema.load(path)
    assert config.name == path.stem
    again = schema.from_dict(config.to_dict())
    assert again.hash == config.hash and again == config


@pytest.mark.parametrize("path", LLAMA, ids=lambda p: p.stem)
def test_the_papers_setting_is_counted_without_weights(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = dry_run(schema.load(path), 2)
    assert plan.infusion_parameters_per_layer == 21_064_480
    assert plan.head_parameters == 1_620_642
    assert plan.infused_layers == [13, 17, 21, 25, 29]
    assert plan.frozen_parameters == 6_738_415_616 + 304_293_888
    assert plan.trainable_parameters == 5 * 21_064_480 + 1_620_642
    assert plan.bytes_per_rank["3"] < plan.bytes_per_rank["2"] == plan.bytes_per_rank["1"] < plan.bytes_per_rank["0"]


def values(**changes):
    base = schema.load(ROOT / "configs" / "quickstart.yaml").to_dict()
    return {**base, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": {"name": "segment"}}, "serves the task 'answer'"),
        ({"task": {"name": "anser"}}, "did you mean 'answer'"),
        ({"adapter": {"name": "mit", "rnak": 3}}, "did you mean 'rank'"),
        ({"data": {"name": "records"}}, "either data.source"),
        ({"name": "../up"}, "name="),
        ({"adapter": "mit"}, "must be a mapping with a 'name' key"),
        ({"train": {"steps": 0}}, "train.steps=0"),
    ],
)
def test_contradictions_are_one_line(changes, words):
    with pytest.raises(ConfigError) as error:
        schema.from_dict(values(**changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_weights_are_asked_for_before_training():
    from mitrain.training.build import build

    with pytest.raises(ConfigError, match="without weights"):
        build(schema.load(LLAMA[0]))


def test_retrieval_loses_none_of_what_is_searched_for():
    with pytest.raises(ConfigError, match=r"what retrieve searches for would be lost"):
        schema.load("retrieve-tuxpaint", ["train.modality_dropout=0.1"])
