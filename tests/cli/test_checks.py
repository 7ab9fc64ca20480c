"""The checks of ``mitrain doctor``: each on facts that are in order and on facts that are not."""

import errno
import importlib.metadata
import os
import resource
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from mitrain.cli import checks


def distributions(**versions):
    """A stand-in for the metadata of installed packages: name -> (version, what it requires)."""

    def find(name: str):
        if name.replace("-", "_") not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        version, requires = versions[name.replace("-", "_")]
        metadata = SimpleNamespace(__getitem__=None, get_all=lambda key: ["quant"])
        return SimpleNamespace(version=version, requires=requires, metadata=Named(name, metadata.get_all))

    return find


class Named(dict):
    def __init__(self, name, get_all):
        super().__init__(Name=name)
        self.get_all = get_all


MITRAIN = ["torch>=2.13", 'bitsandbytes>=0.50; extra == "quant"', 'absent>=1; extra == "quant"']


def test_versions_that_fit():
    there = {"torch": ("2.13.0+cpu", []), "bitsandbytes": ("0.50.2", []), "pip": ("23.0.1", [])}
    found = checks.versions(distributions(mitrain=("1", [*MITRAIN, 'pip>=23.2; extra == "quant"']), **there))
    assert found.ok and not found.fix


@pytest.mark.parametrize(
    ("installed", "says"),
    [
        ({"torch": ("2.12.1", [])}, "mitrain needs torch>=2.13, installed is 2.12.1"),
        ({}, "mitrain needs torch, which is not installed"),
        ({"torch": ("2.13.0", []), "bitsandbytes": ("0.49.0", [])}, "mitrain needs bitsandbytes>=0.50, installed is"),
        ({"torch": ("2.13.0", ["triton==3.7.1"]), "triton": ("3.6.0", [])}, "torch needs triton==3.7.1, installed is"),
        ({"torch": ("2.13.0", []), "torchvision": ("0.27", ["torch==2.12.0"])}, "torchvision needs torch==2.12.0"),
    ],
)
def test_versions_that_do_not_fit_are_named(installed, says):
    found = checks.versions(distributions(mitrain=("1", MITRAIN), **installed))
    assert not found.ok and says in found.detail and "constraints.txt" in found.fix


def test_an_extra_that_cannot_be_imported_is_named():
    def load(module):
        if module == "soundfile":
            raise OSError("sndfile library not found")

    look = {"soundfile": 1, "av": 1, "deepspeed": 1}.get
    green = checks.extras(look, lambda module: None)
    assert green.ok and green.detail.startswith("installed: audio deepspeed video; not installed: coco ")
    red = checks.extras(look, load)
    assert not red.ok and "audio (soundfile: sndfile library not found)" in red.detail
    assert red.fix == "pip install --force-reinstall 'mitrain[audio]'"


@pytest.mark.parametrize(
    ("kernels", "mitrain_kernels", "says"),
    [
        (None, "kernels/mitrain_kernels/__init__.py", None),
        ("/site/kernels/__init__.py", "mitrain_kernels/__init__.py", None),
        (None, None, "not importable"),
        (None, "/elsewhere/mitrain_kernels/__init__.py", "not the one of"),
        ("kernels/__init__.py", "kernels/mitrain_kernels/__init__.py", "hides the PyPI package kernels"),
    ],
)
def test_the_kernels_are_ours_and_take_no_name(tmp_path, kernels, mitrain_kernels, says):
    places = {"kernels": kernels, "mitrain_kernels": mitrain_kernels}
    specs = {name: SimpleNamespace(origin=str(tmp_path / place)) for name, place in places.items() if place}
    found = checks.kernels(specs.get, tmp_path / "mitrain/cli/checks.py")
    assert found.ok == (says is None) and (says or "mitrain_kernels in") in found.detail and bool(found.fix) == bool(says)


def test_a_lock_that_nobody_holds_any_more_is_named(tmp_path):
    for name, age in (("shm_comm", 3600), ("cpu_adam", 60)):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
        lock = tmp_path / "py311_cpu" / name / "lock"
        lock.touch()
        os.utime(lock, (0, 1e6 - age))
    stale = tmp_path / "py311_cpu/shm_comm/lock"
    red = checks.locks([tmp_path], 1e6)
    assert not red.ok and red.detail == str(stale) and red.fix == f"rm {stale}"
    stale.unlink()
    assert checks.locks([tmp_path], 1e6).ok


