"""The negative control that trains on other samples' labels."""

import pytest

from mitrain.core.errors import ConfigError
from mitrain.data.formats.labels import LabelSample
from mitrain.tasks.base import Task
from mitrain.tasks.classify import ClassifyTask
from mitrain.tasks.segment import SegmentTask

SAMPLES = [LabelSample(str(i), {"image": f"{i}.png"}, f"text {i}", (f"class {i % 7}",), str(i)) for i in range(70)]


def permuted(kind: type[Task], samples, seed=0):
    return kind.permuted(kind.__new__(kind), samples, seed)


def test_labels_are_exchanged_and_files_and_texts_stay():
    found = permuted(ClassifyTask, SAMPLES)
    assert [(s.id, s.inputs, s.text, s.object) for s in found] == [(s.id, s.inputs, s.text, s.object) for s in SAMPLES]
    assert sorted(s.labels for s in found) == sorted(s.labels for s in SAMPLES)
    kept = sum(one.labels == other.labels for one, other in zip(found, SAMPLES, strict=True))
    assert kept < 25, "about 10 of 70 labels of seven classes are their own"
    assert found == permuted(ClassifyTask, SAMPLES) != permuted(ClassifyTask, SAMPLES, 1)


@pytest.mark.parametrize(("kind", "samples"), [(SegmentTask, SAMPLES), (ClassifyTask, SAMPLES[:1] * 3)])
def test_what_has_no_labels_to_exchange_is_one_line(kind, samples):
    with pytest.raises(ConfigError, match=r"^train\.permute .* of which these samples have none that differ$"):
        permuted(kind, samples)
