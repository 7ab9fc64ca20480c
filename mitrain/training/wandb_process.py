"""wandb in a process of its own, ``python -m mitrain.training.wandb_process PARENT SECONDS``: a run's numbers come by stdin.

One JSON object a line: first {"init": what `wandb.init` is given}, then {"log": values, "step": number}; the end of the
input finishes the run. Whatever wandb raises is the last line on standard error, and the exit code 1. So it may hang,
exit, or take the process with it: training goes on. SECONDS after the process PARENT has ended it is killed with all that
it has started, wherever it hangs.
"""

import json
import netrc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

FAILED = "failed: "
FINISHED = "finished"
LOOK_S = 0.5


def main(lines: Iterable[str]) -> int:
    try:
        serve(lines)
    except BaseException as error:  # sys.exit, too: a logger ends nothing but itself
        print(f"{FAILED}{type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return 1
    print(FINISHED, file=sys.stderr)
    return 0


def serve(lines: Iterable[str]) -> None:
    messages = (json.loads(line) for line in lines)
    run = start(next(messages)["init"])
    for values in messages:
        run.log(values["log"], step=values["step"])
    run.finish()


def start(options: dict[str, Any]) -> Any:
    import wandb

    quiet = wandb.Settings(silent=True, console="off")
    mode = options["mode"] if options["mode"] != "auto" else automatic_mode(quiet.base_url)
    return wandb.init(**{**options, "mode": mode}, settings=quiet)


def automatic_mode(base_url: str) -> str:
    """$WANDB_MODE if set; else online if there is a key for the server and it answers, and offline if not."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    url = urlsplit(base_url)
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    return "online" if has_key(host) and answers(host, port) else "offline"


def has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError:
        return False
    return True


def end_after(parent: int, seconds: float) -> None:
    """Kill this process group ``seconds`` after ``parent`` has ended: time enough to finish, and an end of what hangs."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    time.sleep(seconds)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_after, args=(int(sys.argv[1]), float(sys.argv[2])), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they ask the training to stop, whose end is the end of the input
    sys.exit(main(sys.stdin))
