"""The command line. Exit code 0: all right; 1: a provider failed the correctness gate; 2: a mistake in the call."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import report, results, rounds
from bench.cases import DIMENSIONS, OPS, Case, cases_for, parse_shape
from bench.results import RESULTS

USUAL, QUICK = (5, 12), (3, 5)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    out = Path(options.out) if options.out else RESULTS
    if options.report:
        return report.write_reports(out)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    plan = rounds.Plan(chosen_cases(parser, options, device), options.providers, device, options.quick)
    usual = QUICK if options.quick else USUAL
    found = rounds.measure(plan, options.rounds or usual[0], options.samples or usual[1])
    made = results.rows(found, device)
    red = found.red
    for one in red:
        rounds.say(f"RED {one['provider']} on {one['case']}: {'; '.join(one['faults'])}: no time is reported")
    whole = not (options.quick or options.shape or options.providers or options.rounds or options.samples)
    if made and not red and (options.out or whole):
        for path in results.write_results(made, device, out):
            rounds.say(f"wrote {path}")
    show(made, red, found.left_out, options.json)
    return 1 if red else 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python kernels/bench",
        description="Time and weigh the operators against the plain ones, if they are right.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--op", choices=OPS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="two shapes an op, three rounds, about a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where CSV files go (default: kernels/bench/results for whole measurements, nowhere for partial ones)",
    )
    parser.add_argument("--report", action="store_true", help="measure nothing: make tables and figures of the CSV files")
    parser.add_argument("--providers", metavar="NAMES", help="comma-separated; file.py:function is one of your own")
    parser.add_argument("--shape", metavar="B=1,H=4,…", help="this shape instead of the listed ones; needs --op")
    parser.add_argument("--rounds", type=positive, help=f"fresh processes per provider ({USUAL[0]}; quick: {QUICK[0]})")
    parser.add_argument("--samples", type=positive, help=f"per round and mode ({USUAL[1]}; quick: {QUICK[1]})")
    return parser


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def chosen_cases(parser: argparse.ArgumentParser, options: argparse.Namespace, device: str) -> list[Case]:
    if options.shape is None:
        return [case for op in ([options.op] if options.op else OPS) for case in cases_for(op, device, options.quick)]
    names = DIMENSIONS.get(options.op)
    if names is None:
        parser.error("--shape needs --op")
    try:
        shape = parse_shape(options.shape)
    except ValueError:
        shape = {}
    if set(shape) != set(names):
        parser.error(f"--shape {options.shape!r}: give {','.join(f'{name}=…' for name in names)}")
    usual = cases_for(options.op, device, quick=True)[0]
    return [replace(usual, shape={name: shape[name] for name in names})]


def show(made: list[dict[str, Any]], red: list[dict[str, Any]], left_out: list[dict[str, str]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"rows": made, "red": red, "left_out": left_out}, indent=2))
        return
    if made:
        print(report.table(made))
    for one in left_out:
        print(f"left out: {one['provider']} on {one['case']} ({one['op']}): {one['why']}")
