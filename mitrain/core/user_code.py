"""A metric or a loss of the user's own, which a configuration names as package.module:function.

The function is run where the user asked for it: `mitrain train`, `plan` and `compare` take it from the configuration that
they are given, and whatever opens a run or an export, which may be someone else's, only with ``--trust-code FOLDER``.
The environment variable `TRUSTED` holds that folder, so that the processes of a study have it, too.
"""

import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mitrain.core.errors import ConfigError, is_out_of_memory, nearest
from mitrain.core.provenance import digest

TRUSTED = "MITRAIN_TRUST_CODE"
NAMED = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
FunctionName = Annotated[str, Field(pattern=NAMED)]


def trust(folder: str | Path) -> None:
    """Let configurations name code; its modules are found in ``folder`` where sys.path has none of that name."""
    os.environ[TRUSTED] = str(Path(folder).expanduser().absolute())


def trusted() -> bool:
    return bool(os.environ.get(TRUSTED))


def function(key: str, name: str) -> Callable[..., Any]:
    """The function ``name`` that the setting ``key`` gives; ConfigError where it is not trusted or not there."""
    folder = os.environ.get(TRUSTED)
    if not folder:
        raise ConfigError(
            f"{key}={name} is code, and a run or an export does not run code unasked: if you trust it, give --trust-code"
            f" FOLDER, the folder of its module (in Python: the environment variable {TRUSTED})"
        )
    if folder not in sys.path:
        sys.path.append(folder)
    module, _, wanted = name.partition(":")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{key}={name}: the module {module!r} cannot be imported ({type(error).__name__}: {error}): mend it, or put it"
            f" beside the configuration, in {folder}, or on PYTHONPATH"
        ) from None
    made = getattr(found, wanted, None)
    if not callable(made):
        place, hint = getattr(found, "__file__", None) or module, nearest(wanted, vars(found))
        raise ConfigError(f"{key}={name}: {place} has no function {wanted!r}{hint}")
    return made


def called(key: str, name: str, *arguments: Any) -> Any:
    """What the function returns; ConfigError, which names its line, for what it raises."""
    made = function(key, name)
    try:
        return made(*arguments)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)[1:2]  # none where the arguments do not fit
        where = "".join(f", {frame.filename} line {frame.lineno}" for frame in frames)
        raise ConfigError(f"{key}={name} failed ({type(error).__name__}: {error}{where}): mend the function") from None


def score(name: str, samples: Sequence[Any], predictions: Sequence[Any], beside: Mapping[str, Any]) -> dict[str, float]:
    """The own metric of ``samples`` under its function's name, which is none of the scores ``beside``."""
    given, short = called("task.metric", name, samples, predictions), name.partition(":")[2]
    try:
        value = given.item() if hasattr(given, "item") else given  # of numpy or torch
        number = float(value) if isinstance(value, int | float) else math.nan
    except (ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"task.metric={name} returned {str(given)[:60]!r}: let it return one finite number")
    if short in beside:
        raise ConfigError(f"task.metric={name}: {short!r} is a score of the task itself: give the function another name")
    return {short: number}


def minimises(name: str) -> bool | None:
    """Whether the lowest value of an own metric is the best; None where it does not choose the best step."""
    flag = getattr(function("task.metric", name), "minimises", None)
    if flag is not None and type(flag) is not bool:
        raise ConfigError(f"task.metric={name}: its attribute minimises is {str(flag)[:60]!r}: set it to True or False")
    return flag


def sources(task: Any) -> dict[str, str]:
    """A digest of each module that the settings ``task`` name, by ``code.task.KEY``; ConfigError as `function`."""
    names = {key: getattr(task, key, None) or "" for key in ("metric", "loss")}
    found = {}
    for key, name in names.items():
        if ":" in name:
            function(f"task.{key}", name)
            place = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
            found[f"code.task.{key}"] = digest([Path(place).read_bytes().hex() if place else name])
    return found
