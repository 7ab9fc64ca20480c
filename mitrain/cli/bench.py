"""``mitrain bench parity``: losses and bytes of every ZeRO stage and precision beside the unsharded run;
``mitrain bench load``: what loading in shards takes; ``mitrain bench faults``: what comes of faults."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mitrain.cli.shared import command, refused, say


def add_bench(commands: Any) -> None:
    text = "measure sharded training, loading and what comes of faults"
    group = commands.add_parser("bench", help=text, description=text[0].upper() + text[1:] + ".")
    verbs = group.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_parity(verbs)
    add_faults(verbs)
    sub = command(verbs, "load", run_load, "peak bytes of loading a random model of 2 GB in shards, beside their limit")
    sub.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (default: 2)")
    sub.add_argument("--out", metavar="DIR", help="for results.json and table.md (default: print only)")


def add_parity(verbs: Any) -> None:
    sub = command(verbs, "parity", run_parity, "ZeRO stages × precisions × ranks: losses, bytes, step times")
    sub.add_argument("--quick", action="store_true", help="ZeRO 0 and 3, fp32 and int8, 5 updates, no peers")
    sub.add_argument("--config", default="configs/quickstart.yaml", help="what is trained (default: %(default)s)")
    sub.add_argument(
        "--out",
        metavar="DIR",
        help="for results.json and table.md (default: runs/parity); the same DIR goes on after an interruption",
    )
    sub.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="cells whose names begin so, as ours-int8 peft"
    )
    sub.add_argument("--steps", type=int, metavar="N", help="updates before the loss is taken (default: 20, quick 5)")
    sub.add_argument("--batch", type=int, default=4, metavar="N", help="samples a step, an even number (default: 4)")
    sub.add_argument(
        "--limit", type=float, default=3600, metavar="S", help="seconds that a cell may take (default: 3600)"
    )


def add_faults(verbs: Any) -> None:
    sub = command(verbs, "faults", run_faults, "kills, damage, hostile inputs: what comes of each, on tiny models")
    sub.add_argument("--quick", action="store_true", help="a dozen of them")
    sub.add_argument("--only", nargs="+", default=[], metavar="NAME", help="faults whose names begin so, as cache rank")
    sub.add_argument(
        "--out",
        metavar="DIR",
        help="for results.json and table.md (default: runs/faults); the same DIR goes on after an interruption",
    )


def run_faults(arguments: argparse.Namespace) -> Any:
    from mitrain.bench.faults import cases, suite

    chosen = suite.chosen(cases.CASES, arguments.quick, arguments.only)
    out = Path(arguments.out or ("runs/faults-quick" if arguments.quick else "runs/faults"))
    words = ["mitrain bench faults", *(["--quick"] if arguments.quick else [])]
    words += ["--only", *arguments.only] if arguments.only else []
    words += ["--out", arguments.out] if arguments.out else []
    found = suite.faults(chosen, out, " ".join(words), say=lambda text: print(text, file=sys.stderr, flush=True))
    say(arguments, (out / "table.md").read_text(encoding="utf-8"))
    return refused(suite.check, found)


def run_load(arguments: argparse.Namespace) -> Any:
    from mitrain.bench import load
    from mitrain.errors import ConfigError

    if arguments.ranks < 1:
        raise ConfigError(f"--ranks {arguments.ranks} loads nothing: give at least 1")
    found = load.load(arguments.ranks)
    say(arguments, load.table(found))
    if arguments.out:
        load.write(found, Path(arguments.out), f"mitrain bench load --ranks {arguments.ranks} --out {arguments.out}")
    return refused(load.check, found)


def run_parity(arguments: argparse.Namespace) -> Any:
    from mitrain.bench import cells, parity
    from mitrain.errors import ConfigError

    steps = arguments.steps or (5 if arguments.quick else 20)
    if steps < 1 or arguments.batch < 2 or arguments.batch % 2:
        raise ConfigError(
            f"--steps={steps} --batch={arguments.batch}: give a step or more, of an even number of samples"
        )
    wanted = cells.quick() if arguments.quick else cells.full(arguments.batch, arguments.only)
    if not wanted:
        raise ConfigError(f"--only {' '.join(arguments.only)} names no cell: names begin as ours-int8-zero3-ranks2")
    plan = cells.Plan(arguments.config, steps, arguments.batch)
    out = Path(arguments.out or ("runs/parity-quick" if arguments.quick else "runs/parity"))
    parity.prepare(plan)
    found = parity.parity(
        plan,
        wanted,
        out,
        shown(arguments),
        say=lambda text: print(text, file=sys.stderr, flush=True),
        limit_s=arguments.limit,
    )
    say(arguments, (out / "table.md").read_text(encoding="utf-8"))
    return refused(parity.check, found)


def shown(arguments: argparse.Namespace) -> str:
    """The command that makes these results again."""
    options = {
        "--config": ("config", "configs/quickstart.yaml"),
        "--steps": ("steps", None),
        "--batch": ("batch", 4),
        "--out": ("out", None),
    }
    given = [
        f"{name} {getattr(arguments, key)}"
        for name, (key, usual) in options.items()
        if getattr(arguments, key) != usual
    ]
    only = ["--only", *arguments.only] if arguments.only else []
    return " ".join(["mitrain bench parity", *(["--quick"] if arguments.quick else []), *only, *given])
