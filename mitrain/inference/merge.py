"""Folding a run's adapter into the frozen weights: plain models that need neither the adapter nor mitrain.

OUT/text/            the language model or text encoder with its tokenizer, as save_pretrained writes them
OUT/NAME/            the first encoder under its name, as image, where the method changes it, with its preprocessing
OUT/head.safetensors the task's head and feature statistics, by name
OUT/merged.json      the run's configuration, its step and what was merged
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from mitrain.core.errors import CheckpointError
from mitrain.core.files import atomic_folder, remedy, write_json
from mitrain.methods import export_format
from mitrain.models import ImageEncoder, loading
from mitrain.models.encoders import AudioEncoder
from mitrain.models.encoders.audio import FAMILIES
from mitrain.training import runs
from mitrain.training.build import Model


def export_merged(run_dir: str | Path, out: str | Path, which: str = "best") -> dict[str, Any]:
    """Write a run's backbones with its adapter merged into them to the new folder ``out``; returns what was written.

    ModelError where the method depends on each sample's files, or a part of it does not fold; nothing is written then.
    """
    out = export_format.check_target(out)
    run = runs.open_run(run_dir, which)
    model, changed = run.model, set(run.model.adapter.traits.backbones)
    run.model.adapter.merge()
    contents = {
        "method": run.config.adapter.section_name,
        "step": run.saved.step,
        "models": ["text", *([next(iter(model.encoders))] if "encoder" in changed else [])],
        "config": export_format.settings_from(run.config.to_dict(), out),
    }
    try:
        with atomic_folder(out) as work:
            write_models(model, changed, work)
            parts: dict[str, nn.Module] = {"head": model.task, "features": model.norm}
            head = {
                f"{part}.{name}": tensor.detach().cpu().clone().contiguous()
                for part, module in parts.items()
                for name, tensor in module.state_dict().items()
            }
            save_file(head, work / "head.safetensors", metadata={"format": "pt"})
            write_json(work / "merged.json", contents)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {str(out)!r} ({error.strerror or error}): {remedy(error)} or give another folder"
        ) from None
    return {"folder": str(out), "files": sorted(path.name for path in out.iterdir()), "step": run.saved.step}


def write_models(model: Model, changed: set[str], folder: Path) -> None:
    """The merged backbones as Hugging Face's folders."""
    write(model.text.model, folder / "text")
    with loading.quiet():
        model.text.tokenizer.save_pretrained(folder / "text")
    if "encoder" in changed:
        name, encoder = next(iter(model.encoders.items()))
        write(encoder.model, folder / name, FAMILIES[encoder.family].part if isinstance(encoder, AudioEncoder) else "")
        if isinstance(encoder, ImageEncoder):
            used = encoder.preprocess
            values = {
                "image_mean": list(used.mean),
                "image_std": list(used.std),
                "size": {"height": used.size, "width": used.size},
            }
            write_json(folder / name / "preprocessor_config.json", values)
        else:
            reader = encoder.extractor if isinstance(encoder, AudioEncoder) else encoder.backbone.tokenizer
            reader.save_pretrained(folder / name)


def write(model: PreTrainedModel, folder: Path, part: str = "") -> None:
    """``part``: of a whole model, whose configuration this has, the module that it is: it is read by that name."""
    named = {f"{part}.{name}": tensor for name, tensor in model.state_dict().items()} if part else None
    with loading.quiet():
        model.save_pretrained(folder, state_dict=named)
