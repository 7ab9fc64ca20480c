"""``mitrain doctor``: this machine, its packages, and the known faults that they show here."""

import argparse
from typing import Any

from mitrain.cli.shared import command, say


def add_doctor(commands: Any) -> None:
    command(commands, "doctor", run_doctor, "versions, CPU, GPU, and known faults of other packages, measured here")


def run_doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    from mitrain.cli import machine

    report = machine.examine()
    say(arguments, machine.as_text(report))
    return report
