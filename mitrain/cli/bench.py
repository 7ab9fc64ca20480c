"""``mitrain bench parity``: losses and bytes of every ZeRO stage and precision beside the unsharded run."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mitrain.cli.shared import command, say


def add_bench(commands: Any) -> None:
    sub = command(commands, "bench", run_parity, "measure sharded training against unsharded training")
    sub.add_argument("what", choices=["parity"], help="ZeRO stages × precisions × ranks: losses, bytes, step times")
    sub.add_argument("--quick", action="store_true", help="ZeRO 0 and 3, fp32 and int8, 5 updates, no peers")
    sub.add_argument("--config", default="configs/quickstart.yaml", help="what is trained (default: %(default)s)")
    sub.add_argument(
        "--out",
        metavar="DIR",
        help="for results.json and table.md (default: runs/parity); the same DIR goes on after an interruption",
    )
    sub.add_argument("--steps", type=int, metavar="N", help="updates before the loss is taken (default: 20, quick 5)")
    sub.add_argument("--batch", type=int, default=4, metavar="N", help="samples a step, a multiple of 4 (default: 4)")
    sub.add_argument(
        "--limit", type=float, default=3600, metavar="S", help="seconds that a cell may take (default: 3600)"
    )


def run_parity(arguments: argparse.Namespace) -> None:
    from mitrain.bench import cells, parity
    from mitrain.errors import ConfigError

    steps = arguments.steps or (5 if arguments.quick else 20)
    if steps < 1 or arguments.batch < 4 or arguments.batch % 4:
        raise ConfigError(f"--steps={steps} --batch={arguments.batch}: give a step or more, of a multiple of 4 samples")
    plan = cells.Plan(arguments.config, steps, arguments.batch)
    out = Path(arguments.out or ("runs/parity-quick" if arguments.quick else "runs/parity"))
    parity.prepare(plan)
    found = parity.parity(
        plan,
        cells.quick() if arguments.quick else cells.full(),
        out,
        shown(arguments),
        say=lambda text: print(text, file=sys.stderr, flush=True),
        limit_s=arguments.limit,
    )
    say(arguments, (out / "table.md").read_text(encoding="utf-8"))
    if arguments.json:
        print(json.dumps(found, indent=2, sort_keys=True, allow_nan=False), flush=True)
    parity.check(found)


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
    return " ".join(["mitrain bench parity", *(["--quick"] if arguments.quick else []), *given])
