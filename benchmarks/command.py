"""The benchmarks behind ``mitrain bench NAME``.

parity   losses and bytes of every ZeRO stage and precision beside the unsharded run
load     what loading in shards takes
faults   what comes of kills, damage and hostile inputs
ledger   the verdicts of measured rows on the papers' claims
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from mitrain.cli.shared import command, refused, say


def add_benchmarks(verbs: Any) -> None:
    """The benchmarks as commands below ``verbs``."""
    add_parity(verbs)
    add_faults(verbs)
    add_load(verbs)
    add_ledger(verbs)


def add_ledger(verbs: Any) -> None:
    sub = command(verbs, "ledger", run_ledger, "what the rows of mitrain compare say of the papers' claims")
    sub.add_argument("--measure", action="store_true", help="first measure the cells that the claims lack")
    sub.add_argument("--quick", action="store_true", help="of these the counted ones alone, which take seconds each")
    sub.add_argument(
        "--results", metavar="DIR", help="of the studies, NAME/results.json (default: docs/results/compare)"
    )
    sub.add_argument("--out", metavar="DIR", help="for ledger.json and ledger.md (default: print only)")


def add_load(verbs: Any) -> None:
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
    from benchmarks.faults import cases, suite

    chosen = suite.chosen(cases.CASES, arguments.quick, arguments.only)
    out = Path(arguments.out or ("runs/faults-quick" if arguments.quick else "runs/faults"))
    words = ["mitrain bench faults", *(["--quick"] if arguments.quick else [])]
    words += ["--only", *arguments.only] if arguments.only else []
    words += ["--out", arguments.out] if arguments.out else []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no command is left behind
    found = suite.faults(chosen, out, " ".join(words), say=lambda text: print(text, file=sys.stderr, flush=True))
    say(arguments, (out / "table.md").read_text(encoding="utf-8"))
    return refused(suite.check, found)


def run_ledger(arguments: argparse.Namespace) -> Any:
    from benchmarks.claims import CLAIMS, ledger
    from mitrain.core.files import write_atomic, write_json

    results = Path(arguments.results) if arguments.results else ledger.RESULTS
    if arguments.measure:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no cell is left behind
        wanted = ledger.jobs(CLAIMS, results, ledger.STUDIES)
        wanted = [job for job in wanted if job.study.kind == "count" or not arguments.quick]
        ledger.measure(wanted, say=lambda text: print(text, file=sys.stderr, flush=True))
    found = ledger.ledger(results=results)
    text = ledger.table(found)
    if arguments.out:
        write_json(Path(arguments.out) / "ledger.json", found)
        write_atomic(Path(arguments.out) / "ledger.md", text)
    say(arguments, text)
    return found


def run_load(arguments: argparse.Namespace) -> Any:
    from benchmarks import load
    from mitrain.core.errors import ConfigError

    if arguments.ranks < 1:
        raise ConfigError(f"--ranks {arguments.ranks} loads nothing: give at least 1")
    found = load.load(arguments.ranks)
    say(arguments, load.table(found))
    if arguments.out:
        load.write(found, Path(arguments.out), f"mitrain bench load --ranks {arguments.ranks} --out {arguments.out}")
    return refused(load.check, found)


def run_parity(arguments: argparse.Namespace) -> Any:
    from benchmarks import cells, parity
    from mitrain.core.errors import ConfigError

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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no rank is left behind
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
