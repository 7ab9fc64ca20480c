"""What decides a run's numbers, as named parts that two processes, or a run and its checkpoint, compare before a step.

A fingerprint is a flat ``{name: value}`` of strings, and is JSON as it stands:

    code.mitrain, code.sources, code.torch …   versions, and a digest of mitrain's own source files
    config.KEY                                 each value of the resolved configuration, as config.train.lr
    data.SPLIT.samples, data.SPLIT.FIELD       how many samples, and a digest of each of their fields, in order
    data.SPLIT.INPUT, data.SPLIT.INPUT.content a digest of the paths of an input's files, and of their contents
    base.NAME                                  a digest of frozen weights, as the caller made it
    base.NAME.settings, base.NAME.config.json  two of a frozen model's configuration, of which one must be the same

A digest tells that a part differs, not where: a checkpoint of a million samples holds as much of it as one of ten.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mitrain.core import dist
from mitrain.core.errors import RankError
from mitrain.core.provenance import MARK, digest, versions
from mitrain.core.version import __version__
from mitrain.data.columns import column, input_names, paths

SETTINGS, WRITTEN = ".settings", ".config.json"
SHOWN = 6  # differences that a message names
LONGEST = 60  # characters of a value in a message
OURS = ("mitrain", "mitrain_kernels", "kernels/mitrain_kernels")  # installed, or in a checkout


def fingerprint(
    config: Mapping[str, Any],
    splits: Mapping[str, Sequence[Any]],
    content: Callable[[Any], Mapping[str, str | None]],
    base: Mapping[str, str],
) -> dict[str, str]:
    """The parts of a run on ``splits`` of samples (dataclasses of `mitrain.data.samples.Sample`).

    ``config``: as ``RunConfig.to_dict()`` gives it. ``content``: the digests of a sample's files, as
    ``Features.contents``. ``base``: digests of the frozen weights by name.
    """
    return {
        **code_parts(),
        **{f"config.{name}": value for name, value in flat(config).items()},
        **digests_of(splits, content),
        **{f"base.{name}": value for name, value in base.items()},
    }


def digests_of(splits: Mapping[str, Sequence[Any]], content: Callable[[Any], Mapping[str, str | None]]) -> dict[str, str]:
    return {
        f"data.{split}.{name}": value for split, samples in splits.items() for name, value in of_samples(samples, content)
    }


@cache
def code() -> dict[str, str]:
    """Versions of what computes, and a digest of mitrain's and its kernels' Python files."""
    root = Path(__file__).parents[2]
    paths = [path for folder in OURS for path in sorted((root / folder).rglob("*.py"))]
    files = ((path.parent.name, path.name, path.read_text("utf-8")) for path in paths)
    return {"mitrain": __version__, "sources": digest(files), **versions(("torch", "transformers"))}


def code_parts() -> dict[str, str]:
    """The code alone: what ranks can compare before they have loaded anything."""
    return {f"code.{name}": value for name, value in code().items()}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested sections as ``{"train.lr": "0.001"}``: values are JSON."""
    entries: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            if key == "encoders":  # features stand side by side in this order, and the first one is what methods change
                entries[f"{prefix}{key}"] = json.dumps(list(value), ensure_ascii=False)
            entries |= flat(value, f"{prefix}{key}.")
        else:
            entries[f"{prefix}{key}"] = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return entries


def of_samples(samples: Sequence[Any], content: Callable[[Any], Mapping[str, str | None]]) -> Iterator[tuple[str, str]]:
    """The count of ``samples``, and by field, and for each input's paths and contents, a digest in their order."""
    yield "samples", str(len(samples))
    for field in fields(samples[0]) if samples else ():
        if field.name != "inputs" and field.compare:
            yield field.name, digest(column(samples, field.name))
    for name in input_names(samples):
        yield name, digest(paths(samples, name))
        # Many samples share a file: each is asked for once, and not each sample.
        of_file = cache(lambda path, name=name: path and content(SimpleNamespace(inputs={name: path})).get(name))
        yield f"{name}.content", digest(map(of_file, paths(samples, name)))


def require_same(own: Mapping[str, str]) -> None:
    """All ranks together; RankError on each of them that names what differs from rank 0's parts, and on which ranks."""
    first, *others = dist.gather(dict(own))
    where: dict[str, list[int]] = {}
    for rank, other in enumerate(others, 1):
        for name in dict.fromkeys([*first, *other]):
            if first.get(name) != other.get(name):
                where.setdefault(name, []).append(rank)
    if where:
        phrases = [unlike(name, [first, *others], ranks) for name, ranks in where.items()]
        raise RankError(
            f"the ranks would not run the same: {listed(phrases)}; give all of them the same arguments, files and versions"
        )


def unlike(name: str, parts: Sequence[Mapping[str, str]], ranks: Sequence[int]) -> str:
    """As "config.seed is 0 on rank 0, 1 on rank 2" and, of digests, "data.train.answer of ranks 1, 3 is not rank 0's"."""
    here, there = parts[0].get(name), parts[ranks[0]].get(name)
    if here is not None and here.startswith(MARK):
        return f"{name} of rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:SHOWN]))} is not rank 0's"
    return f"{name} is {brief(here)} on rank 0, {brief(there)} on rank {ranks[0]}"


def differences(there: Mapping[str, str], here: Mapping[str, str], ignoring: Iterable[str] = ()) -> list[str]:
    """A phrase for every part that differs, in ``here``'s order; parts under the names ``ignoring`` do not count.

    As "config.train.lr is 0.001 there, 0.5 here" and, of digests, "data.train.answer differs".
    """
    skipped = tuple(f"{name}." for name in ignoring)
    names = [name for name in dict.fromkeys([*here, *there]) if not f"{name}.".startswith(skipped)]
    names = [name for name in names if not name.endswith(WRITTEN) and not same_file(name, there, here)]
    return [phrase(name, there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)]


def same_file(name: str, there: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Whether ``name`` is of settings that another transformers may have read from the very same config.json."""
    written = name.removesuffix(SETTINGS) + WRITTEN
    return name.endswith(SETTINGS) and there.get(written) == here.get(written) is not None


def phrase(name: str, there: str | None, here: str | None) -> str:
    if there is not None and here is not None and there.startswith(MARK) and here.startswith(MARK):
        return f"{name} differs"
    return f"{name} is {brief(there)} there, {brief(here)} here"


def brief(value: str | None) -> str:
    if value is None:
        return "absent"
    text = "a digest" if value.startswith(MARK) else value
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def listed(phrases: Sequence[str], most: int = SHOWN) -> str:
    """One line of at most ``most`` phrases, and how many more there are."""
    more = f"; and {len(phrases) - most} more" if len(phrases) > most else ""
    return "; ".join(phrases[:most]) + more
