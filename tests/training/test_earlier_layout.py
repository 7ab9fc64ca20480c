"""Configurations and fingerprints of earlier versions, which had a list of image encoders, are read as they were meant."""

from mitrain.training import schema
from mitrain.training.resume import renamed

REST = {"task": {"name": "classify", "readout": ["last", "image"]}, "data": {"name": "labelled", "root": "x"}}


def read(vision, **adapter):
    values = {"model": {"llm": "l", "vision": vision}, "adapter": {"name": "mit", **adapter}, **REST}
    return schema.from_dict(values)


def test_encoders_of_one_modality_join_the_first():
    found = read([{"name": "a", "size": 28}, "b"])
    assert found.model.modalities == {"image": ["image", "image2"]} and found.data.inputs == ("image",)
    assert [(part.name, part.takes, part.input) for part in found.model.encoders.values()] == [
        ("a", "image", "image"),
        ("b", "image", "image"),
    ]
    assert found.model.encoders["image"].size == 28 and read("a").model.encoders.keys() == {"image"}


def test_as_many_modalities_as_encoders_are_theirs_and_read_out_in_their_order():
    found = read(["a", "b"], modalities={"coarse": 24, "fine": 48})
    assert found.model.modalities == {"coarse": ["coarse"], "fine": ["fine"]} and found.data.inputs == ("image",)
    assert found.task.readout == ("last", "coarse", "fine")


def test_a_digest_of_the_pictures_is_that_of_the_input_image():
    assert [renamed(name) for name in ("data.val.pictures", "data.val.image", "base.text.weights")] == [
        "data.val.image.content",
        "data.val.image",
        "base.text.weights",
    ]
