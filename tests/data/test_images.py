"""Pictures of every mode come out right, every trap as a DataError that names the file."""

import io
import logging
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from refusals import read_or_refused

from mitrain.core.errors import DataError
from mitrain.data.images import annotated_image, open_image, read_image
from mitrain.data.samples import BadSamples

GREY = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16


def save(folder: Path, name: str, image: Image.Image, **options) -> str:
    image.save(folder / name, **options)
    return name


PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


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


def png(depth: int, colour: int, clear: bytes, row: bytes) -> bytes:
    """A PNG of two pixels in a row, with a transparent colour."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0))
    return PNG + header + chunk(b"tRNS", clear) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "other"),
    [
        (png(1, 0, b"\0\0", b"\x40"), (255, 255, 255)),
        (png(2, 0, b"\0\1", b"\x60"), (170, 170, 170)),
        (png(4, 0, b"\0\5", b"\x5a"), (170, 170, 170)),
        (png(8, 0, b"\0\5", b"\5\xaa"), (170, 170, 170)),
        (png(16, 0, b"\x12\x34", b"\x12\x34\x12\x35"), (18, 18, 18)),
        (png(16, 2, b"\x12\x34\x23\x45\x34\x56", b"\x12\x34\x23\x45\x34\x56\x40\0\x50\0\x60\0"), (64, 80, 96)),
    ],
    ids=["1 bit", "2 bits", "4 bits", "8 bits", "16 bits", "colours of 16 bits"],
)
def test_the_transparent_colour_is_that_of_the_pixels_in_every_depth(tmp_path, content, other):
    (tmp_path / "a.png").write_bytes(content)
    found = open_image(tmp_path, "a.png")
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), other]


@pytest.mark.parametrize(("name", "dtype"), [("a.png", np.uint16), ("a.tif", np.uint16), ("b.tif", np.int32)])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name, dtype):
    values = np.array([[0, 256, 32768, 65535]], dtype)
    found = np.asarray(open_image(tmp_path, save(tmp_path, name, Image.fromarray(values))))
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]


def test_grey_values_of_thirty_two_bits_are_refused(tmp_path):
    image = Image.fromarray(np.array([[0, 1 << 16]], np.int32))
    refused(tmp_path, save(tmp_path, "a.tif", image), "32 bits have no agreed scale")


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_damaged_exif_block_costs_no_word(tmp_path, recwarn, kind):
    image = Image.fromarray(np.tile(GREY, (2, 4))).convert("RGB")
    torn = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12torn"
    for block in (torn, torn[6:], b"Exif\0\0\0\x08\0\2\1\x12\0\3"):
        assert open_image(tmp_path, save(tmp_path, f"a.{kind}", image, exif=block)).size == (16, 8)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_a_torn_picture_with_an_exif_block_is_refused(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    path = tmp_path / save(tmp_path, f"a.{kind}", Image.fromarray(noise), exif=exif)
    path.write_bytes(path.read_bytes()[:900])
    refused(tmp_path, path.name, "not a readable picture")


def test_decoding_in_threads_leaves_the_warnings_as_they_were(tmp_path):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12torn"
    name = save(tmp_path, "a.jpg", Image.fromarray(np.tile(GREY, (30, 30))), exif=exif)
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert {picture.size for picture in pool.map(lambda _: open_image(tmp_path, name), range(200))} == {(120, 120)}
    assert warnings.filters == before


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

OUTSIDE = ["../secret.png", "/etc/hostname", "sub/../../secret.png", "linked/../../secret.png"]


@pytest.mark.parametrize("name", [*OUTSIDE, "../root-2/secret.png"])
def test_paths_stay_under_the_root(tmp_path, name):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "root-2").mkdir()
    for folder in (tmp_path, tmp_path / "root-2"):
        save(folder, "secret.png", Image.new("L", (2, 2)))
    os.symlink(tmp_path / "far" / "away", root / "linked")
    refused(root, name, "leads out of the data folder")


def test_links_in_the_data_folder_are_followed(tmp_path):
    store, root = tmp_path / "store", tmp_path / "root"
    store.mkdir()
    root.mkdir()
    save(store, "a.png", Image.new("L", (2, 2)))
    os.symlink(store, root / "images")
    os.symlink(store / "a.png", root / "b.png")
    os.symlink(root, tmp_path / "alias")
    for name in ("images/a.png", "b.png", "images/../b.png", str(root / "b.png"), str(tmp_path / "alias" / "b.png")):
        assert open_image(tmp_path / "alias", name).size == (2, 2)
    os.symlink("nowhere", root / "c.png")
    refused(root, "c.png", "only a link that leads to none")


@pytest.mark.parametrize("name", ["", "nul\0byte.png", "a" * 5000, "\udcff.png", 7, None])
def test_what_is_no_path_is_refused(tmp_path, name):
    refused(tmp_path, name, "correct the")


def test_missing_files_folders_and_pipes_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("absent.png", "folder", "pipe"):
        refused(tmp_path, name, f"no picture '{name}'")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    side = 60_000  # 3.6 gigapixels, 10 GB once decoded
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(PNG + header + chunk(b"IDAT", zlib.compress(b"0" * 10**6)))
    refused(tmp_path, "bomb.png", r"bomb\.png")


def test_the_pixel_limit_is_exact(tmp_path):
    name = save(tmp_path, "a.png", Image.new("L", (30, 20)))
    assert open_image(tmp_path, name, max_pixels=600).size == (30, 20)
    refused(tmp_path, name, r"30 x 20 pixels", max_pixels=599)


@pytest.mark.parametrize("content", [b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a"])
def test_what_is_no_picture_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path, "a.png", "not a readable picture")


BOX = b"\0\0\0\x18ftyp"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "an empty file"),
        (BOX + b"heic\0\0\0\0mif1heic", "a HEIC picture"),
        (BOX + b"avif\0\0\0\0avifmif1", "a damaged AVIF picture"),
        (BOX + b"isom\0\0\2\0isomiso2", "a video"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"<!DOCTYPE HTML><title>404</title>", "an HTML page"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"GIF89a", "a damaged GIF picture"),
        (b"RIFF\0\0\0\0WAVEfmt ", "a video or sound"),
        (b"no picture at all", "its content is of no kind that is known"),
    ],
)
def test_the_message_says_what_came_instead_of_a_picture_and_what_is_read(tmp_path, content, what):
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        open_image(tmp_path, "photo.jpg")
    assert str(caught.value).count("photo.jpg") == 1 and "BytesIO" not in str(caught.value)
    assert "PNG, WebP" in str(caught.value) or "damaged" in what


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
def test_avif_is_read(tmp_path):
    name = save(tmp_path, "a.avif", Image.new("RGB", (8, 6), (10, 200, 30)))
    assert np.abs(np.asarray(open_image(tmp_path, name)).astype(int) - (10, 200, 30)).max() < 8


def test_a_file_of_gigabytes_is_refused_unread(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(20 << 30)  # holes: it takes no room
    refused(tmp_path, "a.png", "has 21474836480 bytes")


# a picture and its annotation


def turned(folder: Path, size: tuple[int, int], turn: int, name: str = "a.png") -> str:
    """A picture of ``size`` as stored, with the EXIF tag ``turn``; its upper left pixel is red."""
    image = Image.new("RGB", size)
    image.paste((255, 0, 0), (0, 0, size[0] // 2, size[1] // 2))
    exif = Image.Exif()
    exif[0x0112] = turn
    return save(folder, name, image, exif=exif)


@pytest.mark.parametrize(
    ("size", "shown", "red_at"),
    [
        ((30, 40), (40, 30), (1, 1)),
        ((40, 30), (30, 40), (28, 1)),
        ((60, 80), (80, 60), (1, 1)),
        ((20, 15), (15, 20), (13, 1)),
    ],
    ids=["as stored", "upright", "stored and scaled", "upright and scaled"],
)
def test_the_picture_that_was_annotated_is_told_by_its_size(tmp_path, size, shown, red_at):
    name = turned(tmp_path, (40, 30), 6)
    found = annotated_image(tmp_path, name, size)
    assert found.size == shown and found.getpixel(red_at) == (255, 0, 0)
    decoded = read_image(tmp_path, name).annotated(size)
    assert decoded.upright().size in ((40, 30), (30, 40))
    assert ("as it is stored" in decoded.note) == (size in ((30, 40), (60, 80)))
    assert ("scaled copy" in decoded.note) == (size in ((60, 80), (20, 15)))
    assert (decoded.digest == read_image(tmp_path, name).digest) == ("as it is stored" not in decoded.note)


@pytest.mark.parametrize(("size", "turn"), [((40, 30), 3), ((40, 30), 2), ((30, 30), 6)])
def test_a_turn_that_the_size_does_not_tell_is_refused(tmp_path, size, turn):
    name = turned(tmp_path, size, turn)
    with pytest.raises(DataError, match=r"a\.png.*fits it turned and unturned: save the picture upright"):
        read_image(tmp_path, name).annotated(size[::-1])


@pytest.mark.parametrize(
    ("size", "why"),
    [((31, 40), "get matching files"), ((60, 40), "get matching files"), ((30_000, 40_000), "are allowed")],
)
def test_a_picture_that_is_not_what_was_annotated_is_refused(tmp_path, size, why):
    name = save(tmp_path, "a.png", Image.new("L", (40, 30)))
    with pytest.raises(DataError, match=rf"a\.png.*40 x 30 pixels, its annotation is made for {size[1]} x {size[0]}.*{why}"):
        read_image(tmp_path, name).annotated(size)


KINDS = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]


@settings(max_examples=250, deadline=None)
@given(kind=st.sampled_from(KINDS), cut=st.integers(0, 10**6), data=st.data())
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


def test_a_tenth_of_the_samples_may_be_bad_and_no_more():
    bad = BadSamples(20)
    bad.skip("a", "torn")
    bad.check_share(1, 10)
    with pytest.raises(DataError, match=r"2 of 19 samples cannot be used.*data.bad_share=0.1: a \(torn\)"):
        bad.check_share(2, 19)
    BadSamples(20, 1.0).check_share(19, 19)
