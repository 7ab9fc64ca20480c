"""``mitrain eval`` and ``mitrain predict``: what a trained run is asked."""

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mitrain.cli.shared import (
    add_checkpoint,
    add_generation,
    add_trust,
    describe,
    generation_of,
    on_ranks,
    say,
)
from mitrain.core import glance
from mitrain.core.errors import ConfigError
from mitrain.core.files import writing

if TYPE_CHECKING:
    from mitrain.training.runs import Opening

EVALUATING = """  mitrain eval runs/quickstart-TIME --split test
  mitrain eval runs/quickstart-TIME --split test --control shuffle    with another picture: it has to be worse
  mitrain eval my-adapter --split test --out predictions.jsonl        each sample's prediction, a JSON line each
"""
ASKING = """  mitrain predict runs/birds-TIME --image photo.jpg --text "which bird is this?"
  mitrain predict runs/speech-TIME --input speech=clip.wav --text "what is said?" --candidates "yes,no"
  mitrain predict runs/birds-TIME --data asks.csv --out answers.jsonl     every row of a table
"""


def add_eval(sub: argparse.ArgumentParser) -> None:
    describe(sub, on_ranks(run_eval), EVALUATING)
    add_run(sub)
    sub.add_argument("--split", default="val", help="a split of the run's data (default: val)")
    sub.add_argument(
        "--control",
        default="none",
        choices=["none", "shuffle", "other-inputs", "other-text", "frozen"],
        help="a negative control: shuffle = any other sample's files (segment: another scene's expression), other-inputs ="
        " files of another object, other-text = another sample's text (classify, regress), frozen = without the adapter"
        " (default: none)",
    )
    for option, help in (
        ("--without", "score every sample without this input, e.g. speech"),
        ("--shuffle", "give every sample another sample's file of this input"),
        ("--missing", "also score with this input removed from 0, 25, 50, 75 and 100 %% of the samples"),
    ):
        sub.add_argument(option, action="append", default=[], metavar="INPUT", help=help)
    add_opening(sub)
    add_trust(sub)
    sub.add_argument("--data", metavar="DIR", help="the data's folder, if it is no longer the run's data.root")
    sub.add_argument("--out", metavar="FILE", help="also write a JSON line with each sample's prediction to this new file")
    sub.add_argument("--samples", type=int, metavar="N", help="score N samples spread evenly over the split")
    sub.add_argument(
        "--generate",
        action="store_true",
        help="also generate the answers and count exact matches (task answer; caption always does)",
    )
    sub.add_argument("--seed", type=int, default=0, help="random seed of the control's pairing")
    sub.add_argument(
        "--baselines",
        action="store_true",
        help="also score what needs no adapter: majority class, linear probes, nearest neighbours (classify), masks that"
        " ignore the text (segment)",
    )


def run_eval(arguments: argparse.Namespace) -> Any:
    with writing(arguments.out if not arguments.rank else None):
        from mitrain.inference.scoring import score_run
        from mitrain.training.listing import aligned

        metrics = score_run(
            arguments.run_dir,
            split=arguments.split,
            control=arguments.control,
            without=arguments.without,
            shuffled=arguments.shuffle,
            missing=arguments.missing,
            samples=arguments.samples,
            generate=arguments.generate,
            seed=arguments.seed,
            baselines=arguments.baselines,
            root=arguments.data,
            out=arguments.out,
            generation=generation_of(arguments),
            details=True,
            **opening_of(arguments),
        )

    classes = metrics.get("per_class", {})
    for line in metric_lines({k: v for k, v in metrics.items() if k not in ("per_class", "confusion")}):
        say(arguments, line)
    if 0 < len(classes) <= MOST_SHOWN:
        say(arguments, aligned([("class", *HEAD), *((name, *map(number, c.values())) for name, c in classes.items())]))
    return metrics


