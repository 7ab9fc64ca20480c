"""The Dockerfile's steps without a builder: in a bare Debian that debootstrap makes, by chroot. Root alone may do this."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = re.findall(r"^(ARG|ENV|RUN|COPY|WORKDIR|ENTRYPOINT|CMD|FROM) (.*)$", (ROOT / "Dockerfile").read_text(), re.M)
SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NOT_COPIED = (".*", "runs", "build", "__pycache__", "*.egg-info")
MOUNTS = "mount -t proc proc {0}/proc && mount -t sysfs sysfs {0}/sys && mount -t tmpfs tmpfs {0}/dev/shm"


def missing() -> str | None:
    """What this machine lacks for ``build``, in words."""
    if os.geteuid():
        return "chroot needs root"
    lacking = [tool for tool in ("debootstrap", "unshare", "chroot") if shutil.which(tool) is None]
    return f"there is no {lacking[0]}" if lacking else None


def given(root: Path) -> dict[str, str]:
    """How this machine reaches package registries (pip's and uv's variables), its files and folders copied into ``root``."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "SSL_CERT_FILE"))}
    for name, value in kept.items():
        if value.startswith("/") and (path := Path(value)).exists():
            inside = root / "srv" / name
            if not inside.exists():
                (shutil.copytree if path.is_dir() else shutil.copy)(path, inside)
            kept[name] = f"/srv/{name}"
    return kept


def run(root: Path, line: str, environment: dict[str, str]) -> str:
    """What a line of shell prints inside ``root``; its mounts go with it."""
    place = shlex.quote(str(root))
    outside = f"{MOUNTS.format(place)} && exec chroot {place} bash -euc {shlex.quote(line)}"
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", outside]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{line[:80]}: exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def build(root: Path, suite: str = "bookworm") -> dict[str, str]:
    """Make a bare system in ``root``, unless one is there, and run the Dockerfile's steps in it; the image's environment."""
    if not (root / "etc" / "debian_version").exists():
        subprocess.run(["debootstrap", "--variant=minbase", suite, str(root)], check=True, capture_output=True)
    environment = {"PATH": SYSTEM, "HOME": "/root"}
    for step, value in STEPS:
        name, _, default = value.partition("=")
        if step == "ARG":
            environment[name] = default.strip('"')
        elif step == "ENV":
            environment[name] = default.replace("${PATH}", environment["PATH"])
        elif step == "COPY":
            source, target = value.split()
            left_out = shutil.ignore_patterns(*NOT_COPIED)
            shutil.copytree(ROOT / source, root / target[1:], ignore=left_out, symlinks=True, dirs_exist_ok=True)
        elif step == "RUN":
            run(root, value, environment | given(root))
    return environment
