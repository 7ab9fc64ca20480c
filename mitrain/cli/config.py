"""``mitrain config``: the shipped configurations, one of them resolved, and every setting that there is."""

import argparse
from dataclasses import asdict
from typing import Any

from mitrain.cli.shared import describe, say
from mitrain.core.errors import ConfigError

EXAMPLES = """  mitrain config                              the shipped configurations
  mitrain config quickstart train.steps=50    a configuration with every default written out
  mitrain config --keys                       every setting there is
  mitrain config --keys adapter.rank          those that begin so
  mitrain config --keys mope                  those of a method, a task or a kind of data
  mitrain config --schema > schema.json       a JSON schema, for editors
"""


def add_config(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_config, EXAMPLES)
    sub.add_argument("config", nargs="?", help="a YAML file or a shipped configuration's name")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=100")
    sub.add_argument("--keys", nargs="?", const="", metavar="PART", help="show every setting, or those that begin with PART")
    sub.add_argument("--markdown", action="store_true", help="with --keys: as tables")
    sub.add_argument("--schema", action="store_true", help="print the JSON schema of a configuration")


def run_config(arguments: argparse.Namespace) -> Any:
    asked = (arguments.keys is not None) + arguments.schema + bool(arguments.config)
    if asked > 1:
        raise ConfigError("give one of CONFIG, --keys and --schema")
    if not asked:
        return show_shipped(arguments)
    from mitrain.core.parsing import dump_yaml
    from mitrain.training import schema, settings

    if arguments.config:
        values = schema.load(arguments.config, arguments.overrides).to_dict()
        say(arguments, dump_yaml(values).rstrip())
        return values
    if arguments.schema:
        found = settings.json_schema()
        if not arguments.json:
            say(arguments, settings.schema_text(found).rstrip())
        return found
    shown = settings.find(arguments.keys) if arguments.keys else list(settings.settings())
    say(arguments, settings.as_markdown(shown) if arguments.markdown else settings.as_text(shown))
    return [asdict(setting) for setting in shown]


def show_shipped(arguments: argparse.Namespace) -> Any:
    from mitrain.core import config

    about = {name: config.summary(path) for name, path in config.shipped().items()}
    for name, line in about.items():
        if "/" not in name:
            say(arguments, f"{name:26s} {line}")
    for folder, use in (("reference", "every setting, explained"), ("studies", "for mitrain compare")):
        say(arguments, f"\n{use}: " + ", ".join(name for name in about if name.startswith(folder)))
    return about
