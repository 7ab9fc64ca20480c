"""Two hosts with a network between them: by hand, by ssh, by torchrun; and what happens when the network goes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT, need
from two_hosts import ADDRESSES, INTERFACE, TwoHosts

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
PORTS = {"by hand": 29651, "torchrun": 29652, "by ssh": 29653}  # of namespaces that nobody else uses


@pytest.fixture(scope="module")
def hosts():
    hosts = TwoHosts()
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    return path


def on_both(hosts: TwoHosts, commands: list[list[object]], env: dict[str, str]) -> None:
    hosts.finish(*(hosts.run(host, command, env, cwd=ROOT) for host, command in enumerate(commands)))


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_by_hand_on_each_host(hosts, hostfile, world, environment, same_losses):
    train = ["train", world / "config.yaml", "--run-dir", world / "by-hand"]
    options = ["--no_ssh", "--master_addr", ADDRESSES[0], "--master_port", PORTS["by hand"], "--node_rank"]
    script = ["bash", ROOT / "launch/deepspeed.sh", hostfile]
    on_both(hosts, [[*script, *options, rank, *train] for rank in (0, 1)], environment)
    same_losses(world / "by-hand")


@pytest.mark.slow
def test_torchrun_on_each_host(hosts, world, environment, same_losses):
    train = ["-m", "mitrain", "train", world / "config.yaml", "--run-dir", world / "torchrun"]
    options = [
        "--nnodes=2",
        "--nproc-per-node=1",
        f"--master-addr={ADDRESSES[0]}",
        f"--master-port={PORTS['torchrun']}",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options]
    on_both(hosts, [[*torchrun, f"--node-rank={rank}", *train] for rank in (0, 1)], environment)
    same_losses(world / "torchrun")


@pytest.fixture
def ssh(hosts, tmp_path):
    """An ssh server on each host, and what pdsh has to add to reach it without asking."""
    need("sshd", "ssh-keygen", "ssh", "pdsh")
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on this folder
    for name in ("host", "own"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    settings = [f"HostKey={tmp_path}/host", f"AuthorizedKeysFile={tmp_path}/own.pub", "StrictModes=no", "UsePAM=no",
                "PermitRootLogin=yes", "PidFile=none"]  # fmt: skip
    options = [word for setting in settings for word in ("-o", setting)]
    servers = [hosts.run(h, ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *options], dict(os.environ)) for h in (0, 1)]
    yield f"-i {tmp_path}/own -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectionAttempts=30"
    for server in servers:
        server.terminate()
        server.communicate(timeout=60)


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_by_ssh_from_the_first_host(hosts, hostfile, ssh, world, environment, same_losses):
    """The interface, the cache and the interpreter's path reach the hosts with nothing but what the script passes on."""
    options = ["--no_ssh_check", "--master_addr", ADDRESSES[0], "--master_port", PORTS["by ssh"]]
    train = ["train", world / "config.yaml", "--run-dir", world / "by-ssh"]
    command = ["bash", ROOT / "launch/deepspeed.sh", hostfile, *options, *train]
    hosts.finish(hosts.run(0, command, {**environment, "PDSH_SSH_ARGS_APPEND": ssh}, cwd=ROOT))
    same_losses(world / "by-ssh")


def test_a_network_that_is_cut_ends_both_ranks_in_one_line(hosts, forge, world, environment, tmp_path):
    run = tmp_path / "run"
    arguments = (*hosts.names, world / "config.yaml", "--run-dir", run, "--json")
    env = {"MITRAIN_CACHE": environment["MITRAIN_CACHE"], "GLOO_SOCKET_IFNAME": INTERFACE, "MITRAIN_TIMEOUT": "8"}
    group = forge.start(2, "rank_worker:train_on_hosts", *arguments, MASTER_ADDR=ADDRESSES[0], **env)
    for rank, ended in enumerate(group.wait()):
        assert (ended.code, ended.out) == (2, ""), ended.err
        told = ("run folder: ", "[W")  # torch warns where an address has no name
        (line,) = [line for line in ended.err.splitlines() if not line.startswith(told)]
        assert f"rank {rank} lost the others (" in line
    assert (run / "checkpoints" / "step-00000003").is_dir() and not (run / "summary.json").exists()
