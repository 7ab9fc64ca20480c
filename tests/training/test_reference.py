"""configs/reference: every setting that there is, at its default, with what it means."""

import re
from collections.abc import Iterator

import pytest
from source_tree import ROOT

from mitrain.core.config import KINDS, Section, section_in
from mitrain.models.encoders import ENCODERS
from mitrain.models.encoders.config import EncoderConfig
from mitrain.training import schema
from mitrain.training.dryrun import dry_run

FILES = sorted((ROOT / "configs" / "reference").glob("*.yaml"))
ILLUSTRATED = {"name", "data.inputs", "data.source", "data.root", "data.classes", "task.readout", "task.matching"}
ILLUSTRATED |= {
    "model.llm",
    "model.llm_shape",
    *(f"encoder.{name}" for name in ("name", "input", "shape", "levels", "width")),
}
"""Models and data that a user has, and what the file's method or task needs."""


def settings(kind: type[Section], before: str) -> Iterator[str]:
    """The dotted names of all values in a section; a list of sections counts as one of them."""
    for name, field in kind.model_fields.items():
        inner = section_in(field.annotation)
        yield from [f"{before}{name}"] if inner in (None, Section) else settings(inner, f"{before}{name}.")


def given(section: Section, before: str) -> Iterator[tuple[str, bool]]:
    """Each name of `settings` that a file sets, and whether to the default."""
    for name in section.model_fields_set:
        value, default = getattr(section, name), type(section).model_fields[name].get_default(call_default_factory=True)
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        inner = [one for one in parts if isinstance(one, Section)]
        yield from [] if inner else [(f"{before}{name}", value == default)]
        for one in inner:
            chosen = f"{name}[{one.section_name}]." if one.section_name else f"{before}{name}."
            chosen = f"encoder[{one.takes}]." if isinstance(one, EncoderConfig) else chosen
            yield from given(one, chosen)


def all_settings() -> set[str]:
    of_kinds = {
        name
        for kind, sections in ours().items()
        for chosen, section in sections.items()
        for name in settings(section, f"{kind}[{chosen}].")
    }
    encoders = {f"encoder[{kind}].{name}" for kind, (section, _) in ENCODERS.items() for name in settings(section, "")}
    run = {name for name in settings(schema.RunConfig, "") if not name.startswith("model.encoders.")}
    return of_kinds | encoders | run - set(KINDS)


def ours() -> dict[str, dict[str, type[Section]]]:
    """KINDS without the methods and tasks of other tests."""
    return {
        kind: {name: section for name, section in sections.items() if section.__module__.startswith("mitrain.")}
        for kind, sections in KINDS.items()
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_reference_is_a_configuration_at_its_defaults(path):
    config = schema.load(path)
    assert config.name == path.stem
    plan = dry_run(config)
    assert plan.trainable_parameters > 0 and plan.config_hash == config.hash


def test_the_references_name_every_setting_at_its_default():
    found = [one for path in FILES for one in given(schema.load(path), "")]
    assert not all_settings() - {name for name, _ in found}, "give these settings a line in configs/reference"
    assert {path.stem for path in FILES} >= set(ours()["adapter"])
    others = {re.sub(r"\[.*]", "", name) for name, is_default in found if not is_default}
    assert others <= ILLUSTRATED, "a reference shows what holds where a setting is left out"
