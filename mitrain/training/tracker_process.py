"""A tracker in a process of its own, ``python -m mitrain.training.tracker_process PARENT SECONDS``: numbers come by stdin.

One JSON object a line: first {"init": what `TRACKERS` is given, "tracker": its name}, then {"log": values, "step": number};
the end of the input finishes the run. Whatever the tracker raises is the last line on standard error, and the exit code 1.
So it may hang, exit, or take the process with it: training goes on. SECONDS after the process PARENT has ended it is killed
with all that it has started, wherever it hangs.

The packages are called by themselves: a common layer above them, as accelerate's, imports torch first (4 s, 230 MB).
"""

import json
import netrc
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
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
    first = next(messages)
    run = TRACKERS[first["tracker"]](**first["init"])
    for values in messages:
        run.log(values["log"], step=values["step"])
    run.finish()


def start_wandb(name: str, folder: str, mode: str, step: int, **options: Any) -> Any:
    """A run folder's name is its id, so that a resumed run goes on in the same place."""
    import wandb

    quiet = wandb.Settings(silent=True, console="off")
    mode = mode if mode != "auto" else automatic_mode(quiet.base_url)
    places = {"name": name, "id": identifier(name), "dir": folder, "resume": "allow"}
    return wandb.init(**options, **places, mode=mode, settings=quiet)


class TensorBoard:
    """Event files in RUN/tensorboard; of a resumed run those behind its checkpoint are void."""

    def __init__(self, folder: str, step: int, **_: Any):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event = Event
        self.writer = EventFileWriter(os.path.join(folder, "tensorboard"))
        if step:
            start = SessionLog(status=SessionLog.START)
            self.writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        scalars = [{"tag": name, "simple_value": value} for name, value in numbers(values)]
        self.writer.add_event(self.event(wall_time=time.time(), step=step, summary={"value": scalars}))

    def finish(self) -> None:
        self.writer.close()


class MLflow:
    """A run of the experiment ``project``, where $MLFLOW_TRACKING_URI says; a resumed run goes on in the one of its name."""

    def __init__(self, project: str, name: str, config: dict[str, Any], **_: Any):
        import mlflow

        self.package = mlflow
        experiment, own = mlflow.set_experiment(project).experiment_id, identifier(name)
        runs = mlflow.MlflowClient().search_runs([experiment], f"tags.mitrain = '{own}'", max_results=1)
        known = runs[0].info.run_id if runs else None
        mlflow.start_run(run_id=known, run_name=None if known else name, tags={"mitrain": own})
        if not known:
            mlflow.log_dict(config, "config.json")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.package.log_metrics({identifier(key): value for key, value in numbers(values)}, step=step)

    def finish(self) -> None:
        self.package.end_run()


def start_trackio(project: str, name: str, config: dict[str, Any], **_: Any) -> Any:
    import trackio

    return trackio.init(project, name=name, config=config, resume="allow", embed=False)


TRACKERS = {"wandb": start_wandb, "tensorboard": TensorBoard, "mlflow": MLflow, "trackio": start_trackio}
"""Each makes a run with wandb's surface, ``log(values, step)`` and ``finish()``."""


def identifier(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_./-]", "-", name)


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """The numbers in ``values``, those of mappings as "outer/inner"; no texts, no lists."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, float(value)


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
