"""core/prepared.py: what every recipe's preparation has in common, on a toy recipe."""

import errno
import json
import os
import re
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from mitrain_demo import DATASETS, MODELS

from mitrain.core import prepared
from mitrain.core.errors import PrepareError
from mitrain.core.files import sha256_file
from mitrain.core.prepared import Recipe, ensure_data, ensure_model


class Toy:
    """A model recipe whose archive is one text file and whose build copies it; counts its fetches and builds."""

    def __init__(self, folder: Path):
        self.archive = folder / "toy.zip"
        self.archive.write_text("first")
        self.fetches = self.builds = 0
        self.during: Callable[[Path], None] = lambda target: None  # run in the middle of a build

    def fetch(self, folder: Path) -> list[Path]:
        self.fetches += 1
        return [self.archive]

    def build(self, archives: list[Path], target: Path, seed: int) -> None:
        self.builds += 1
        assert list(target.iterdir()) == []
        (target / "half").write_text("done")
        self.during(target)
        (target / "model").write_text(f"{archives[0].read_text()} {seed}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toy(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy(tmp_path)
    module = types.ModuleType("toy_builds")
    module.build = toy.build
    monkeypatch.setitem(sys.modules, "toy_builds", module)
    recipe = Recipe("toy", "a toy", "CC0-1.0", "nowhere", 1, "toy_builds:build", toy.fetch, notes="mind the paint")
    monkeypatch.setitem(MODELS, "toy", recipe)
    monkeypatch.setitem(DATASETS, "toy", recipe)
    return toy


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".held"))


def test_prepared_once_with_provenance(toy: Toy, cache: Path, capsys: pytest.CaptureFixture):
    folder = ensure_model("toy")
    assert folder == ensure_model("toy") == cache / "models" / "toy"
    assert (toy.fetches, toy.builds) == (1, 1)
    assert visible(folder) == ["half", "model", "provenance.json"]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["archives"] == [{"file": "toy.zip", "sha256": sha256_file(toy.archive)}]
    assert provenance["licence"] == "CC0-1.0" and provenance["notes"] == "mind the paint" and provenance["seed"] == 0
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "CC0-1.0" in err


@pytest.mark.parametrize("ensure", [ensure_model, ensure_data])
@pytest.mark.parametrize("damage", [lambda p: flip(p), lambda p: p.unlink(), lambda p: p.write_text("")])
def test_what_is_damaged_afterwards_is_named_and_made_again_when_asked(toy: Toy, ensure, damage):
    folder = ensure("toy")
    damage(folder / "half")
    prepared.compared.cache_clear()  # another process
    with pytest.raises(PrepareError, match=r"toy.*/half is damaged .* with mitrain (models|data) prepare toy$"):
        ensure("toy")
    assert toy.builds == 1 and ensure("toy", repair=True) == folder
    assert toy.builds == 2 and (folder / "half").read_text() == "done"
    assert ensure("toy", repair=True) == folder == ensure("toy") and toy.builds == 2


def flip(path: Path) -> None:
    """A bit that turns over on the disk: size and time stay."""
    before = path.stat()
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_bit_that_turned_over_before_this_process_is_noticed_though_size_and_time_stay(toy: Toy):
    folder = ensure_model("toy")
    flip(folder / "model")
    prepared.compared.cache_clear()  # another process
    with pytest.raises(PrepareError, match="/model is damaged"):
        ensure_model("toy")


def test_pictures_and_files_that_were_added_do_not_count_nor_folders_of_earlier_versions(toy: Toy):
    toy.during = lambda target: (target / "a.png").write_text("picture")
    folder = ensure_data("toy")
    (folder / "a.png").write_text("another")
    (folder / "notes").write_text("mine")
    assert ensure_data("toy") == folder
    made = json.loads((folder / "provenance.json").read_text())
    del made["files"]
    (folder / "provenance.json").write_text(json.dumps(made))
    (folder / "half").write_text("anything")
    assert ensure_data("toy") == folder and toy.builds == 1


def test_data_folders_carry_version_and_seed(toy: Toy, cache: Path):
    assert ensure_data("toy", seed=3) == cache / "data" / "toy-1-seed3"
    assert (ensure_data("toy", seed=3) / "model").read_text() == "first 3"
    assert (ensure_data("toy") / "model").read_text() == "first 0"
    assert toy.builds == 2


