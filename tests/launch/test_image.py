"""The image: its steps run without a builder. The conda environment names extras that there are."""

import os
import re
import shutil
import subprocess
import tomllib

import pytest
import yaml
from source_tree import ROOT

STEPS = re.findall(r"^(ARG|ENV|RUN|COPY|WORKDIR|ENTRYPOINT|CMD|FROM) (.*)$", (ROOT / "Dockerfile").read_text(), re.M)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_image_and_the_environment_ask_for_extras_that_there_are():
    (extras,) = (value for step, value in STEPS if step == "ARG" and value.startswith("EXTRAS="))
    assert set(extras.partition("=")[2].strip('"').split()) <= set(EXTRAS)
    wanted = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (line,) = wanted[-1]["pip"]
    assert set(re.search(r"\.\[(.*)\]", line)[1].split(",")) <= set(EXTRAS)


@pytest.mark.slow
def test_the_steps_of_the_image_run_in_an_empty_folder(tmp_path):
    """Without a builder: the RUN lines with the image's folder elsewhere, as nothing but the system and a network; what
    installs Debian's packages is left to the system that runs this."""
    image = tmp_path / "opt" / "mitrain"
    shutil.copytree(ROOT, image, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info"), symlinks=True)
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "HTTP", "UV_"))}
    environment = {**kept, "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    ran = []
    for step, value in STEPS:
        here = value.replace("/opt/mitrain", str(image))
        if step == "ARG":
            name, _, given = here.partition("=")
            environment.setdefault(name, given.strip('"'))
        elif step == "ENV":
            name, _, given = here.partition("=")
            environment[name] = given.replace("${PATH}", environment["PATH"])
        elif step == "RUN" and not here.startswith("apt-get"):
            done = subprocess.run(["bash", "-c", here], cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            ran.append(here)
    assert len(ran) == 1
    for words in (["--version"], ["config", "quickstart"], ["doctor", "--json"]):
        done = subprocess.run(["mitrain", *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode in ((0, 1) if words[0] == "doctor" else (0,)), done.stderr[-2000:]
