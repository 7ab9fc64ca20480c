"""A fresh process that does what it is asked, one request at a time: JSON lines in, JSON lines out.

Requests: ``open`` (a provider on a case: gate, warm-up, memory), ``sample`` (one timed sample), ``close``.
The parent asks one worker at a time, so that only one computes.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Freed blocks stay with the process, as `mitrain` keeps them too: page faults on fresh memory are noise of 10 to 50 %
# on a CPU. Blocks above 32 MiB (glibc's limit) still come from the kernel. The same for every provider.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
REFUSAL = "cannot do this"
KERNELS = Path(__file__).resolve().parents[1]


class Worker:
    """The parent's end. ``ask`` returns the answer; a process that died answers {"error": …} from then on."""

    def __init__(self, device: str, bytecode: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bench.worker", device],
            env=environment(bytecode),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"error": f"the process ended with code {self.process.wait()}"}

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


def environment(bytecode: Path) -> dict[str, str]:
    """This checkout first on the path. Where Python may not keep bytecode, the workers of one run share a folder of it:
    compiling torch's sources takes each of them five seconds."""
    paths = [str(KERNELS), *filter(None, [os.environ.get("PYTHONPATH")])]
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(bytecode)} if sys.dont_write_bytecode else {}
    return {**os.environ, **MALLOC, **compiled, "PYTHONPATH": os.pathsep.join(paths)}


class Desk:
    """The worker's end: at most one case is open at a time."""

    def __init__(self, device: str):
        self.device, self.subject = device, None

    def answer(self, do: str, **request: Any) -> dict[str, Any]:
        """An exception is an answer too."""
        try:
            return getattr(self, do)(**request)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}

    def ready(self) -> dict[str, Any]:
        return {}

    def open(self, provider: str, case: dict[str, Any], check: bool) -> dict[str, Any]:
        """``faults`` of the gate (asked for with ``check``); only without any is the provider warmed up and weighed.

        ``refused``: a backend said that it does not do such cases, which is no fault.
        """
        from bench import cases, gate, measure, providers

        case = cases.Case(**case)
        chosen = providers.make_provider(provider, case, self.device)
        try:
            faults = gate.check(chosen, case, self.device) if check else []
        except ValueError as error:
            if REFUSAL not in str(error):
                raise
            return {"refused": str(error)}
        release()
        if faults:
            return {"faults": faults}
        self.subject = measure.Subject(chosen, case, self.device)
        return {"faults": [], **self.subject.memory()}

    def sample(self, mode: str) -> dict[str, Any]:
        return {"ms": self.subject.sample(mode)}

    def close(self) -> dict[str, Any]:
        self.subject = None
        release()
        return {}


def release() -> None:
    """Give memory back, to the other workers too where the device is shared."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def serve(device: str) -> None:
    """Answer until stdin ends. What anything else prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from bench import measure

    measure.rehearse()  # before the first answer, while the other workers load too
    gc.collect()
    gc.freeze()
    desk = Desk(device)
    for line in sys.stdin:
        print(json.dumps(desk.answer(**json.loads(line))), file=out)


if __name__ == "__main__":
    serve(sys.argv[1])
