"""The chat template that an instruct model's tokenizer brings, as a template of ours."""

from typing import Any

from mitrain.core.errors import ConfigError
from mitrain.tasks.template import frame_of

HERE, EARLIER, SAID = "\ue000HERE\ue000", "\ue000EARLIER\ue000", "\ue000SAID\ue000"
"""Stand for what the user says, said before and was answered while the template is filled; characters for private use, which
no template has."""


def in_chat(template: str, system: str, tokenizer: Any, name: str) -> str:
    """``template`` as what the user says in the chat template of ``tokenizer``, up to where the model begins to answer.

    ``system``: the system prompt; empty: the template's own, if it has one. ``name``: of the model, for ConfigError where
    there is no such template, or it does not take this.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"the tokenizer of {name!r} has no chat template: set task.chat=false, and a task.template")
    before, after = around(tokenizer, system, 0, name)
    opening = tokenizer("a")["input_ids"][0]
    if tokenizer.bos_token and opening == tokenizer.bos_token_id:  # the tokenizer puts it there by itself
        before = before.removeprefix(tokenizer.bos_token)
    return literal(before) + template + literal(after)


def around(tokenizer: Any, system: str, earlier: int, name: str) -> tuple[str, str]:
    """What the chat template puts before and behind what the user says, after ``earlier`` questions with their answers."""
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": EARLIER}, {"role": "assistant", "content": SAID}] * earlier
    try:
        text = tokenizer.apply_chat_template(
            [*turns, {"role": "user", "content": HERE}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of the checkpoint's: it may raise anything
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"the chat template of {name!r} does not take this ({reason}): set task.system= or chat=false"
        ) from None
    before, here, after = text.partition(HERE)
    if not here or HERE in after:
        raise ConfigError(f"the chat template of {name!r} does not say once what the user says: set task.chat=false")
    return before, after


def earlier_turn(template: str, system: str, tokenizer: Any, name: str) -> str:
    """How an earlier question with its answer stands in the chat template, as a template of ours that goes right before what
    the user says now, inside of ``template``.

    ConfigError where the chat template does not put every one of them so.
    """
    own = frame_of(template)
    if len(own) != 2:
        raise ConfigError("task.template names {prompt} twice, and there are turns before it: name it once")
    (start, end), (before, after) = own, around(tokenizer, system, 0, name)
    bare = around(tokenizer, system, 1, name)[0].removeprefix(before)  # EARLIER … SAID …
    first, said, last = (bare.removeprefix(EARLIER) if bare.startswith(EARLIER) else "").partition(SAID)
    if not said or any(around(tokenizer, system, n, name) != (before + n * bare, after) for n in (1, 2)):
        raise ConfigError(
            f"the chat template of {name!r} does not put every earlier turn the same way: set task.chat=false, and a"
            " task.template and task.turn"
        )
    return "{prompt}" + literal(end + first) + "{answer}" + literal(last + start)


def literal(text: str) -> str:
    """``text`` as a part of a template that stands for itself."""
    return text.replace("{", "{{").replace("}", "}}")
