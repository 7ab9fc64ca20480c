"""An unchanged picture is neither read nor decoded to be named; one that may have changed is; damage only costs time."""

import os
import shutil
from types import SimpleNamespace

import pytest
from folders import colour_records, vision_folder
from modalities import Pictures
from PIL import Image

from mitrain.core.errors import DataError
from mitrain.data import index, media
from mitrain.data.formats.records import AnswerSample
from mitrain.data.formats.refcoco import ReferSample
from mitrain.data.index import ROW, FileIndex, ahead
from mitrain.data.inspection import inspect_splits
from mitrain.data.media import MEDIA, Limits
from mitrain.data.samples import BadSamples
from mitrain.models import ImageConfig, ImageEncoder
from mitrain.tasks.answer import AnswerTask

IMAGES = [f"images/{i}.png" for i in range(5)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = vision_folder(tmp_path_factory.mktemp("index") / "vision")
    return ImageEncoder(ImageConfig(name=str(folder)), folder)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of pictures that count as settled, however new they are."""
    monkeypatch.setattr(index, "RECENT_NS", -(10**15))
    return colour_records(tmp_path / "data", train=4, val=1)


@pytest.fixture
def reads(monkeypatch):
    """The pictures that were read, in order."""
    found, read = [], media.read_image
    monkeypatch.setattr(media, "read_image", lambda root, image, most: found.append(image) or read(root, image, most))
    return found


def features(encoder, data, cache, bad=None):
    return Pictures([encoder], data, cache, 10**6, bad)


def test_a_picture_is_read_once_for_its_name_and_all_that_is_made_of_it(encoder, data, tmp_path, reads):
    found = Pictures([encoder, encoder], data, tmp_path / "cache", 10**6)
    assert found.prepare(IMAGES, 3) == 2 * 5 * 3
    assert [found.key(image) for image in IMAGES] and sorted(reads) == IMAGES


def test_a_start_with_a_warm_cache_reads_no_picture(encoder, data, tmp_path, reads):
    first = features(encoder, data, tmp_path / "cache")
    first.prepare(IMAGES, 2)
    reads.clear()
    again = features(encoder, data, tmp_path / "cache")
    assert again.prepare(IMAGES, 2) == 0 and again.usable(IMAGES) == [True] * 5
    assert [again.key(image) for image in IMAGES] == [first.key(image) for image in IMAGES]
    again.pooled(IMAGES)
    assert not reads


def test_the_index_knows_size_and_turn_so_that_annotations_are_judged_alike(encoder, data, tmp_path, reads, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30), "red").save(data / "turned.png", exif=exif)
    Image.new("RGB", (40, 20), "red").save(data / "other.png")
    samples = [ReferSample(n, {"image": f"{n}.png"}, "x", (30, 40), [[2, 1, 8, 1, 8, 5]]) for n in ("turned", "other")]
    said = []
    for _ in range(2):
        found = features(encoder, data, tmp_path / "cache", BadSamples(1, 0.5))
        assert found.readable(samples, 1) == samples[:1]
        said.append((caplog.messages.copy(), found.key("turned.png")))
        caplog.clear()
    assert said[0] == said[1] and said[0][1].endswith("-as-stored") and len(said[0][0]) == 2
    assert sorted(reads) == ["other.png", "turned.png"]


def replaced(path):
    """Another picture of the same length, size and mtime, as `cp -p` would leave it."""
    before, content = path.stat(), path.read_bytes()
    Image.new("RGB", (24, 24), "lime").save(path)
    changed = path.read_bytes()[: len(content)].ljust(len(content), b"\0")
    path.write_bytes(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def moved_over(path):
    shutil.copy2(path.with_name("4.png"), path.with_name("new.png"))
    os.replace(path.with_name("new.png"), path)


def relinked(path):
    path.unlink()
    path.symlink_to("4.png")


def linked_hard(path):
    path.unlink()
    os.link(path.with_name("4.png"), path)


def written_through_another_link(path):
    os.link(path, path.with_name("same.png"))
    path.with_name("same.png").write_bytes(path.with_name("4.png").read_bytes())


@pytest.mark.parametrize("change", [replaced, moved_over, relinked, linked_hard, written_through_another_link])
def test_a_picture_that_changed_is_read_again(encoder, data, tmp_path, reads, change):
    first = features(encoder, data, tmp_path / "cache")
    first.prepare(IMAGES)
    reads.clear()
    change(data / IMAGES[1])
    again = features(encoder, data, tmp_path / "cache")
    again.prepare(IMAGES)
    assert IMAGES[1] in reads and set(reads) <= {IMAGES[1], IMAGES[4]}  # a new hard link also changes its file's ctime
    assert again.key(IMAGES[1]) == features(encoder, data, None).key(IMAGES[1])
    assert again.key(IMAGES[1]) != first.key(IMAGES[1])


def test_a_link_that_is_set_to_a_file_of_the_same_size_and_times_is_read_again(data, tmp_path, monkeypatch):
    """As of two files that were written within one tick of the clock."""
    (data / "link.png").symlink_to("images/0.png")
    alike = [(data / f"images/{i}.png").read_bytes().ljust(5000, b"\0") for i in (0, 1)]
    for i, content in enumerate(alike):
        (data / f"images/{i}.png").write_bytes(content)
    stat = os.stat

    def one_tick(path, **options):
        found = stat(path, **options)
        return SimpleNamespace(st_size=found.st_size, st_ino=found.st_ino, st_mtime_ns=1, st_ctime_ns=1)

    monkeypatch.setattr(index, "os", SimpleNamespace(stat=one_tick, path=os.path))
    seen = FileIndex(data, tmp_path, MEDIA["image"], Limits())
    first = seen.read("link.png").digest
    assert seen.find(["link.png"])["link.png"].digest == first
    (data / "link.png").unlink()
    (data / "link.png").symlink_to("images/1.png")
    assert seen.find(["link.png"]) == {} and seen.read("link.png").digest != first


def test_a_picture_that_changed_just_before_it_was_read_is_not_entered(data, tmp_path, monkeypatch):
    """Within the tick of its file system's clock it could change once more and keep its times."""
    monkeypatch.setattr(index, "RECENT_NS", 2_000_000_000)
    seen = FileIndex(data, tmp_path, MEDIA["image"], Limits())
    os.utime(data / IMAGES[0], (1e9, 1e9))  # as a copy may have it, which is no older for that
    status = (data / IMAGES[0]).stat()
    now = status.st_ctime_ns + 2_000_000_000
    for moment, entered in ((now, 0), (now + 1, 1)):
        monkeypatch.setattr("time.time_ns", lambda moment=moment: moment)
        seen.read(IMAGES[0])
        assert len(seen.rows) == entered


def test_a_picture_that_changes_while_it_is_read_is_not_entered(data, tmp_path, monkeypatch):
    read = media.read_image

    def slow(root, image, most):
        found = read(root, image, most)
        os.utime(data / image)
        return found

    monkeypatch.setattr(media, "read_image", slow)
    seen = FileIndex(data, tmp_path, MEDIA["image"], Limits())
    seen.read(IMAGES[0])
    assert not seen.rows


def test_another_size_limit_is_applied_to_what_the_index_knows(encoder, data, tmp_path):
    features(encoder, data, tmp_path / "cache").prepare(IMAGES)
    with pytest.raises(DataError, match=r"pixels, 3 are allowed"):
        Pictures([encoder], data, tmp_path / "cache", 3).key(IMAGES[0])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-ROW.size // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: -ROW.size // 2])


def linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_folder(path):
    path.unlink()
    path.mkdir()


def strange(path):
    path.write_bytes(b"[]")


@pytest.mark.parametrize("damage", [flipped, cut, strange, linked, a_folder])
def test_an_index_that_is_damaged_only_costs_time(encoder, data, tmp_path, reads, caplog, damage):
    first = features(encoder, data, tmp_path / "cache")
    first.prepare(IMAGES)
    reads.clear()
    damage(first.index.path)
    again = features(encoder, data, tmp_path / "cache")
    assert again.prepare(IMAGES) == 0 and sorted(reads) == IMAGES
    assert [again.key(image) for image in IMAGES] == [first.key(image) for image in IMAGES]
    assert "cannot be used" in caplog.messages[0]
    if damage is not a_folder:
        reads.clear()
        features(encoder, data, tmp_path / "cache").usable(IMAGES)
        assert not reads


def test_an_index_that_cannot_be_written_is_said_and_costs_time(encoder, data, tmp_path, reads, caplog):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index").write_text("no folder")
    for computed in (5, 0):
        found = features(encoder, data, tmp_path / "cache")
        assert found.prepare(IMAGES) == computed and sorted(reads) == IMAGES
        assert any("cannot write" in line and "read again at the next start" in line for line in caplog.messages)
        reads.clear(), caplog.clear()


def test_what_another_process_published_meanwhile_stays(data, tmp_path):
    one, other = (
        FileIndex(data, tmp_path, MEDIA["image"], Limits()),
        FileIndex(data, tmp_path, MEDIA["image"], Limits()),
    )
    one.read(IMAGES[0]), other.read(IMAGES[1])
    one.publish(), other.publish()
    assert set(FileIndex(data, tmp_path, MEDIA["image"], Limits()).find(IMAGES)) == set(IMAGES[:2])


def test_the_index_is_bounded(data, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MOST", 3)
    seen = FileIndex(data, tmp_path, MEDIA["image"], Limits())
    for image in IMAGES:
        seen.read(image)
    seen.publish()
    assert set(FileIndex(data, tmp_path, MEDIA["image"], Limits()).find(IMAGES)) == set(IMAGES[2:])


def test_what_the_times_did_not_tell_is_refused_once_and_not_believed_again(encoder, data, tmp_path, monkeypatch):
    """The content changes below the file's times; the features of what the index says are not there any more."""
    known = FileIndex(data, tmp_path / "cache" / "index", MEDIA["image"], Limits(10**6))
    known.read(IMAGES[0])
    name, row = next(iter(known.rows.items()))
    known.rows[name] = row[:16] + bytes(32) + row[48:]
    known.publish()
    with pytest.raises(DataError, match=r"0\.png' in .* was replaced while it was being used"):
        features(encoder, data, tmp_path / "cache").prepare(IMAGES)
    again = features(encoder, data, tmp_path / "cache")
    again.prepare(IMAGES)
    assert again.key(IMAGES[0]) == features(encoder, data, None).key(IMAGES[0])


def test_a_row_of_a_picture_that_cannot_be_read_any_more_goes(data, tmp_path, monkeypatch):
    known = FileIndex(data, tmp_path, MEDIA["image"], Limits())
    known.read(IMAGES[0]), known.publish()
    again = FileIndex(data, tmp_path, MEDIA["image"], Limits(3))
    with pytest.raises(DataError, match="3 are allowed"):
        again.read(IMAGES[0])
    again.publish()
    assert FileIndex(data, tmp_path, MEDIA["image"], Limits()).find(IMAGES) == {}


def test_inspect_names_what_the_times_did_not_tell_and_puts_the_index_right(data, tmp_path):
    known = FileIndex(data, tmp_path / "index", MEDIA["image"], Limits())
    samples = [AnswerSample(image, {"image": image}, "x", "y") for image in IMAGES]
    for image in IMAGES:
        known.read(image)
    name = list(known.rows)[3]
    known.rows[name] = known.rows[name][:16] + bytes(32) + known.rows[name][48:]
    known.publish()
    for changed in ([IMAGES[3]], None):
        found, text = inspect_splits(AnswerTask, {"train": samples}, data, cache=tmp_path)
        assert found["splits"]["train"].get("changed_without_a_new_time_examples") == changed
        assert ("changed_without_a_new_time: 1" in text) == bool(changed)


def test_a_picture_that_is_not_there_is_named_before_any_other_is_read(encoder, data, tmp_path, reads):
    bad = BadSamples(0)
    with pytest.raises(DataError, match=r"gone\.png"):
        features(encoder, data, tmp_path / "cache", bad).prepare([*IMAGES, "images/gone.png"])
    assert reads == ["images/gone.png"]


def test_what_is_computed_ahead_comes_in_order_and_no_further_than_the_bound():
    begun = []
    results = ahead(lambda i: begun.append(i) or i * i, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    results.close()
    assert len(begun) <= 3 + 2 * index.THREADS + 1
