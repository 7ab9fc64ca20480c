"""prepare/packages.py against stand-ins for pip and apt-get: real subprocesses, no network."""

import hashlib
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mitrain_demo import packages
from mitrain_demo.packages import debian_package, npm_package, pypi_wheel, unpack_one

from mitrain.core.errors import PrepareError

CONTENT = b"a wheel, more or less"
SHA = hashlib.sha256(CONTENT).hexdigest()
WHEEL = "some_model-1.0-py3-none-any.whl"


class Client:
    """An executable that notes each call and runs what it is told to play in the folder it was called in."""

    def __init__(self, path: Path):
        self.path = path
        self.log = path.parent / "calls.log"

    def plays(self, body: str) -> None:
        self.path.write_text(f'#!/bin/sh\necho "$@" >> {self.log}\n{body}\n')
        self.path.chmod(0o755)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    (tmp_path / "python").mkdir()
    client = Client(tmp_path / "python" / "python")
    monkeypatch.setattr(sys, "executable", str(client.path))
    return client


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    (tmp_path / "bin").mkdir()
    client = Client(tmp_path / "bin" / "apt-get")
    monkeypatch.setenv("PATH", f"{client.path.parent}{os.pathsep}{os.environ['PATH']}")
    return client


def brings(name: str, content: bytes = CONTENT) -> str:
    return f"printf '%s' '{content.decode()}' > {name}"


def wheel(folder: Path, sha256: str = SHA) -> Path:
    return pypi_wheel("some-model", "1.0", sha256, folder)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".held")


def message(caught: pytest.ExceptionInfo) -> str:
    """The error's text, which must be one line that says how to go on without the client."""
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith("or download it elsewhere and give --archive FILE")
    return text


def test_pip_is_asked_for_a_source_package_where_that_is_meant(pip: Client, tmp_path: Path):
    pip.plays(brings("some_model-1.0.tar.gz"))
    path = pypi_wheel("some-model", "1.0", SHA, tmp_path / "archives", source=True)
    assert path.name == "some_model-1.0.tar.gz" and path.read_bytes() == CONTENT
    assert "download --no-deps --no-binary=:all: some-model==1.0" in pip.calls()[0]


def test_pip_is_asked_for_one_exact_wheel_and_nothing_else(pip: Client, tmp_path: Path):
    pip.plays(brings(WHEEL))
    path = wheel(tmp_path / "archives")
    assert path == tmp_path / "archives" / WHEEL
    assert path.read_bytes() == CONTENT
    (call,) = pip.calls()
    assert call.startswith("-m pip ")
    assert call.endswith(" download --no-deps --only-binary=:all: some-model==1.0")


def test_a_kept_wheel_is_not_brought_again(pip: Client, tmp_path: Path):
    pip.plays(brings(WHEEL))
    assert wheel(tmp_path) == wheel(tmp_path)
    assert len(pip.calls()) == 1


def test_a_damaged_kept_wheel_is_replaced(pip: Client, tmp_path: Path):
    pip.plays(brings(WHEEL))
    (tmp_path / WHEEL).write_bytes(b"torn")
    assert wheel(tmp_path).read_bytes() == CONTENT
    assert len(pip.calls()) == 1


def test_a_wheel_with_another_hash_is_refused_and_not_kept(pip: Client, tmp_path: Path):
    pip.plays(brings(WHEEL, b"tampered"))
    with pytest.raises(PrepareError) as caught:
        wheel(tmp_path / "archives")
    text = message(caught)
    assert hashlib.sha256(b"tampered").hexdigest() in text and SHA in text and WHEEL in text
    assert kept(tmp_path / "archives") == []


@pytest.mark.parametrize(
    ("stderr", "shown"),
    [
        ("WARNING: Retrying\nERROR: Could not find it\nERROR: No matching distribution", "(ERROR: Could not find it)"),
        ("/usr/bin/python: No module named pip", "No module named pip"),
        ("", "exit code 1"),
        (
            'ERROR: Exception:\nTraceback (most recent call last):\n  File "x.py"\nOSError: [Errno 28] No space left',
            "(OSError: [Errno 28] No space left)",
        ),
    ],
)
def test_what_pip_complains_of_is_reported(pip: Client, tmp_path: Path, stderr: str, shown: str):
    pip.plays(f"echo something on stdout; printf '%s\n' '{stderr}' >&2; exit 1")
    with pytest.raises(PrepareError) as caught:
        wheel(tmp_path / "archives")
    text = message(caught)
    assert "some-model 1.0" in text and shown in text and "something on stdout" not in text
    assert kept(tmp_path / "archives") == []