def test_compiled_code_belongs_on_a_disk_of_the_machine(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/a / ext4 rw\nserver:/home /home nfs4 rw\n/dev/b /home/local xfs rw\n")
    home = checks.compiled({"HOME": "/home/me"})
    assert home == {
        "TORCH_EXTENSIONS_DIR": Path("/home/me/.cache/torch_extensions"),
        "TRITON_CACHE_DIR": Path("/home/me/.triton/cache"),
    }
    red = checks.caches(home, mounts)
    assert not red.ok and "/home/me/.triton/cache on nfs4" in red.detail
    assert red.fix == "export TORCH_EXTENSIONS_DIR=/a/local/disk export TRITON_CACHE_DIR=/a/local/disk"
    assert checks.caches({"TRITON_CACHE_DIR": Path("/home/local/x")}, mounts).ok
    assert checks.caches(home, tmp_path / "absent").ok


def test_a_port_in_use_is_named():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        number = server.getsockname()[1]
        red = checks.port({"MASTER_PORT": str(number)})
        assert not red.ok and str(number) in red.detail and "MASTER_PORT" in red.fix
    assert checks.port({"MASTER_PORT": str(number)}).ok


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({}, None),
        ({"MASTER_ADDR": "far"}, "other machines cannot reach that"),
        ({"MASTER_ADDR": "far", "GLOO_SOCKET_IFNAME": "eth1"}, None),
        ({"MASTER_ADDR": "127.0.0.1"}, None),
        ({"MASTER_ADDR": "lost"}, "lost does not resolve (Name or service not known)"),
    ],
)
def test_names_resolve_to_what_others_reach(env, says):
    known = {"here": "127.0.1.1", "far": "10.0.0.1", "127.0.0.1": "127.0.0.1"}

    def look(name):
        if name not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return known[name]

    found = checks.host_name(env, "here", look)
    assert found.ok == (says is None) and (says or "here is 127.0.1.1") in found.detail and bool(found.fix) == bool(says)


def test_limits(tmp_path):
    def of(files, memory):
        return lambda which: ((files if which == resource.RLIMIT_NOFILE else memory), resource.RLIM_INFINITY)

    assert checks.limits(of(1024, 65536), tmp_path / "none").ok
    assert checks.limits(of(resource.RLIM_INFINITY, resource.RLIM_INFINITY), tmp_path).detail == (
        "nofile unlimited, memlock unlimited"
    )
    assert "ulimit -n" in checks.limits(of(256, 65536), tmp_path / "none").fix
    (tmp_path / "mlx5_0").mkdir()
    red = checks.limits(of(4096, 65536), tmp_path)
    assert not red.ok and "ulimit -l unlimited" in red.fix
    assert checks.limits(of(4096, resource.RLIM_INFINITY), tmp_path).ok


def test_a_containers_little_shared_memory_is_named():
    red = checks.shared_memory("/dev/shm", lambda path: SimpleNamespace(free=64 << 20))
    assert not red.ok and red.detail == "0.1 GiB free in /dev/shm" and "--shm-size" in red.fix
    assert checks.shared_memory("/dev/shm", lambda path: SimpleNamespace(free=8 << 30)).ok

    def absent(path):
        raise FileNotFoundError(errno.ENOENT, "no such file")

    assert checks.shared_memory("/dev/shm", absent).ok


def test_a_full_disk_is_named(tmp_path):
    red = checks.disk(lambda path: SimpleNamespace(free=(1 << 30) if path == tmp_path else 1 << 40), tmp_path / "new/one")
    assert not red.ok and f"{tmp_path / 'new/one'};" in red.fix and "1.0 GiB free for the cache" in red.detail
    assert checks.disk(lambda path: SimpleNamespace(free=3 << 30), tmp_path).ok


def cuda(count=0, capability=(9, 0), made=("sm_80", "sm_90")):
    return SimpleNamespace(
        device_count=lambda: count,
        get_device_name=lambda i: "H100",
        get_device_capability=lambda i: capability,
        get_arch_list=lambda: list(made),
        nccl=SimpleNamespace(version=lambda: (2, 29, 3)),
    )


def test_gpus(monkeypatch):
    monkeypatch.setattr(checks.distributed, "is_nccl_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = "NVIDIA H100, 570.1, 81559 MiB\n"
    assert checks.gpu(cuda(), None, "").detail == "none"
    assert checks.gpu(cuda(2), "12.8", line).detail == "H100 sm_90, H100 sm_90, NCCL 2.29.3"
    assert "build for CPUs" in checks.gpu(cuda(), None, line).detail
    red = checks.gpu(cuda(), "13.0", line)
    assert not red.ok and "torch sees no GPU" in red.detail and "CUDA 13.0" in red.fix
    assert "no code for H100 sm_70" in checks.gpu(cuda(1, (7, 0)), "12.8", line).detail
    monkeypatch.setattr(checks.distributed, "is_nccl_available", lambda: False)
    assert checks.gpu(cuda(1), "12.8", line).ok
    assert not checks.gpu(cuda(2), "12.8", line).ok
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert checks.gpu(cuda(), "12.8", line).ok


@pytest.mark.parametrize(
    ("capability", "made", "runs"),
    [
        ("sm_86", ["sm_80"], True),
        ("sm_80", ["sm_86"], False),
        ("sm_90", ["sm_80"], False),
        ("sm_120", ["sm_80", "compute_90"], True),
        ("sm_90", ["sm_90a"], True),
        ("sm_100", ["sm_90", "sm_100"], True),
    ],
)
def test_which_code_a_gpu_runs(capability, made, runs):
    assert checks.runs_on(capability, made) is runs
