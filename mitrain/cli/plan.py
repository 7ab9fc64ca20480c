"""``mitrain plan``: what a configuration takes on a machine, before anything is trained."""

import argparse
from pathlib import Path
from typing import Any

from mitrain.cli.shared import describe, glance, say
from mitrain.core.errors import ConfigError

EXAMPLES = """  mitrain plan quickstart
  mitrain plan mit-7b-flickr30k --gpu a100-40g --gpus 8 --nodes 2
  mitrain plan mit-7b-mmimdb --gpu h100-80g --picture plan.svg"""


def add_plan(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_plan, EXAMPLES)
    sub.add_argument("config", help="a YAML file or a shipped configuration's name, as quickstart")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.batch=8 model.quantize=nf4")
    sub.add_argument("--gpu", metavar="NAME", help="e.g. h100-80g or a100-40g (default: the CPU here)")
    sub.add_argument("--gpus", type=int, metavar="N", help="GPUs per node (default: 1, or 8 with several nodes)")
    sub.add_argument("--nodes", type=int, default=1, metavar="M", help="number of nodes (default: 1)")
    sub.add_argument(
        "--network",
        default="infiniband",
        choices=["infiniband", "ethernet"],
        help="network between the nodes (default: infiniband)",
    )
    sub.add_argument("--memory", type=float, metavar="GB", help="GiB per rank, in place of the machine's")
    sub.add_argument(
        "--tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens per text, if the data is not on this machine (default: 64)",
    )
    sub.add_argument("--samples", type=int, metavar="N", help="samples per epoch, if the data is not on this machine")
    sub.add_argument("--price", type=float, metavar="X", help="price of a GPU-hour, for the cost of an epoch")
    sub.add_argument("--picture", metavar="FILE", help="draw where the memory goes, e.g. plan.svg")
    sub.set_defaults(resume=None)


def run_plan(arguments: argparse.Namespace) -> Any:
    glance(arguments)
    from mitrain.training import schema
    from mitrain.training.plan import PlanRequest, machine_of, plan, report

    if arguments.picture and Path(arguments.picture).suffix != ".svg":
        raise ConfigError(f"--picture {arguments.picture}: pictures are drawn as SVG, name it so, as plan.svg")
    config = schema.load(arguments.config, arguments.overrides)
    per_node = (1 if arguments.nodes == 1 else 8) if arguments.gpus is None else arguments.gpus
    asked = PlanRequest(
        machine_of(arguments.gpu, arguments.memory, per_node),
        per_node * arguments.nodes,
        arguments.nodes,
        arguments.network,
        arguments.tokens,
        arguments.samples,
        arguments.price,
    )
    found = plan(config, asked)
    if arguments.picture:
        from mitrain.compare.plots import memory_bar
        from mitrain.core.files import write_atomic

        write_atomic(Path(arguments.picture), memory_bar(found.config, found.per_rank_bytes, found.memory_bytes))
    say(arguments, report.text(found))
    return found.to_dict()
