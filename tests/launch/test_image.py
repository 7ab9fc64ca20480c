"""The image: its steps run in a bare Debian, without a builder. The conda environment is what pyproject.toml asks for."""

import re
import tomllib

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from source_tree import ROOT

from benchmarks import bare_system

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def extras_of_the_image() -> set[str]:
    (extras,) = (value for step, value in bare_system.STEPS if step == "ARG" and value.startswith("EXTRAS="))
    return set(extras.partition("=")[2].strip('"').split())


def test_the_conda_environment_is_mitrain_with_the_extras_of_the_image():
    """Of its own it asks only for Python and pip: every other package is pyproject.toml's, from the same index as pip's."""
    wanted = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert (wanted["channels"], wanted["name"]) == (["conda-forge"], "mitrain")
    python, pip, rest = wanted["dependencies"]
    asked, ours = SpecifierSet(python.removeprefix("python ")), SpecifierSet(PROJECT["requires-python"])
    assert pip == "pip" and all(version in asked and version in ours for version in ("3.11.0", "3.12.1", "3.13.9"))
    assert "3.10.14" not in asked and "3.14.0" not in asked
    (line,) = rest["pip"]
    assert set(re.fullmatch(r"--editable \.\[(.*)\]", line)[1].split(",")) == extras_of_the_image() <= set(EXTRAS)


@pytest.mark.slow
@pytest.mark.skipif(bare_system.missing() is not None, reason=f"{bare_system.missing()}")
def test_the_steps_of_the_image_run_in_a_bare_system(tmp_path):
    image = bare_system.build(tmp_path)
    assert bare_system.run(tmp_path, "mitrain --version", image).startswith("mitrain ")
    assert "smollm2" in bare_system.run(tmp_path, "mitrain config quickstart", image)
    (doctor,) = re.findall(r"installed: ([a-z ]*);", bare_system.run(tmp_path, "mitrain doctor || true", image))
    assert set(doctor.split()) >= extras_of_the_image()
