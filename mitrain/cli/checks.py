"""What keeps a run from starting, or slows it, looked for before it: each check is a function of facts of this machine.

The facts are the defaults of the arguments. A check says what is there, and where that is a fault what to do.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import distributed

from mitrain.core.files import cache_home

BESIDE = ("mitrain", "torchvision", "torchaudio", "xformers", "flash-attn")
"""Where requirements are followed from: those built for one version of torch break it by being there."""
EXTRAS = {
    "audio": "soundfile",
    "coco": "pycocotools.mask",
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "demo": "gguf",
    "gpu": "flash_attn",
    "parquet": "pyarrow",
    "peft": "peft",
    "plots": "matplotlib",
    "quant": "bitsandbytes",
    "serve": "starlette",
    "triton": "triton",
    "video": "av",
    "wandb": "wandb",
}
SLOW = ("datasets", "deepspeed", "peft", "wandb")  # take seconds to import: only looked for
STALE_S = 1800.0  # no operator is compiled for longer
SHARED_TYPES = re.compile(r"nfs|lustre|gpfs|beegfs|cifs|smb|ceph|glusterfs|sshfs|9p|pvfs|panfs|wekafs", re.IGNORECASE)
LEAST_FILES, LEAST_SHARED, LEAST_DISK = 1024, 1 << 30, 2 << 30
MEMLOCK = 1 << 36
PORT = 29500  # where torchrun and deepspeed meet if nobody says otherwise


@dataclass(frozen=True)
class Check:
    """``ok`` is False where something is to be mended, by ``fix``."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def versions(distribution: Callable[[str], Any] = importlib.metadata.distribution) -> Check:
    """Whether the installed packages are what mitrain, and what it needs in turn, ask for."""
    wrong, seen, todo = [], set(), list(BESIDE)
    while todo:
        name = canonicalize_name(todo.pop())
        here = None if name in seen else find(distribution, name)
        seen.add(name)
        for need in wanted(here) if here else ():
            todo.append(need.name)
            there = find(distribution, need.name)
            if there is None and not (need.marker and "extra" in str(need.marker)):
                wrong.append(f"{name} needs {need.name}, which is not installed")
            elif there is not None and not need.specifier.contains(there.version, prereleases=True):
                wrong.append(f"{name} needs {need.name}{need.specifier}, installed is {there.version}")
    fix = "install what launch/constraints.txt pins, or pip install -U each of them in the version named"
    return Check("versions", not wrong, "; ".join(wrong) or f"{len(seen)} packages fit one another", fix * bool(wrong))


def find(distribution: Callable[[str], Any], name: str) -> Any:
    with suppress(importlib.metadata.PackageNotFoundError):
        return distribution(name)


def wanted(here: Any) -> Iterable[Requirement]:
    """What a distribution needs here; of mitrain the extras too, which count where they are installed.

    pip does not: it is in every environment, and only the extra [demo] asks for a new one.
    """
    own = canonicalize_name(here.metadata["Name"]) == "mitrain"
    for need in map(Requirement, here.requires or ()):
        extras = ["", *(here.metadata.get_all("Provides-Extra") or ())] if own else [""]
        if need.name != "pip" and (need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras)):
            yield need


def extras(look: Callable[[str], Any] = importlib.util.find_spec, load: Callable = importlib.import_module) -> Check:
    """Which extras are installed, and whether each can be imported: a library may be missing under a package."""
    there, absent, broken = [], [], []
    for extra, module in EXTRAS.items():
        if look(module.partition(".")[0]) is None:
            absent.append(extra)
            continue
        try:
            if extra not in SLOW:
                load(module)
            there.append(extra)
        except Exception as error:  # whatever a package raises when it is imported
            broken.append(f"{extra} ({module}: {' '.join(str(error).split())[:120]})")
    detail = f"installed: {' '.join(there) or 'none'}; not installed: {' '.join(absent) or 'none'}"
    if not broken:
        return Check("extras", True, detail)
    names = ",".join(part.partition(" ")[0] for part in broken)
    return Check(
        "extras", False, f"cannot be imported: {'; '.join(broken)}", f"pip install --force-reinstall 'mitrain[{names}]'"
    )


