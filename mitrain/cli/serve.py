"""``mitrain serve``: a run behind a page and an HTTP API."""

import argparse
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mitrain.cli.ask import add_opening, opening_of
from mitrain.cli.shared import describe, generation_of
from mitrain.core.errors import ConfigError, need_extra

if TYPE_CHECKING:
    from mitrain.inference.service import ServiceLimits
    from mitrain.training.runs import Run

EXAMPLES = """  mitrain serve runs/birds-TIME                       a page at http://127.0.0.1:8000
  mitrain serve my-adapter --host 0.0.0.0 --port 80   for other machines, too
  mitrain serve my-adapter other-adapter              on one language model, the second at /NAME/
"""


def add_serve(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_serve, EXAMPLES)
    sub.add_argument(
        "run_dirs",
        nargs="+",
        metavar="RUN_DIR",
        help="a run folder, as runs/NAME-TIME, an export, or USER/NAME on the Hub; several share one language model: each"
        " answers at /NAME/, the first also at /",
    )
    sub.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1, this machine)")
    sub.add_argument("--port", type=int, default=8000, help="port; 0 takes any free one (default: 8000)")
    sub.add_argument(
        "--batch", type=int, default=8, metavar="N", help="most samples that are answered together (default: 8)"
    )
    sub.add_argument(
        "--wait-ms", type=float, default=10, metavar="MS", help="how long a batch waits for more requests (default: 10)"
    )
    sub.add_argument("--max-mb", type=float, default=64, metavar="MB", help="largest request (default: 64)")
    add_opening(sub)


def run_serve(arguments: argparse.Namespace) -> None:
    if arguments.batch < 1 or arguments.wait_ms < 0 or arguments.max_mb <= 0:
        raise ConfigError("--batch is at least 1, --wait-ms at least 0, --max-mb more than 0: correct them")
    uvicorn = need_extra("uvicorn", "serve", "mitrain serve")
    need_extra("starlette", "serve", "mitrain serve")
    need_extra("python_multipart", "serve", "mitrain serve")
    if arguments.encoder and len(arguments.run_dirs) > 1:
        raise ConfigError("--encoder is about one run's encoders: serve one run, or leave it out")
    listening = listener(arguments.host, arguments.port)
    from mitrain.inference.service import ServiceLimits
    from mitrain.training import runs

    opening = opening_of(arguments)
    run = runs.open_run(arguments.run_dirs[0], **opening)
    others = [runs.open_run(each, **opening, beside=run) for each in arguments.run_dirs[1:]]
    limits = ServiceLimits(arguments.max_mb, arguments.batch, arguments.wait_ms, generation_of(arguments))
    app = together([run, *others], limits)
    host, port = listening.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    for other in others:
        print(f"mitrain: {other.config.name} (step {other.saved.step}): {where}/{other.config.name}/", file=sys.stderr)
    print(f"mitrain: {run.config.name} (step {run.saved.step}) answers at {where}; Ctrl-C ends it", file=sys.stderr)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])


def together(served: Sequence["Run"], limits: "ServiceLimits") -> Any:
    """The application of one run; of several that of each below its name, and of the first at the top."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from mitrain.inference.serving import app_of

    if len(served) == 1:
        return app_of(served[0], limits)
    names = [run.config.name for run in served]
    taken = {"run", "predict", "health", "metrics", "v1"}
    if wrong := [name for name in names if names.count(name) > 1 or name in taken]:
        raise ConfigError(f"no two addresses for {wrong[0]!r}: serve runs of different names, none of them {sorted(taken)}")
    apps = {name: app_of(run, limits) for name, run in zip(names, served, strict=True)}
    return Starlette(routes=[*(Mount(f"/{name}", app) for name, app in apps.items()), Mount("/", apps[names[0]])])


def listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen at {host} port {port} ({error}): give others with --host and --port") from None
