"""``mitrain doctor``: this machine, its packages, and the known faults that they show here."""

import argparse
from typing import Any

from mitrain.cli.shared import describe, say


def add_doctor(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_doctor)


def run_doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    from mitrain.cli import machine

    report = machine.examine()
    say(arguments, machine.as_text(report))
    return report
