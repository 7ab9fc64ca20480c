"""Reading a Debian package: every compression, no traversal, and one line for whatever is broken."""

import tarfile

import pytest
import tiny_deb
from hypothesis import given, settings
from hypothesis import strategies as st
from mitrain_demo import deb
from refusals import read_or_refused

from mitrain.core.errors import PrepareError

FILES = {"./usr/share/x/a.png": b"picture", "./usr/share/x/deep/b.txt": b"words" * 99, "./usr/share/y/c.png": b"other"}


@pytest.mark.parametrize("suffix", tiny_deb.COMPRESS)
def test_wanted_files_come_out_whole(tmp_path, suffix):
    archive = tiny_deb.deb(tmp_path / "p.deb", FILES, suffix)
    found = dict(deb.members(archive, "usr/share/x", (".png", ".txt")))
    assert found == {"a.png": b"picture", "deep/b.txt": b"words" * 99}
    assert dict(deb.members(archive, "/usr/share/", (".png",))) == {"x/a.png": b"picture", "y/c.png": b"other"}


def test_links_and_paths_that_lead_elsewhere_are_passed_over(tmp_path):
    link = tarfile.TarInfo("./usr/share/x/link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    files = {"./usr/share/x/../../../etc/evil.png": b"1", "/usr/share/x/abs.png": b"2", "usr/share/x/./ok.png": b"3"}
    archive = tiny_deb.deb(tmp_path / "p.deb", files, extra=[link])
    assert dict(deb.members(archive, "usr/share/x", (".png",))) == {"ok.png": b"3"}


@pytest.mark.parametrize("limit", ["MAX_FILE", "MAX_TOTAL"])
def test_too_large_files_are_refused(tmp_path, monkeypatch, limit):
    archive = tiny_deb.deb(tmp_path / "p.deb", {"./u/a.png": b"1" * 60, "./u/b.png": b"1" * 60})
    monkeypatch.setattr(deb, limit, {"MAX_FILE": 59, "MAX_TOTAL": 119}[limit])
    with pytest.raises(PrepareError, match="too large"):
        dict(deb.members(archive, "u", (".png",)))
    monkeypatch.setattr(deb, limit, {"MAX_FILE": 60, "MAX_TOTAL": 120}[limit])
    assert len(dict(deb.members(archive, "u", (".png",)))) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 a zip",
        tiny_deb.ar({"debian-binary": b"2.0\n"}),
        tiny_deb.ar({"data.tar.bz3": b"who knows"}),
        tiny_deb.ar({"data.tar.xz": b"no xz"}),
        tiny_deb.ar({"data.tar": b"no tar" * 200}),
        tiny_deb.ar({"debian-binary": b"2.0\n"})[:-30].ljust(68, b"x"),
    ],
)
def test_what_is_no_package_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "p.deb"
    path.write_bytes(content)
    with pytest.raises(PrepareError, match="download it again") as caught:
        dict(deb.members(path, "usr", (".png",)))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_package_is_refused(tmp_path):
    with pytest.raises(PrepareError, match="No such file"):
        dict(deb.members(tmp_path / "absent.deb", "usr", (".png",)))


@settings(max_examples=150, deadline=None)
@given(suffix=st.sampled_from(list(tiny_deb.COMPRESS)), cut=st.integers(0, 10**6), data=st.data())
def test_torn_and_altered_packages_never_end_in_a_traceback(tmp_path_factory, suffix, cut, data):
    path = tmp_path_factory.mktemp("deb") / "p.deb"
    content = bytearray(tiny_deb.deb(path, FILES, suffix).read_bytes())
    content = content[: cut % len(content)] if cut % 2 else content
    for place in data.draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=4)) if content else ():
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    read_or_refused(lambda: dict(deb.members(path, "usr", (".png", ".txt"))), PrepareError)
