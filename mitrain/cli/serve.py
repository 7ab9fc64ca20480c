"""``mitrain serve``: a run behind a page and an HTTP API."""

import argparse
import socket
import sys

from mitrain.cli.ask import add_places
from mitrain.cli.shared import add_allow_changes, add_checkpoint, add_generation, describe, generation_of
from mitrain.core.errors import ConfigError, need_extra

EXAMPLES = """  mitrain serve runs/birds-TIME                       a page at http://127.0.0.1:8000
  mitrain serve my-adapter --host 0.0.0.0 --port 80   for other machines, too
"""


def add_serve(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_serve, EXAMPLES)
    sub.add_argument(
        "run_dir", metavar="RUN_DIR", help="a run folder, as runs/NAME-TIME, an export, or USER/NAME on the Hub"
    )
    sub.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1, this machine)")
    sub.add_argument("--port", type=int, default=8000, help="0 takes any free one (default: 8000)")
    sub.add_argument("--batch", type=int, default=8, metavar="N", help="samples answered together (default: 8)")
    sub.add_argument(
        "--wait-ms", type=float, default=10, metavar="MS", help="how long a batch waits for more requests (default: 10)"
    )
    sub.add_argument("--max-mb", type=float, default=64, metavar="MB", help="of a request (default: 64)")
    add_generation(sub)
    add_checkpoint(sub)
    add_allow_changes(sub)
    add_places(sub)


def run_serve(arguments: argparse.Namespace) -> None:
    if arguments.batch < 1 or arguments.wait_ms < 0 or arguments.max_mb <= 0:
        raise ConfigError("--batch is at least 1, --wait-ms at least 0, --max-mb more than 0: correct them")
    uvicorn = need_extra("uvicorn", "serve", "mitrain serve")
    need_extra("starlette", "serve", "mitrain serve")
    need_extra("python_multipart", "serve", "mitrain serve")
    listening = listener(arguments.host, arguments.port)
    from mitrain.inference.serving import Limits, app_of
    from mitrain.training import runs

    places = {"base": arguments.base, "encoders": arguments.encoder, "allow_changes": arguments.allow_changes}
    run = runs.open_run(arguments.run_dir, arguments.checkpoint, **places)
    app = app_of(run, Limits(arguments.max_mb, arguments.batch, arguments.wait_ms, generation_of(arguments)))
    host, port = listening.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"mitrain: {run.config.name} (step {run.saved.step}) answers at {where}; Ctrl-C ends it", file=sys.stderr)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])


def listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen at {host} port {port} ({error}): give others with --host and --port"
        ) from None