def test_a_client_that_cannot_be_started(pip: Client, tmp_path: Path):
    with pytest.raises(PrepareError, match="No such file"):
        wheel(tmp_path / "archives")


def test_a_client_that_brings_nothing(pip: Client, tmp_path: Path):
    pip.plays("exit 0")
    with pytest.raises(PrepareError) as caught:
        wheel(tmp_path / "archives")
    assert "0 files 'some_model-1.0-*.whl'" in message(caught)


def test_four_at_once_download_once(pip: Client, tmp_path: Path):
    pip.plays(f"sleep 0.2; {brings(WHEEL)}")
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(wheel, [tmp_path / "archives"] * 4))
    assert paths == [tmp_path / "archives" / WHEEL] * 4
    assert len(pip.calls()) == 1


def test_stdout_stays_ours(pip: Client, tmp_path: Path, capfd: pytest.CaptureFixture):
    pip.plays(f"echo 10%; {brings(WHEEL)}")
    wheel(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_the_terminal(pip: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pip.plays(f"echo 10%; {brings(WHEEL)}")
    master, slave = os.openpty()
    os.set_blocking(master, False)  # nothing to read shall fail, not wait
    with open(slave, "w") as terminal, open(master, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        wheel(tmp_path)
        monkeypatch.undo()
        assert (screen.read(100) or b"").split() == [b"10%"]


def test_apt_get_brings_whatever_version_it_knows(apt: Client, tmp_path: Path):
    apt.plays(brings("stamps_3.0-1_all.deb"))
    assert debian_package("stamps", tmp_path) == debian_package("stamps", tmp_path) == tmp_path / "stamps_3.0-1_all.deb"
    assert apt.calls() == ["download -o APT::Sandbox::User=root stamps"]


def test_a_known_version_must_have_its_known_hash(apt: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = "stamps_2.0-1_all.deb"
    monkeypatch.setitem(packages.KNOWN_DEBIAN, name, SHA)
    apt.plays(brings(name, b"tampered"))
    with pytest.raises(PrepareError, match=f"instead of {SHA}"):
        debian_package("stamps", tmp_path / "archives")
    apt.plays(brings(name))
    assert debian_package("stamps", tmp_path / "archives").read_bytes() == CONTENT


def test_apt_with_empty_lists(apt: Client, tmp_path: Path):
    apt.plays("echo 'W: something' >&2; echo 'E: Unable to locate package stamps' >&2; exit 100")
    with pytest.raises(PrepareError) as caught:
        debian_package("stamps", tmp_path)
    text = message(caught)
    assert "Unable to locate package stamps" in text and "apt-get update" in text and "W:" not in text


def test_npm_names_the_archive_of_a_package_with_a_scope_without_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bin").mkdir()
    npm = Client(tmp_path / "bin" / "npm")
    npm.plays(brings("food-pictures-1.0.tgz"))
    monkeypatch.setenv("PATH", f"{npm.path.parent}{os.pathsep}{os.environ['PATH']}")
    archives = [npm_package("@food/pictures", "1.0", SHA, tmp_path / "archives") for _ in range(2)]
    assert archives == [tmp_path / "archives" / "food-pictures-1.0.tgz"] * 2
    assert npm.calls() == ["pack --ignore-scripts --silent @food/pictures@1.0"]


def test_no_apt_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrepareError) as caught:
        debian_package("stamps", tmp_path / "archives")
    assert "no apt-get" in message(caught)


def zip_of(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, CONTENT)
    return path


def test_unpack_one_takes_the_only_file_of_its_kind(tmp_path: Path):
    archive = zip_of(tmp_path / "a.whl", "pack/model.onnx", "../../escape.onnx.txt")
    assert unpack_one(archive, ".onnx", tmp_path).read_bytes() == CONTENT
    assert kept(tmp_path) == ["a.whl", "unpacked.onnx"]


@pytest.mark.parametrize("names", [(), ("a.onnx", "b.onnx")])
def test_unpack_one_refuses_to_choose(tmp_path: Path, names: tuple[str, ...]):
    archive = zip_of(tmp_path / "a.whl", "readme.txt", *names)
    with pytest.raises(PrepareError, match=f"holds {len(names)} .onnx files"):
        unpack_one(archive, ".onnx", tmp_path)


def test_unpack_one_refuses_a_torn_wheel(tmp_path: Path):
    archive = zip_of(tmp_path / "a.whl", "model.onnx")
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(PrepareError, match="not a whole wheel"):
        unpack_one(archive, ".onnx", tmp_path)
