"""Scores class by class, against scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from mitrain.tasks.details import MOST_DIFFERENT, of_answers, of_labels

NAMES = ("red", "green", "blue", "never")


def one_hot(numbers):
    return np.eye(4, dtype=bool)[numbers]


def test_one_label_is_what_scikit_learn_says():
    truth, predicted = [0, 0, 1, 2, 2, 2, 1], [0, 1, 1, 2, 0, 2, 1]
    found = of_labels(NAMES, one_hot(truth), one_hot(predicted), one=True)
    expected = precision_recall_fscore_support(truth, predicted, labels=[0, 1, 2])
    rows = [list(row.values()) for row in found["per_class"].values()]
    assert list(found["per_class"]) == ["red", "green", "blue"], "no class that nobody names"
    assert np.allclose(np.array(rows, dtype=float), np.array(expected).T)
    assert found["confusion"]["classes"] == ["red", "green", "blue"]
    assert found["confusion"]["counts"] == confusion_matrix(truth, predicted).tolist()


def test_several_labels_have_no_confusion():
    truth = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    predicted = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0]], dtype=bool)
    found = of_labels(NAMES, truth, predicted, one=False)
    expected = precision_recall_fscore_support(truth, predicted, zero_division=np.nan)
    assert found.keys() == {"per_class"}
    for name, row in found["per_class"].items():
        own = [column[NAMES.index(name)] for column in expected]
        assert [np.nan if value is None else value for value in row.values()] == pytest.approx(own, nan_ok=True)
    assert found["per_class"]["never"] == {"precision": 0.0, "recall": None, "f1": 0.0, "support": 0}


def test_answers_are_classes_as_long_as_they_are_few():
    found = of_answers(["cat", "dog", "cat"], ["cat", "cow", "dog"])
    assert found["confusion"] == {"classes": ["cat", "cow", "dog"], "counts": [[1, 0, 1], [0, 0, 0], [0, 1, 0]]}
    assert found["per_class"]["cow"] == {"precision": 0.0, "recall": None, "f1": 0.0, "support": 0}
    assert found["per_class"]["cat"]["recall"] == 0.5 and found["per_class"]["cat"]["precision"] == 1.0
    many = [str(number) for number in range(MOST_DIFFERENT + 1)]
    assert of_answers(many, many) == {}
