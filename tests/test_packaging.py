"""The wheel: both import packages and nothing else, usable outside the clone and beside the PyPI package `kernels`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "mitrain", "kernels", "configs", "launch")


def run(*command: str | Path, paths: tuple[Path, ...] = (), cwd: Path) -> str:
    """The command's output, run in ``cwd`` with ``paths`` first on sys.path; fails with what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str, paths: tuple[Path, ...], cwd: Path) -> str:
    return run(sys.executable, "-c", code, paths=paths, cwd=cwd).strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network from a copy of the sources, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("build")
    clone = folder / "a clone"
    clone.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, clone / name)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, clone, cwd=folder)
    (built,) = folder.glob("mitrain-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A folder that holds somebody else's package named kernels."""
    package = tmp_path / "stranger" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("WHOSE = 'theirs'\n")
    return package.parent


def test_wheel_holds_both_packages_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("mitrain/**/*.py")}
    modules |= {path.relative_to(ROOT / "kernels").as_posix() for path in ROOT.glob("kernels/mitrain_kernels/**/*.py")}
    assert modules - names == set(), "left out of the wheel: does their folder lack an __init__.py?"
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"mitrain", "mitrain_kernels"}


def test_the_wheel_carries_the_configurations_by_their_names(wheel: Path, installed: Path, tmp_path: Path):
    ours = {f"mitrain/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(ours) > 40 and ours - set(zipfile.ZipFile(wheel).namelist()) == set()
    shown = run(installed / "bin" / "mitrain", "config", paths=(installed,), cwd=tmp_path)
    assert "quickstart " in shown and "reference/mit" in shown


def test_wheel_carries_its_licence_and_notice(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith(".dist-info/licenses/NOTICE") for name in names)


def test_installed_command_runs_outside_the_clone(installed: Path, tmp_path: Path):
    for package in ("mitrain", "mitrain_kernels"):
        origin = python(f"import importlib.util as u; print(u.find_spec({package!r}).origin)", (installed,), tmp_path)
        assert origin == str(installed / package / "__init__.py")
    printed = run(installed / "bin" / "mitrain", "--help", paths=(installed,), cwd=tmp_path)
    assert "train" in printed
    assert "predict" in printed


@pytest.mark.parametrize("words", [[], ["parity"], ["ledger", "--quick", "--json"]])
def test_the_wheel_says_where_the_benchmarks_are(installed: Path, tmp_path: Path, words: list[str]):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [installed / "bin" / "mitrain", "bench", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert "in the folder benchmarks/ of mitrain's repository" in done.stderr and "from a clone" in done.stderr


@pytest.mark.parametrize("ours", ["installed", "checkout"])
@pytest.mark.parametrize("theirs_first", [True, False])
def test_a_package_named_kernels_stays_theirs(installed: Path, stranger: Path, ours: str, theirs_first: bool):
    places = (installed,) if ours == "installed" else (ROOT, ROOT / "kernels")
    paths = (stranger, *places) if theirs_first else (*places, stranger)
    code = (
        "from importlib.util import find_spec; import kernels, mitrain_kernels;"
        "print(kernels.WHOSE, mitrain_kernels.__file__, find_spec('mitrain').origin, sep='\\n')"
    )
    whose, kernel_file, mitrain_file = python(code, paths, stranger).splitlines()
    assert whose == "theirs"
    assert Path(kernel_file).is_relative_to(places[-1])
    assert Path(mitrain_file).is_relative_to(places[0])


def test_transformers_imports_with_the_checkout_first(tmp_path: Path):
    code = "import sys; from transformers import LlamaForCausalLM as llama; print(llama.__name__, sys.path[1])"
    assert python(code, (ROOT, ROOT / "kernels"), tmp_path) == f"LlamaForCausalLM {ROOT}"
