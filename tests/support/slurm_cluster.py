"""A real Slurm of two nodes in a folder of its own: munged, slurmctld and two slurmd, started and ended here.

Nothing outside of the folder is written or read: munge has its own key and socket. The nodes' names, n1 and n2, do not
resolve; only Slurm knows their addresses.
"""

import os
import socket
import subprocess
import time
from pathlib import Path

from ranks import free_port

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=5
JobRequeue=1
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


class Cluster:
    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {**os.environ, "PATH": SBIN, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        for name in ("state", "spool/n1", "spool/n2"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        ports = [free_port() for _ in range(3)]
        host = socket.gethostname().split(".")[0]
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, host=host, ports=ports))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        files = {name: self.folder / f"munge.{name}" for name in ("key", "socket", "pid", "log", "seed")}
        self.daemon("munged", "--foreground", "--force", f"--key-file={files['key']}", f"--socket={files['socket']}",
                    f"--pid-file={files['pid']}", f"--log-file={files['log']}", f"--seed-file={files['seed']}")  # fmt: skip
        self.until(files["socket"].exists, "munged opens its socket")
        self.daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.daemon("slurmd", "-D", "-N", node)
        self.until(self.is_idle, "both nodes are idle")

    def daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as out:
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=out, stderr=out, start_new_session=True))

    def is_idle(self) -> bool:
        return self.run("sinfo", "--noheader", "--states=idle", "--format=%D").strip() == "2"

    def until(self, true, what: str, seconds: float = 120) -> None:
        """Ask every half second: Slurm tells nobody when something has come about."""
        end = time.monotonic() + seconds
        while not true():
            dead = [daemon.args[0] for daemon in self.daemons if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
                raise AssertionError(f"waited in vain until {what} (ended: {dead})\n{logs}")
            time.sleep(0.5)

    def run(self, *command: object, **env: str) -> str:
        command = [str(word) for word in command]
        done = subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=60)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        words = self.run("scontrol", "show", "job", number, "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, seconds: float = 1800) -> dict[str, str]:
        """The job when it has ended; one that was requeued is started at once."""

        def ended() -> bool:
            state = self.job(number)
            if state.get("JobState") == "PENDING" and state.get("Reason") == "BeginTime":
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
            return state.get("JobState") in ENDED

        self.until(ended, f"job {number} ends", seconds)
        return self.job(number)

    def stop(self) -> None:
        self.run("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(timeout=60)