HEAD = ("precision", "recall", "F1", "samples")
MOST_SHOWN = 40  # classes in the terminal; --json and the report have all


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def metric_lines(metrics: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A name and a number a line; what holds several numbers is a heading with indented lines."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}"
            yield from metric_lines(value, indent + "  ")
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else "decided or undefined" if value is None else value
            yield f"{indent + name:24s} {shown}"


def add_predict(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_predict, ASKING)
    add_run(sub)
    sub.add_argument("--image", metavar="FILE", help="a picture, of any size: short for --input image=FILE")
    sub.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="the file of one of the run's inputs, e.g. speech=clip.wav",
    )
    sub.add_argument("--text", default="", help="the prompt, or the expression to segment")
    sub.add_argument(
        "--candidates", metavar="A,B,…", help="answers to choose among (task answer; default: the training answers)"
    )
    sub.add_argument(
        "--data",
        metavar="FILE",
        help="answer about every row of a table with the same columns as the run's data, or every conversation",
    )
    sub.add_argument(
        "--out",
        metavar="PATH",
        help="with --data: the file for the answers, a JSON line each; called again, it continues where it stopped. Without:"
        " the folder for image, overlay, expression and mask (segment)",
    )
    add_opening(sub)


def add_run(sub: argparse.ArgumentParser) -> None:
    text = "a run folder, as runs/NAME-TIME, an export, or USER/NAME on the Hub"
    sub.add_argument("run_dir", metavar="RUN_DIR", help=text)


def add_opening(sub: argparse.ArgumentParser) -> None:
    """How the run is opened, and how its model speaks."""
    add_generation(sub)
    add_checkpoint(sub)
    sub.add_argument(
        "--allow-changes", action="store_true", help="go on though frozen models have other weights than in training"
    )
    sub.add_argument("--base", metavar="DIR", help="the language model's folder, if it is not where it was in training")
    sub.add_argument(
        "--encoder",
        action="append",
        metavar="DIR",
        help="an encoder's folder, likewise; for several encoders once each, in their order",
    )


def opening_of(arguments: argparse.Namespace) -> "Opening":
    """What these options say of how a run is opened."""
    return {
        "which": arguments.checkpoint,
        "allow_changes": arguments.allow_changes,
        "base": arguments.base,
        "encoders": arguments.encoder,
    }


def choices_of(arguments: argparse.Namespace) -> list[str] | None:
    """The answers to choose among, where some are given."""
    return [c.strip() for c in arguments.candidates.split(",") if c.strip()] if arguments.candidates else None


def files_of(arguments: argparse.Namespace, none: bool = False) -> dict[str, str]:
    """The files that are asked about, by the run's names for its inputs; ConfigError for none of them, unless ``none``."""
    files = {"image": arguments.image} if arguments.image else {}
    for given in arguments.input:
        name, equals, file = given.partition("=")
        if not (name and equals and file) or name in files:
            raise ConfigError(f"--input {given}: write NAME=FILE, each name once")
        files[name] = file
    if not files and not none and not arguments.text:
        raise ConfigError("give a text with --text, a picture with --image FILE, or other files with --input NAME=FILE")
    glance.files(files.values())
    return files


def run_bulk(arguments: argparse.Namespace) -> Any:
    for option, value in (("--image", arguments.image), ("--input", arguments.input), ("--text", arguments.text)):
        if value:
            raise ConfigError(f"{option} asks about one sample, --data about a table's: give one of them")
    if arguments.candidates or not arguments.out:
        raise ConfigError("with --data, candidates are a column, and --out names the file of the answers")
    from mitrain.inference.bulk import predict_file

    found = predict_file(arguments.run_dir, arguments.data, arguments.out, generation_of(arguments), **opening_of(arguments))
    for line in metric_lines(found):
        say(arguments, line)
    return found


def run_predict(arguments: argparse.Namespace) -> Any:
    if arguments.data:
        return run_bulk(arguments)
    files = files_of(arguments)
    from mitrain.inference.scoring import ask
    from mitrain.training import runs

    run, said = runs.open_run(arguments.run_dir, **opening_of(arguments)), generation_of(arguments)
    result = ask(run, files, arguments.text, candidates=choices_of(arguments), out=arguments.out, generation=said)
    for line in result.lines:
        say(arguments, line)
    return result.values
