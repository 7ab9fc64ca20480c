"""Two hosts on this machine: network namespaces with an address each, joined by a pair of virtual interfaces.

Only the network is separate; files, the host's name and processes are shared.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence

import pytest
from ranks import need

INTERFACE = "eth0"
ADDRESSES = ("10.213.77.1", "10.213.77.2")


class TwoHosts:
    """``names`` of the namespaces, in the order of ``ADDRESSES``."""

    def __init__(self) -> None:
        self.names = tuple(f"mitrain-{os.getpid()}-{letter}" for letter in "ab")

    def start(self) -> None:
        need("ip")
        ends = [f"mt{os.getpid()}{letter}" for letter in "ab"]
        for name in self.names:
            done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespace can be made: {done.stderr.strip()}")
        self.ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self.names, ends, ADDRESSES, strict=True):
            self.ip("link", "set", end, "netns", name)
            self.ip("-n", name, "link", "set", end, "name", INTERFACE)
            self.ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            self.ip("-n", name, "link", "set", INTERFACE, "up")
            self.ip("-n", name, "link", "set", "lo", "up")

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def run(self, host: int, command: Sequence[object], env: dict[str, str], **options: object) -> subprocess.Popen:
        """Start a command on a host, gloo bound to its interface."""
        words = ["ip", "netns", "exec", self.names[host], *map(str, command)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = {**env, "GLOO_SOCKET_IFNAME": INTERFACE}
        return subprocess.Popen(words, env=env, start_new_session=True, **pipes, **options)

    def finish(self, *started: subprocess.Popen, seconds: float = 1800) -> None:
        """Wait for commands, which all have to end with 0; what is left of any is killed."""
        end, said = time.monotonic() + seconds, []
        try:
            for process in started:
                said.append(process.communicate(timeout=max(1, end - time.monotonic()))[0])
            assert not any(process.returncode for process in started), "\n".join(said)
        finally:
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                process.stdout.close()

    def stop(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
