"""``mitrain cache``: what lies in the user's cache, and what of it may go."""

import argparse
from typing import Any

from mitrain.cli.shared import describe, say
from mitrain.core.errors import ConfigError

EXAMPLES = """  mitrain cache                          how much there is of each kind
  mitrain cache --prune                  what a killed process or an earlier version left
  mitrain cache --prune --older 30       also what nobody has read for 30 days
  mitrain cache features --prune --older 0
"""


def add_cache(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_cache, EXAMPLES)
    sub.add_argument("kinds", nargs="*", metavar="KIND", help="models, data, features, archives, … (default: all)")
    sub.add_argument("--prune", action="store_true", help="remove what nothing refers to; it is made again when needed")
    sub.add_argument(
        "--older", type=float, metavar="DAYS", help="with --prune: also remove what was not read for this many days"
    )


def run_cache(arguments: argparse.Namespace) -> Any:
    from mitrain.core import cached

    if arguments.older is not None and (not arguments.prune or not arguments.older >= 0):
        raise ConfigError("--older goes with --prune and is a number of days: write --prune --older 30")
    entries = cached.entries(arguments.kinds)
    gone = cached.prune(entries, arguments.older) if arguments.prune else []
    rows = cached.table([one for one in entries if one not in gone])
    for row in rows:
        say(arguments, f"{row['kind']:12s} {row['entries']:7d} {row['bytes'] / 1e6:10.1f} MB  last read {row['last_read']}")
    freed = sum(one.bytes for one in gone)
    if arguments.prune:
        say(arguments, f"removed {len(gone)} entries, {freed / 1e6:.1f} MB")
    return {"folder": str(cached.cache_home()), "kinds": rows, "removed": [str(one.path) for one in gone], "freed": freed}
