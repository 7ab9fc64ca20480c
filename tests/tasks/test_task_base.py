"""What a task has that says nothing of its own, and the refusal of scores that are not numbers."""

from types import SimpleNamespace

import pytest

from mitrain.core.errors import UserError
from mitrain.tasks.base import Task, require_finite


class Plain(Task):
    def __init__(self, config, parts):
        super().__init__(parts)
        self.config = config


def test_a_plain_task_is_built_of_its_settings_and_the_parts():
    config, parts = object(), object()
    task = Plain.build(config, SimpleNamespace(parts=parts))
    assert isinstance(task, Plain) and task.config is config and task.parts is parts
    assert task.must_generate([]) is False


def test_scores_that_are_not_finite_are_refused_with_the_first_eighty_characters_of_the_first():
    require_finite([], 3)
    with pytest.raises(UserError) as caught:
        require_finite(["x" * 81, "y"], 3)
    said = f"2 of 3 samples are scored with numbers that are not finite (the first is '{'x' * 80}'): the weights are damaged"
    assert str(caught.value).startswith(f"the model: {said}")
