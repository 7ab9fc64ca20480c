"""Templates: one field, filled by plain substitution, and everything else refused with the configuration."""

import pytest

from mitrain.core import config
from mitrain.core.errors import ConfigError
from mitrain.tasks import answer, classify, retrieve, segment  # noqa: F401 - importing makes the sections known
from mitrain.tasks.template import LONGEST, frame_of

FIELDS = {"answer": "prompt", "classify": "text", "retrieve": "text", "segment": "expression"}


def made(task: str, template: str) -> str:
    return config.choose("task", {"name": task, "template": template}).template


@pytest.mark.parametrize(("task", "field"), FIELDS.items())
def test_the_field_is_replaced_and_nothing_in_what_replaces_it(task, field):
    template = made(task, f"Q: {{{field}}} {{{{or}}}} {{{field}}}\\1 A:")
    assert "{x} \\g<0> {{y}}".join(frame_of(template)) == "Q: {x} \\g<0> {{y}} {or} {x} \\g<0> {{y}}\\1 A:"


@pytest.mark.parametrize("task", FIELDS)
@pytest.mark.parametrize(
    "strange",
    [
        "{0:>1000000000}", "{0.__class__}", "{0[0]}", "{0!r}", "{other}", "{}", "{", "a } b", "{ 0 }", "{{0}",
        "{0:{0}}", "{0:>1000000000} {0}",
    ],
)  # fmt: skip
def test_formats_attributes_and_other_fields_are_refused(task, strange):
    template = strange.replace("0", FIELDS[task], 1) if "1000" in strange else strange.replace("0", FIELDS[task])
    with pytest.raises(ConfigError, match=r"is not a field of this template: write \{") as refused:
        made(task, f"x {template}")
    assert "\n" not in str(refused.value) and "task.template" in str(refused.value)


def test_the_text_may_be_left_out_in_classification_alone():
    assert frame_of(made("classify", "no text")) == ("no text",)
    for task in ("answer", "retrieve", "segment"):
        with pytest.raises(ConfigError, match="the template has no {"):
            made(task, "no {{text}}")


def test_a_template_has_a_longest_length():
    assert made("classify", "x" * LONGEST)
    with pytest.raises(ConfigError, match="at most 32768 characters"):
        made("classify", "x" * (LONGEST + 1))
