"""Pictures of every mode come out right, every trap as a DataError that names the file."""

import io
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refusals import read_or_refused

from mitrain.data.images import BadSamples, open_image
from mitrain.errors import DataError

GREY = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16


def save(folder: Path, name: str, image: Image.Image, **options) -> str:
    image.save(folder / name, **options)
    return name


def refused(folder: Path, name: str, match: str, **options) -> None:
    with pytest.raises(DataError, match=match) as caught:
        open_image(folder, name, **options)
    assert "\n" not in str(caught.value)


# modes


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "CMYK", "YCbCr"])
def test_plain_modes_keep_their_look(tmp_path, mode):
    image = Image.fromarray(GREY).convert("RGB").convert(mode)
    name = save(tmp_path, "a.tif", image)
    found = open_image(tmp_path, name)
    assert found.mode == "RGB" and found.size == (4, 4)
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(image.convert("RGB"))).max()
    assert difference <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tmp_path, mode):
    image = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128) if mode != "P" else (0, 0, 0, 0))
    found = open_image(tmp_path, save(tmp_path, "a.png", image.convert(mode)))
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((1, 0)) == ((127, 127, 127) if mode != "P" else (255, 255, 255))
    assert found.getpixel((2, 0)) != (255, 255, 255)


def test_a_transparent_colour_of_a_png_becomes_white(tmp_path):
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (1, 1, 1))
    found = open_image(tmp_path, save(tmp_path, "a.png", image, transparency=(10, 20, 30)))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (1, 1, 1)]


@pytest.mark.parametrize(("name", "dtype"), [("a.png", np.uint16), ("a.tif", np.uint16), ("b.tif", np.int32)])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name, dtype):
    values = np.array([[0, 256, 32768, 65535]], dtype)
    found = np.asarray(open_image(tmp_path, save(tmp_path, name, Image.fromarray(values))))
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]


def test_grey_values_of_thirty_two_bits_are_refused(tmp_path):
    image = Image.fromarray(np.array([[0, 1 << 16]], np.int32))
    refused(tmp_path, save(tmp_path, "a.tif", image), "32 bits have no agreed scale")


def test_a_damaged_exif_block_costs_no_word(tmp_path, recwarn):
    image = Image.fromarray(GREY)
    name = save(tmp_path, "a.jpg", image, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12torn")
    assert open_image(tmp_path, name).size == (4, 4) and not recwarn.list


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        save(
            tmp_path,
            name,
            frames[0],
            save_all=True,
            append_images=frames[1:],
            **{"lossless": True} if "webp" in name else {},
        )
        red, green, blue = open_image(tmp_path, name).getpixel((0, 0))
        assert red > 250 and green < 5 and blue < 5


def test_pictures_are_turned_upright(tmp_path):
    image = Image.new("RGB", (6, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    assert open_image(tmp_path, save(tmp_path, "a.jpg", image, exif=exif)).size == (2, 6)


def test_floating_point_pixels_are_refused(tmp_path):
    refused(tmp_path, save(tmp_path, "a.tif", Image.fromarray(np.ones((2, 2), np.float32))), "no agreed scale")


# traps


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/hostname", "sub/../../secret.png", "link.png", "linked/secret.png"]
)
def test_paths_stay_under_the_root(tmp_path, name):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    save(tmp_path, "secret.png", Image.new("L", (2, 2)))
    os.symlink(tmp_path / "secret.png", root / "link.png")
    os.symlink(tmp_path, root / "linked")
    refused(root, name, "leads out of the data folder")


def test_a_link_within_the_root_and_a_linked_root_are_fine(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    save(root, "a.png", Image.new("L", (2, 2)))
    os.symlink("a.png", root / "b.png")
    os.symlink(root, tmp_path / "alias")
    assert open_image(tmp_path / "alias", "b.png").size == (2, 2)


@pytest.mark.parametrize("name", ["", "nul\0byte.png", "a" * 5000, "\udcff.png", 7, None])
def test_what_is_no_path_is_refused(tmp_path, name):
    refused(tmp_path, name, "correct the")


def test_missing_files_folders_and_pipes_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("absent.png", "folder", "pipe"):
        refused(tmp_path, name, f"no picture '{name}'")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 60_000  # 3.6 gigapixels, 10 GB once decoded
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0" * 10**6)))
    refused(tmp_path, "bomb.png", r"bomb\.png")


def test_the_pixel_limit_is_exact(tmp_path):
    name = save(tmp_path, "a.png", Image.new("L", (30, 20)))
    assert open_image(tmp_path, name, max_pixels=600).size == (30, 20)
    refused(tmp_path, name, r"30 x 20 pixels", max_pixels=599)


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a"]
)
def test_what_is_no_picture_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path, "a.png", "not a readable picture")


FORMATS = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]


@settings(max_examples=250, deadline=None)
@given(kind=st.sampled_from(FORMATS), cut=st.integers(0, 10**6), data=st.data())
def test_torn_and_altered_pictures_never_end_in_a_traceback(tmp_path_factory, kind, cut, data):
    buffer = io.BytesIO()
    Image.fromarray(np.tile(GREY, (4, 4))).convert("RGB").save(buffer, kind)
    content = bytearray(buffer.getvalue())
    if cut % 3 == 0:
        content = content[: cut % len(content)]
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)) if content else ():
        content[place] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("torn")
    (folder / "a").write_bytes(content)
    found = read_or_refused(lambda: open_image(folder, "a"), DataError)
    assert found is None or found.mode == "RGB"


# the budget


def test_bad_samples_are_counted_named_and_skipped(caplog):
    bad = BadSamples(2)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # the same one in three epochs counts once
            bad.skip("first", "torn")
        bad.skip("second", "missing")
    assert len(bad) == 2 and [record.args[0] for record in caplog.records] == ["first", "second"]
    with pytest.raises(DataError, match=r"3 bad samples.*bad_samples=2: first \(torn\); second \(missing\); third"):
        bad.skip("third", "too large")


def test_no_budget_stops_at_the_first_and_long_lists_are_cut():
    with pytest.raises(DataError, match="1 bad samples"):
        BadSamples(0).skip("a", "torn")
    bad = BadSamples(7)
    for number in range(7):
        bad.skip(f"sample{number}", "torn")
    with pytest.raises(DataError, match=r"sample4.*and 3 more"):
        bad.skip("last", "torn")
