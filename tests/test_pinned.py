"""pyproject.toml asks for what is imported and no more; launch/constraints.txt pins it: exactly, portably, by its hashes."""

import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import requires

import pytest
import torch
from packaging.requirements import Requirement
from source_tree import ROOT, imports, our_files

from mitrain.core.errors import UserError
from mitrain.core.version import TORCH, require_torch

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {
    "av",
    "deepspeed",
    "flash-attn",
    "bitsandbytes",
    "datasets",
    "matplotlib",
    "peft",
    "pyarrow",
    "pycocotools",
    "python-multipart",
    "shtab",
    "soundfile",
    "soxr",
    "starlette",
    "tensorboard",
    "triton",
    "uvicorn",
    "wandb",
}
BESIDE = {"mlflow", "trackio"}
"""Used where the user has installed them: as extras they would hold pyarrow and Pillow at older versions."""
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "google": "protobuf"}
DISTRIBUTION |= {"pydantic_core": "pydantic", "huggingface_hub": "huggingface-hub"}
OF_TRANSFORMERS = {"huggingface-hub", "numpy", "packaging", "pyyaml", "safetensors", "tokenizers", "tqdm"}
"""What transformers itself needs, whatever is done with it."""
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def entries(name: str) -> list[tuple[str, list[str]]]:
    """What a file in launch/ asks for: the requirements, each with the options that follow it."""
    text = (ROOT / "launch" / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" --")[0], re.findall(r"--\S+", line)) for line in lines]


def pins(name: str = "constraints.txt") -> dict[str, list[Requirement]]:
    """Normalised name → its pins (several where they depend on the Python or the platform)."""
    found = defaultdict(list)
    for text, _ in entries(name):
        pin = Requirement(text)
        found[normal(pin.name)].append(pin)
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted() -> list[Requirement]:
    extras = (text for texts in PROJECT["optional-dependencies"].values() for text in texts)
    requirements = (Requirement(text) for text in (*PROJECT["dependencies"], *extras))
    return [requirement for requirement in requirements if requirement.name != "mitrain"]


def distributions(files: Mapping[str, str]) -> set[str]:
    """Whose packages the files import, but for the standard library and ourselves."""
    names = {name.split(".")[0] for path, source in files.items() for _, name in imports(path, source)}
    local = {path.stem for path in ROOT.glob("tests/**/*.py")}
    foreign = (
        names - set(sys.stdlib_module_names) - {"mitrain", "mitrain_kernels", "mitrain_demo", "bench", "benchmarks"} - local
    )
    return {normal(DISTRIBUTION.get(name, name)) for name in foreign}


def names_of(requirements: list[str]) -> set[str]:
    return {normal(Requirement(text).name) for text in requirements}


def test_the_dependencies_are_what_is_imported():
    imported = distributions(our_files()) - OPTIONAL - OF_TRANSFORMERS - BESIDE
    declared = names_of(PROJECT["dependencies"])
    assert imported - declared == set(), "imported and not declared"
    assert declared - imported == set(), "declared and not imported"


def test_what_the_tests_import_is_declared():
    files = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob("tests/**/*.py")}
    found = distributions(files) - {
        "kernels",
        "playwright",
    }  # a stand-in of a test's own; what drives a browser, where it is there
    assert found - declared("demo", "dev") == set(), "imported by a test and not in the extra [dev]"


def test_what_lies_beside_the_package_asks_for_what_it_imports():
    demo = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob("examples/demo/**/*.py")}
    assert distributions(demo) - declared("demo") == set(), "imported by examples/demo and not in the extra [demo]"
    benchmarks = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob("benchmarks/**/*.py")}
    assert distributions(benchmarks) - declared("dev") == set(), "imported by a benchmark and not in the extra [dev]"


def declared(*extras: str) -> set[str]:
    """What may be imported where these extras are installed."""
    of_extras = (PROJECT["optional-dependencies"][extra] for extra in extras)
    return names_of(PROJECT["dependencies"]).union(OF_TRANSFORMERS, OPTIONAL, *map(names_of, of_extras))


def test_transformers_needs_what_is_left_to_it():
    needed = {normal(Requirement(text).name) for text in requires("transformers")}
    assert needed >= OF_TRANSFORMERS


@pytest.mark.parametrize("requirement", wanted(), ids=lambda requirement: normal(requirement.name))
def test_every_dependency_is_pinned_within_its_range(requirement: Requirement):
    found = pins()[normal(requirement.name)]
    assert found, f"{requirement.name} has no pin: compile launch/constraints.txt again (its head says how)"
    for pin in found:
        (version,) = (specifier.version for specifier in pin.specifier)
        assert requirement.specifier.contains(version)


def test_pins_are_exact_and_portable():
    for pin in (pin for several in pins().values() for pin in several):
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert "+" not in specifier.version, f"{pin}: a local build"
        assert pin.url is None
        assert not pin.extras
    assert "://" not in (ROOT / "launch" / "constraints.txt").read_text()


@pytest.mark.parametrize("name", ["constraints.txt", "torch-cpu.txt", "uv.txt"])
def test_every_pin_has_hashes_and_no_other_option(name: str):
    found = entries(name)
    assert found
    for text, options in found:
        assert options and all(HASH.fullmatch(option) for option in options), text
        assert len(set(options)) == len(options), text


def test_the_cpu_build_of_torch_is_the_pinned_version():
    (cpu,), (pinned,) = pins("torch-cpu.txt")["torch"], pins()["torch"]
    assert str(cpu.specifier) == f"{pinned.specifier}+cpu"


def test_nothing_is_installed_without_its_hash_or_from_the_best_of_several_indexes():
    text = (ROOT / "launch" / "setup.sh").read_text().replace("\\\n", " ")
    installs = [line for line in text.splitlines() if re.search(r"uv_install |pip install |local cpu=", line)]
    checked = [line for line in installs if re.search(r"--require-hashes|cpu\[@\]|uv_install\(\)|ours\[@\]", line)]
    assert len(installs) >= 5 and installs == checked
    assert not re.search(r"extra-index-url\)|unsafe|--index ", text)


def test_extras_refer_to_extras_that_exist():
    extras = PROJECT["optional-dependencies"]
    texts = [text for several in extras.values() for text in several]
    ours = [Requirement(text) for text in texts if Requirement(text).name == "mitrain"]
    assert ours
    assert set().union(*(requirement.extras for requirement in ours)) <= set(extras)


@pytest.mark.parametrize("version", ["2.8.0+cu128", "2.12.1", "1.13.1"])
def test_a_torch_older_than_asked_for_is_refused_before_anything_is_computed(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.delitem(sys.modules, "mitrain.core.dist")
    with pytest.raises(UserError) as caught:
        import_module("mitrain.core.dist")
    assert str(caught.value) == f"torch {version} gives wrong numbers here and says nothing: pip install -U 'torch>=2.13'"


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0a0+nv26.05", "2.14.1+cpu", "3.0.0"])
def test_a_torch_that_pyproject_asks_for_is_taken(version):
    require_torch(version)
    (asked,) = (text for text in PROJECT["dependencies"] if normal(Requirement(text).name) == "torch")
    assert asked == f"torch>={'.'.join(map(str, TORCH))}"
