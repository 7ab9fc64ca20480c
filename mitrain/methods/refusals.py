"""What would lose an adapter, or the features given to it, without a word: refused in one line instead."""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from mitrain.core.errors import ModelError


def guard_saving(model: nn.Module, method: str) -> Callable[[], None]:
    """Refuse ``model.save_pretrained`` while a ``method`` adapter is attached; returns what takes the refusal off."""
    before = vars(model).get("save_pretrained")
    model.save_pretrained = partial(refuse_saving, method)

    def undo() -> None:
        del model.save_pretrained
        if before is not None:
            model.save_pretrained = before

    return undo


def refuse_saving(method: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ModelError(
        f"the model has a {method} adapter attached, which save_pretrained of the model would lose: save the adapter with"
        " its own save_pretrained(folder), or call its detach() (or merge()) before you save the model"
    )


def call_without_losing_features(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """A model's call, refused where features are given to one that would drop them: transformers takes any keyword."""
    for name in kwargs:
        if name.startswith("infus") and not (name == "infused" and any(map(takes_infused, model.children()))):
            raise ModelError(
                f"{type(model).__name__} was called with {name}=, which nothing reads: give infused= to the very model that"
                " an adapter is attached to (mitrain.attach, mitrain.load_adapter)"
            )
    return nn.Module.__call__(model, *args, **kwargs)


def takes_infused(module: nn.Module) -> bool:
    return getattr(module, "takes_infused", False)


# Attached or not: a plain model would answer without the picture as if it had seen it.
PreTrainedModel.__call__ = call_without_losing_features