@pytest.mark.parametrize("failure", [ValueError("bug"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing(toy: Toy, cache: Path, failure: BaseException):
    def fail(target: Path) -> None:
        raise failure

    toy.during = fail
    with pytest.raises(type(failure)):
        ensure_model("toy")
    assert visible(cache / "models") == []
    toy.during = lambda target: None
    assert (ensure_model("toy") / "model").read_text() == "first 0"


def test_a_full_disk_is_reported_in_one_line(toy: Toy, cache: Path):
    def full(target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    toy.during = full
    with pytest.raises(PrepareError, match=r"cannot prepare toy in .*No space left.*MITRAIN_CACHE"):
        ensure_model("toy")
    assert visible(cache / "models") == []


def test_what_a_killed_process_left_is_removed(toy: Toy, cache: Path):
    torn = cache / "models" / ".toy.k1ll3d"
    other = cache / "models" / ".toyota.live"
    for folder in (torn, other):
        folder.mkdir(parents=True)
        (folder / "half").write_text("…")
    ensure_model("toy")
    assert visible(cache / "models") == [".toyota.live", "toy"]


def test_four_at_once_build_once(toy: Toy):
    started = threading.Event()
    toy.during = lambda target: started.wait(0.2)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(ensure_model, ["toy"] * 4))
    assert len(folders) == 1 and toy.builds == 1


def test_a_newer_recipe_makes_it_again(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    ensure_model("toy")
    monkeypatch.setitem(MODELS, "toy", replace(MODELS["toy"], version=2))
    ensure_model("toy")
    assert toy.builds == 2


@pytest.mark.parametrize("torn", ["", "[]", "{}", '{"recipe_version": 1, "archives": [1]}'])
def test_a_torn_provenance_makes_it_again(toy: Toy, torn: str):
    (ensure_model("toy") / "provenance.json").write_text(torn)
    ensure_model("toy")
    assert toy.builds == 2


def test_the_users_own_archive(toy: Toy, tmp_path: Path):
    own = tmp_path / "own.zip"
    own.write_text("second")
    assert (ensure_model("toy", own) / "model").read_text() == "second 0"
    ensure_model("toy", own)
    ensure_model("toy")
    assert (toy.fetches, toy.builds) == (0, 1)
    ensure_model("toy", toy.archive)
    assert (ensure_model("toy") / "model").read_text() == "first 0"


def test_archives_that_cannot_be_taken(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(PrepareError, match=r"no archive '.*gone.zip': give the file of nowhere"):
        ensure_model("toy", tmp_path / "gone.zip")
    with pytest.raises(PrepareError, match="no archive"):
        ensure_model("toy", tmp_path)
    monkeypatch.setitem(MODELS, "toy", replace(MODELS["toy"], sha256="0" * 64))
    with pytest.raises(PrepareError, match=f"is not nowhere .its sha256 is not {'0' * 64}"):
        ensure_model("toy", toy.archive)
    with pytest.raises(PrepareError, match="leave --archive out"):
        ensure_data("digits", toy.archive)
    assert toy.builds == 0


def test_unknown_names_get_the_nearest(cache: Path):
    with pytest.raises(PrepareError, match=r"no model 'dinov2' to prepare .did you mean 'dinov2-vits14'.*smollm2"):
        ensure_model("dinov2")
    with pytest.raises(PrepareError, match=r"no data set 'tuxpain' to prepare .did you mean 'tuxpaint'"):
        ensure_data("tuxpain")


@pytest.mark.parametrize("recipe", [*MODELS.values(), *DATASETS.values()], ids=lambda recipe: recipe.name)
def test_every_recipe_says_all_and_its_build_exists(recipe: Recipe):
    assert recipe.summary and recipe.licence and recipe.package
    assert callable(recipe.builder())
    one_wheel = recipe.package.startswith("PyPI") and "," not in recipe.package  # several have theirs in `fetch`
    assert re.fullmatch(r"[0-9a-f]{64}", recipe.sha256) or not one_wheel
    assert (recipe.fetch is prepared.no_archives) == (recipe.size_mb == 0)


def test_where_no_recipes_are_installed_the_message_says_where_they_are(monkeypatch):
    monkeypatch.setattr(prepared, "entry_points", lambda **asked: ())
    with pytest.raises(PrepareError, match=r"no model 'toy' to prepare: .*pip install ./examples/demo"):
        ensure_model("toy")


def test_recipes_of_several_packages_stand_beside_one_another(monkeypatch):
    class Point:
        def __init__(self, name: str):
            self.name = name

        def load(self) -> dict[str, str]:
            return {self.name: f"recipe of {self.name}"}

    asked = []
    monkeypatch.setattr(prepared, "entry_points", lambda **what: asked.append(what) or (Point("one"), Point("two")))
    assert prepared.recipes("data") == {"one": "recipe of one", "two": "recipe of two"}
    assert asked == [{"group": "mitrain.recipes", "name": "data"}]
