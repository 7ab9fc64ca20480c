"""The chat template that an instruct model's tokenizer brings, as a template of ours."""

from typing import Any

from mitrain.core.errors import ConfigError

HERE = "\ue000HERE\ue000"
"""Stands for what the user says while the template is filled; a character for private use, which no template has."""


def in_chat(template: str, system: str, tokenizer: Any, name: str) -> str:
    """``template`` as what the user says in the chat template of ``tokenizer``, up to where the model begins to answer.

    ``system``: the system prompt; empty: the template's own, if it has one. ``name``: of the model, for ConfigError where
    there is no such template, or it does not take this.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"the tokenizer of {name!r} has no chat template: set task.chat=false, and a task.template")
    turns = [{"role": "system", "content": system}] if system else []
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
    opening = tokenizer("a")["input_ids"][0]
    if tokenizer.bos_token and opening == tokenizer.bos_token_id:  # the tokenizer puts it there by itself
        before = before.removeprefix(tokenizer.bos_token)
    return literal(before) + template + literal(after)


def literal(text: str) -> str:
    """``text`` as a part of a template that stands for itself."""
    return text.replace("{", "{{").replace("}", "}}")
