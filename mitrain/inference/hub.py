"""Publishing an export on the Hugging Face Hub, without folders of this machine and answers of private data."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors.torch import load_file

from mitrain import methods
from mitrain.core import config
from mitrain.core.errors import CheckpointError, ConfigError
from mitrain.core.hub import PREFIX
from mitrain.inference.export import licences
from mitrain.methods import export_format
from mitrain.methods.export_format import Contents, hub
from mitrain.methods.export_format.card import hub_dataset
from mitrain.methods.export_format.folder import CARD, PEFT_CONFIG, PEFT_WEIGHTS, PeftFiles


def push_to_hub(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    license: str | None = None,
    base: str | None = None,
    encoders: Sequence[str] | None = None,
    answers: bool = False,
) -> str:
    """Upload the export ``folder`` to the repository ``name`` (USER/NAME), made where it is not there; returns its address.

    ``base`` and ``encoders``: the frozen models' names on the Hub, where the export names folders. Of the data's folder the
    last part is published, and the training answers and class names only with ``answers`` or of data that mitrain prepared.
    ``license``: of the adapter, as the Hub names licences. Raises ConfigError where a folder of this machine, or class names
    of one's own data, would be published, and
    CheckpointError where the export is damaged or the Hub refuses; nothing is uploaded then.
    """
    if not hub.HUB_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name of a repository: give USER/NAME")
    published = export_format.read(folder)
    values = without_private(published.contents, base, encoders, answers)
    with tempfile.TemporaryDirectory() as work:
        copy = export_format.publish(
            Path(work) / "export",
            values,
            published.tensors,
            lambda contents: card_of(Path(folder), published.contents, contents, license),
            peft_again(Path(folder), published.contents, values),
        )
        try:
            api = hub.api()
            repository = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=copy, commit_message="mitrain push")
        except hub.FAILURES as error:
            raise CheckpointError(
                f"the Hub does not take {name!r} ({hub.first(error)}): log in with a token that may write to it (hf auth"
                " login, or HF_TOKEN)"
            ) from None
    return str(repository)


def without_private(contents: Contents, base: str | None, encoders: Sequence[str] | None, answers: bool) -> dict[str, Any]:
    values = contents.to_dict()
    values["base_model_name_or_path"] = base or contents.base_model_name_or_path
    if run := values["run"]:
        named, data = run["config"]["model"]["encoders"], run["config"]["data"]
        given = [part["name"] for part in named.values()] if encoders is None else encoders
        if len(given) != len(named):
            raise ConfigError(f"{len(given)} encoders were given, the adapter has {len(named)}: give one for each")
        for part, encoder in zip(named.values(), given, strict=True):
            part["name"] = encoder
        data["root"] = os.path.basename(data["root"]) if data.get("root") else data.get("root")
        source = data.get("source") or ""
        own = not source or source.startswith(PREFIX)  # hf:ID may be nobody else's, too
        if source.startswith(PREFIX) and hub_dataset(source) is None:
            data["source"] = PREFIX + os.path.basename(source.rstrip("/"))
        run["answers"] = run["answers"] if answers or not own else None
        if own and not answers and (classes := data.get("classes")):
            raise ConfigError(
                f"the export has the names of {len(classes)} classes of data of your own ({', '.join(classes)[:60]}), which"
                " would be published: allow that with --answers (in Python answers=True)"
            )
    for key, text in texts(values):
        model = key == "base_model_name_or_path" or ".model.encoders." in key
        if text.startswith(("/", "~", "../")) or (model and os.path.isdir(os.path.expanduser(text))):
            raise ConfigError(
                f"{key} of the export is {text!r}, a folder of this machine, which would be published: name the model on"
                " the Hub with --base USER/NAME and one --encoder USER/NAME for each encoder"
                if model
                else f"{key} of the export is {text!r}, a path of this machine, which would be published: train with"
                " paths inside data.root"
            )
    return values


def texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of the nested ``values`` but answers and class names, with the keys that lead to it."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, list | dict) and not key.endswith((".answers", ".metrics", ".classes")):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from texts(value, f"{key}.{name}".lstrip("."))


def card_of(folder: Path, before: Contents, contents: Contents, license: str | None) -> str:
    """The model card, as its user has edited it or made anew, with the names of what is published."""
    adapter = methods.build(config.choose("adapter", contents.adapter))
    known, alone = licences(), adapter.traits.backbones == ("text",)
    kept = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else None
    written = kept in (None, export_format.model_card(before, known, alone))
    card = ModelCard(export_format.model_card(contents, known, alone) if written else kept, ignore_metadata_errors=True)
    card.data.license = license or card.data.license
    if hub.HUB_NAME.fullmatch(contents.base_model_name_or_path):
        card.data.base_model = contents.base_model_name_or_path
    return str(card)


def peft_again(folder: Path, contents: Contents, values: Mapping[str, Any]) -> PeftFiles:
    """What PEFT's own files hold, with the names that the frozen models are published under in ``values``."""
    encoders = values["run"]["config"]["model"]["encoders"] if values["run"] else {}
    encoder = next((part["name"] for part in encoders.values()), None)
    files = {}
    for name in contents.peft or {}:
        place, _, file = name.rpartition("/")
        if file == PEFT_CONFIG:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
            base = encoder if place == "encoder" else values["base_model_name_or_path"]
            files[f"{place}/".lstrip("/")] = (
                {**settings, "base_model_name_or_path": base},
                load_file(folder / place / PEFT_WEIGHTS),
            )
    return files