def kernels(look: Callable[[str], Any] = importlib.util.find_spec, here: Path = Path(__file__)) -> Check:
    """Whether ``mitrain_kernels`` is the one beside this package, and none hides the package ``kernels``."""
    root = here.resolve().parents[2]
    spec, other = look("mitrain_kernels"), look("kernels")
    place = Path(spec.origin).resolve() if spec and spec.origin else None
    if place is None or place.parents[1] not in (root, root / "kernels"):
        found = f"mitrain_kernels is {place or 'not importable'}, not the one of {root}"
        return Check("kernels", False, found, "remove the other one, or install mitrain anew; see PYTHONPATH")
    package = Path(other.origin).resolve() if other and other.origin else None
    if package and package.parents[1] in (root, Path.cwd().resolve()):
        fix = f"remove {package}: a regular package of that name hides the one that transformers imports"
        return Check("kernels", False, f"{package.parent} hides the PyPI package kernels", fix)
    return Check("kernels", True, f"mitrain_kernels in {place.parent}")


def compiled(env: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Where code that is compiled on the spot is kept."""
    home = Path(env.get("HOME", "~")).expanduser()
    cache = Path(env.get("XDG_CACHE_HOME", home / ".cache"))
    return {
        "TORCH_EXTENSIONS_DIR": Path(env.get("TORCH_EXTENSIONS_DIR", cache / "torch_extensions")),
        "TRITON_CACHE_DIR": Path(env.get("TRITON_CACHE_DIR", home / ".triton" / "cache")),
    }


def locks(folders: Iterable[Path] | None = None, now: float | None = None) -> Check:
    """Locks that killed compilations left behind, on which every later one waits for ever."""
    now, found = time.time() if now is None else now, []
    for folder in compiled().values() if folders is None else folders:
        for path in (*folder.glob("*/lock"), *folder.glob("*/*/lock")):
            with suppress(OSError):  # let go meanwhile
                if now - path.stat().st_mtime > STALE_S:
                    found.append(str(path))
    return Check("jit-locks", not found, ", ".join(found) or "none is left behind", f"rm {' '.join(found)}" if found else "")


def caches(folders: Mapping[str, Path] | None = None, mounts: Path = Path("/proc/mounts")) -> Check:
    """Whether what is compiled is kept on a disk of this machine: on a shared one all machines wait for one lock."""
    folders = compiled() if folders is None else folders
    kinds = {name: file_system(path, mounts) for name, path in folders.items()}
    shared = [name for name, kind in kinds.items() if SHARED_TYPES.search(kind)]
    detail = ", ".join(f"{folders[name]} on {kind or 'an unknown file system'}" for name, kind in kinds.items())
    return Check("jit-caches", not shared, detail, " ".join(f"export {name}=/a/local/disk" for name in shared))


def file_system(path: Path, mounts: Path) -> str:
    """The type of what ``path`` lies on; "" where the system does not say."""
    try:
        fields = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    path = path.expanduser().resolve()
    over = [(len(f[1]), f[2]) for f in fields if len(f) > 2 and path.is_relative_to(f[1].replace("\\040", " "))]
    return max(over, default=(0, ""))[1]


def port(env: Mapping[str, str] = os.environ) -> Check:
    """Whether the port where ranks meet is free; of a rank of a group that has met it is not, and need not be."""
    number = int(env.get("MASTER_PORT") or PORT)
    if distributed.is_initialized():
        return Check("port", True, f"{number}: the ranks have met there")
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", number))
        except OSError as error:
            fix = "give another: MASTER_PORT=N, --master-port N (torchrun), --master_port N (deepspeed)"
            return Check("port", False, f"{number}: {error.strerror}", fix)
    return Check("port", True, f"{number} is free")


def host_name(
    env: Mapping[str, str] = os.environ, name: str | None = None, look: Callable[[str], str] = socket.gethostbyname
) -> Check:
    """Whether this machine's name and MASTER_ADDR resolve, the former to more than itself where ranks meet elsewhere."""
    name, found = name or socket.gethostname(), {}
    for each in filter(None, (name, env.get("MASTER_ADDR"))):
        try:
            found[each] = look(each)
        except OSError as error:
            fix = "add it to /etc/hosts or the DNS, or give an address in its place"
            return Check("hostname", False, f"{each} does not resolve ({error.strerror or error})", fix)
    detail = ", ".join(f"{each} is {address}" for each, address in found.items())
    elsewhere = any(not address.startswith("127.") for each, address in found.items() if each != name)
    if elsewhere and found[name].startswith("127.") and not env.get("GLOO_SOCKET_IFNAME"):
        fix = "export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, the interface between the machines (ip -br addr)"
        return Check("hostname", False, f"{detail}: other machines cannot reach that", fix)
    return Check("hostname", True, detail)


def limits(
    get: Callable[[int], tuple[int, int]] = resource.getrlimit, infiniband: Path = Path("/sys/class/infiniband")
) -> Check:
    """Open files, and where InfiniBand moves the data the memory that may be locked."""
    files, memory = get(resource.RLIMIT_NOFILE)[0], get(resource.RLIMIT_MEMLOCK)[0]
    shown = [("unlimited" if value == resource.RLIM_INFINITY else value) for value in (files, memory)]
    detail, fixes = f"nofile {shown[0]}, memlock {shown[1]}", []
    if 0 <= files < LEAST_FILES:
        fixes.append(f"ulimit -n {LEAST_FILES * 64}")
    if infiniband.is_dir() and any(infiniband.iterdir()) and 0 <= memory < MEMLOCK:
        fixes.append("ulimit -l unlimited (InfiniBand registers memory; under Slurm PropagateResourceLimitsExcept=MEMLOCK)")
    return Check("limits", not fixes, detail, "; ".join(fixes))


def shared_memory(path: str = "/dev/shm", usage: Callable[[str], Any] = shutil.disk_usage) -> Check:
    """What processes of one machine exchange data through; a container has 64 MB of it unless it is told otherwise."""
    try:
        free = usage(path).free
    except OSError:
        return Check("shared-memory", True, f"this system has no {path}")
    detail = f"{free / 2**30:.1f} GiB free in {path}"
    fix = "" if free >= LEAST_SHARED else "docker run --ipc=host or --shm-size=8g; mount -o remount,size=8g /dev/shm"
    return Check("shared-memory", not fix, detail, fix)


def disk(usage: Callable[[Path], Any] = shutil.disk_usage, folder: Path | None = None) -> Check:
    """Room for features, models and runs."""
    places = {"the cache": folder or cache_home(), "this folder": Path.cwd()}
    free = {what: usage(existing(path)).free for what, path in places.items()}
    short = [f"{places[what]}" for what, size in free.items() if size < LEAST_DISK]
    detail = ", ".join(f"{size / 2**30:.1f} GiB free for {what}" for what, size in free.items())
    fix = f"make room in {' and '.join(short)}; MITRAIN_CACHE moves the cache, --runs the run folders"
    return Check("disk", not short, detail, fix * bool(short))


def existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def gpu(cuda: Any = torch.cuda, build: str | None = torch.version.cuda, driver: str | None = None) -> Check:
    """Whether torch sees the GPUs that the driver sees, was built for them, and has NCCL where there are several."""
    listed = nvidia_smi() if driver is None else driver
    cards = [line.strip() for line in listed.splitlines() if line.strip()]
    count = cuda.device_count()
    if cards and not build:
        return Check("gpu", False, f"{cards[0]}, but torch is a build for CPUs", "pip install a CUDA build of torch")
    if cards and not count and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        fix = f"update the driver, or install a torch built for it (this one: CUDA {build})"
        return Check("gpu", False, f"torch sees no GPU; the driver says {cards[0]}", fix)
    names = [f"{cuda.get_device_name(i)} sm_{''.join(map(str, cuda.get_device_capability(i)))}" for i in range(count)]
    made = cuda.get_arch_list()
    unfit = [name for name in names if made and not runs_on(name.rpartition("_")[2], made)]
    if unfit:
        return Check("gpu", False, f"torch holds no code for {unfit[0]} ({' '.join(made)})", "install another torch")
    if count > 1 and not distributed.is_nccl_available():
        return Check("gpu", False, f"{count} GPUs and a torch without NCCL", "install torch's own CUDA build")
    nccl = f", NCCL {'.'.join(map(str, cuda.nccl.version()))}" if count and distributed.is_nccl_available() else ""
    return Check("gpu", True, f"{', '.join(names)}{nccl}" if count else "none")


def runs_on(capability: str, made: Iterable[str]) -> bool:
    """Whether code for the architectures ``made`` runs on a GPU: of its own major version, not newer, or as PTX."""
    number = int(re.sub(r"\D", "", capability))
    for arch in made:
        kind, _, text = arch.partition("_")
        of = int(re.sub(r"\D", "", text) or 0)
        if of <= number and (kind == "compute" or of // 10 == number // 10):
            return True
    return False


def nvidia_smi() -> str:
    """A line for each GPU, with its driver; nothing where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    return ""


def known_faults(faults: Iterable[Mapping[str, Any]]) -> Check:
    """Faults of other packages that were measured here. They are no reason to stop: what they reach is said with them."""
    shown = [f"{fault['what']} {fault['measured']}. {fault['means']}" for fault in faults]
    return Check("known-faults", True, "; ".join(shown) or "none of another package shows here")


CHECKS: tuple[Callable[[], Check], ...] = (
    versions, extras, kernels, locks, caches, port, host_name, limits, shared_memory, disk, gpu,
)  # fmt: skip


def check_all() -> list[Check]:
    return [check() for check in CHECKS]
