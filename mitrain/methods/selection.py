"""Naming the layers of a decoder: by list, by range, by fraction from either end, by stride."""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from mitrain.core.errors import ConfigError

FRACTIONS = {"half": 1 / 2, "third": 1 / 3, "quarter": 1 / 4, "fifth": 1 / 5, "sixth": 1 / 6}
FORMS = "'all', 'last third', 'first half', 'last 8', 'last 0.25', 'every 4', '20-29', '13-17-21' or a list of indices"


def parse_layers(spec: str | list[int]) -> str | list[int]:
    """``spec`` itself when it is well formed; ConfigError else. Which layers there are, only a model tells."""
    select_layers(spec, depth=None)
    return spec


LayersSetting = Annotated[
    str | list[int],
    # layers=5 is the layer '5'
    BeforeValidator(lambda spec: str(spec) if type(spec) is int else spec, json_schema_input_type=str | list[int] | int),
    AfterValidator(parse_layers),
]


def select_layers(spec: str | list[int], depth: int | None) -> list[int]:
    """The 0-based indices, ascending, that ``spec`` means in a decoder of ``depth`` layers.

        [20, 21]      these                          'all'          every layer
        '20-29'       from 20 to 29, both ends in    'last third'   the upper third, rounded (also half, quarter, …)
        '13-17-21'    these, as MiT's command line   'first 0.25'   the lower quarter, rounded
        'every 4'     each fourth, the last included 'last 8'       the upper eight

    Raises ConfigError for a malformed spec and for a layer that does not exist.
    """
    known = depth is not None
    depth = depth if known else 1 << 30
    chosen = _listed(spec) if isinstance(spec, list) else _worded(spec.strip().lower(), depth, known)
    wrong = [index for index in chosen if not 0 <= index < depth]
    if known and wrong:
        raise ConfigError(f"layers={spec!r}: there is no layer {wrong[0]}, this model has layers 0 to {depth - 1}")
    if wrong:
        raise ConfigError(f"layers={spec!r}: layers are counted from 0 upwards, write {FORMS}")
    return sorted(chosen)


def _listed(indices: list[int]) -> list[int]:
    if not indices:
        raise ConfigError(f"layers=[] names no layer: write {FORMS}")
    if len(set(indices)) < len(indices):
        raise ConfigError(f"layers={indices}: a layer stands twice, name each once")
    return list(indices)


def _worded(spec: str, depth: int, known: bool) -> list[int]:
    if spec == "all":
        return list(range(depth)) if known else []
    if match := re.fullmatch(r"(\d+)\s*-\s*(\d+)", spec):
        first, last = map(int, match.groups())
        if last < first or last - first > 10_000:
            raise ConfigError(f"layers={spec!r} is an empty or endless range: write the lower index first")
        return list(range(first, last + 1))
    if re.fullmatch(r"\d+(\s*-\s*\d+){2,}|\d+(\s*,\s*\d+)*", spec):
        return _listed([int(number) for number in re.findall(r"\d+", spec)])
    if match := re.fullmatch(r"every\s+(\d+)", spec):
        stride = int(match.group(1))
        if not stride or (known and stride > depth):
            raise ConfigError(f"layers={spec!r}: the stride must lie between 1 and the number of layers")
        return list(range(depth - 1, -1, -stride)) if known else []
    if match := re.fullmatch(r"(first|last)\s+(\S+)", spec):
        count = _count(match.group(2), spec, depth, known)
        return list(range(count) if match.group(1) == "first" else range(depth - count, depth)) if known else []
    raise ConfigError(f"layers={spec!r} is not understood: write {FORMS}")


def _count(word: str, spec: str, depth: int, known: bool) -> int:
    if word.isdecimal():
        count = int(word)
        if not count or (known and count > depth):
            raise ConfigError(
                f"layers={spec!r}: this model has layers 0 to {depth - 1}"
                if known
                else f"layers={spec!r} names no layer: write {FORMS}"
            )
        return count
    fraction = FRACTIONS.get(word) or (float(word) if re.fullmatch(r"\d*\.\d+|\d+\.\d*", word) else 0.0)
    if not 0 < fraction <= 1:
        raise ConfigError(f"layers={spec!r}: {word!r} is no number of layers and no fraction, write {FORMS}")
    return max(1, round(depth * fraction))
