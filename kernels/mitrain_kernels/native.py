"""C files of this package, compiled at first use with the machine's own compiler and kept in the user's cache.

Nothing is built at installation and nobody needs a compiler: whatever fails, ``load`` says so in one logged line and
returns None, and the callers' torch path serves. ``MITRAIN_KERNELS_NATIVE=0`` asks for that.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)
SWITCH = "MITRAIN_KERNELS_NATIVE"
COMPILERS = ("cc", "gcc", "clang")
# Sums may be taken in any order, which vector units need; NaN and infinity keep their meaning.
FLAGS = (
    "-O3", "-march=native", "-std=c99", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-fPIC", "-shared",
)  # fmt: skip
SECONDS = 120
CHECKSUM = hashlib.sha256().digest_size


class NativeError(Exception):
    """Why there is no compiled library."""


class UntrustedError(NativeError):
    """What another user could have written is not run."""


@cache
def load(source: Path) -> ctypes.CDLL | None:
    """The library of a C file that has ``use_pool`` and ``use_gemm``; None, now and later, where it cannot be had."""
    try:
        library = open_library(source)
    except UntrustedError as error:
        log.warning("%s is not used, torch does its work: %s", source.name, error)
        return None
    except (NativeError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.info("%s is not used, torch does its work: %s", source.name, " ".join(str(error).split()))
        return None
    for use, found in ((library.use_pool, torch_pool()), (library.use_gemm, torch_gemm())):
        use.argtypes = [ctypes.c_void_p]
        use(None if found is None else ctypes.cast(found, ctypes.c_void_p))
    return library


def open_library(source: Path) -> ctypes.CDLL:
    if os.environ.get(SWITCH) == "0":
        raise NativeError(f"{SWITCH}=0")
    if os.name != "posix" or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise NativeError("it is written for 64-bit POSIX systems")
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NativeError(f"no compiler: none of {', '.join(COMPILERS)} is on the path")
    folder = cache_folder()
    for one in (*reversed(folder.parents), folder):  # not parents=True, which leaves their mode to the umask
        one.mkdir(mode=0o700, exist_ok=True)
    check_own(folder)
    built = folder / f"{source.stem}-{identity(source, compiler)}.so"
    if not is_whole(built):
        build(source, compiler, built)
    check_own(built)
    return ctypes.CDLL(str(built))


def check_own(path: Path) -> None:
    """UntrustedError where anyone but this user and root can change a file or folder, or put another in its place."""
    about, around = path.lstat(), path.parent.stat()
    if stat.S_ISLNK(about.st_mode):
        raise UntrustedError(f"{path} is a link, and leads to what others may change: remove it")
    for one, found, shared in ((path, about, 0), (path.parent, around, stat.S_ISVTX)):
        if found.st_uid not in (0, os.geteuid()):
            raise UntrustedError(f"{one} belongs to user {found.st_uid}, who could have put any code there: remove it")
        if found.st_mode & 0o022 and not found.st_mode & shared:
            raise UntrustedError(f"{one} can be written by other users: chmod go-w, or set XDG_CACHE_HOME elsewhere")


def cache_folder() -> Path:
    usual = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "mitrain_kernels"


def identity(source: Path, compiler: str) -> str:
    """What the machine code depends on, hashed: a home may be shared by machines that differ."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS, check=True).stdout
    headers = (header.read_bytes() for header in sorted(source.parent.glob("*.h")))
    parts = (source.read_bytes(), *headers, " ".join(FLAGS).encode(), compiler.encode(), version, processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def processor() -> str:
    """What of the processor -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    told = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    told = {name.strip(): value for name, value in told.items()}
    return f"{sys.platform} {platform.machine()} {platform.processor()} {[told.get(name) for name in names]}"


def build(source: Path, compiler: str, target: Path) -> None:
    """Compile into a folder of one's own, then rename: processes that do so at once don't meet, a killed one harms none.

    A checksum goes behind the machine code, where no loader looks: opening half a library would end the process.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        made = Path(folder) / "made.so"
        command = [compiler, *FLAGS, str(source), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode != 0:
            raise NativeError(f"{compiler} failed: {done.stderr.strip()[:200]}")
        code = made.read_bytes()
        made.write_bytes(code + hashlib.sha256(code).digest())
        made.chmod(0o700)
        made.replace(target)


def is_whole(library: Path) -> bool:
    if not library.is_file():
        return False
    content = library.read_bytes()
    return hashlib.sha256(content[:-CHECKSUM]).digest() == content[-CHECKSUM:]


def torch_gemm() -> "ctypes._CFuncPtr | None":
    """sgemm of the BLAS that torch computes with; None where torch does not show it.

    Integers are handed over as 64 bits: a BLAS with integers of 32 reads the lower half, which comes first.
    """
    return getattr(ctypes.CDLL(torch._C.__file__), "sgemm_", None) if sys.byteorder == "little" else None


def torch_pool() -> "ctypes._CFuncPtr | None":
    """The OpenMP entry point of the threads that torch computes with; None where torch brings no GNU-compatible one.

    Looked up among the libraries that torch is linked to, so that no second pool is started.
    """
    return getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
