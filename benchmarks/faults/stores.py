"""The feature cache and the models on disk: damaged, cut, replaced."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.faults import world
from benchmarks.faults.lab import Lab, Left
from benchmarks.faults.suite import Found, fault, refused_at_start


def with_cache(lab: Lab, case: Path) -> dict[str, str]:
    """A cache of the case's own, filled by a run of two steps."""
    env = {"MITRAIN_CACHE": str(case / "cache")}
    ended = lab.run("train", lab.world / "config.yaml", "train.steps=2", "--run-dir", case / "first", **env)
    if ended.code:
        raise RuntimeError(ended.err[-500:])
    return env


def damaged(lab: Lab, case: Path, damage: Callable[[Path], object]) -> Found:
    """Noticed, named, computed again: the run equals the undisturbed one."""
    env = with_cache(lab, case)
    files = sorted(p for p in (case / "cache").rglob("*") if p.suffix in (".npy", ".bin", ".safetensors") and p.is_file())
    for path in files:
        damage(path)
    ended = lab.run("train", lab.world / "config.yaml", "--run-dir", case / "run", **env)
    named = [line for line in ended.lines if "cache" in line or any(p.parent.name in line for p in files)]
    equal = ended.code == 0 and Left.of(case / "run").equals(lab.undisturbed())
    state = ended.state if named or ended.code else "silent"
    return Found(bool(files), state, ended.seconds, 0, equal, " / ".join(named[:1]))


@fault("went on", quick=True)
def cache_rows_moved(lab: Lab, case: Path) -> Found:
    return damaged(lab, case, lambda path: rewrite(path, lambda rows: np.roll(rows, 1, 0)))


@fault("went on")
def cache_of_nan(lab: Lab, case: Path) -> Found:
    return damaged(lab, case, lambda path: rewrite(path, lambda rows: np.full_like(rows, np.nan)))


@fault("went on")
def cache_bit_flipped(lab: Lab, case: Path) -> Found:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-3] ^= 8
        path.write_bytes(content)

    return damaged(lab, case, flip)


@fault("went on")
def cache_cut(lab: Lab, case: Path) -> Found:
    return damaged(lab, case, lambda path: os.truncate(path, path.stat().st_size // 2))


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Other numbers in the same form."""
    if path.suffix == ".npy":
        rows = np.load(path)
        if rows.dtype.kind == "f":
            np.save(path, change(rows))


@fault("went on")
def cache_cut_while_in_use(lab: Lab, case: Path) -> Found:
    """No SIGBUS: what had been opened stays valid, or is computed again."""
    env, run, fired = with_cache(lab, case), case / "run", case / "fired"
    injection = ("cut", 3, "*.npy", str(case / "cache"))
    process = lab.start("train", lab.world / "config.yaml", "--run-dir", run, inject=injection, fired=fired, **env)
    ended = process.wait()
    equal = ended.code == 0 and Left.of(run).equals(lab.undisturbed())
    return Found(fired.exists(), ended.state, ended.seconds, 0, equal, " / ".join(ended.lines[:1]))


@fault("went on")
def picture_replaced_while_encoded(lab: Lab, case: Path) -> Found:
    """A later run finds the features of the picture that is there, whatever the first one saw."""
    here, env = lab.other_world(case), {"MITRAIN_CACHE": str(case / "cache")}
    target, other, original = here / "data" / "images" / "3.png", case / "other.png", case / "original.png"
    world.picture("red", 99).save(other)
    shutil.copyfile(target, original)
    injection, fired = ("replaced_while_read", str(target), str(other)), case / "fired"
    process = lab.start("train", here / "config.yaml", "--run-dir", case / "first", inject=injection, fired=fired, **env)
    first = process.wait()
    shutil.copyfile(original, target)
    ended = lab.run("train", here / "config.yaml", "--run-dir", case / "second", **env)
    equal = ended.code == 0 and Left.of(case / "second").equals(lab.undisturbed())
    state = ended.state if first.state in ("went on", "refused") else first.state
    return Found(fired.exists(), state, ended.seconds, 0, equal, " / ".join(first.lines[:1]))


def without(path: Path, *parts: str) -> None:
    """Takes tensors out of a model's file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}
    if len(kept) == len(tensors):
        raise RuntimeError(f"{path} has no tensor named like {parts}")
    save_file(kept, path, {"format": "pt"})


def lacking(lab: Lab, case: Path, model: str, *parts: str) -> Found:
    here = lab.other_world(case)
    without(here / model / "model.safetensors", *parts)
    return refused_at_start(lab.run("train", here / "config.yaml", "--run-dir", case / "run"), parts[0])


@fault("refused", quick=True)
def encoder_lacks_an_attention_block(lab: Lab, case: Path) -> Found:
    return lacking(lab, case, "vision", "layer.1.attention")


@fault("refused")
def language_model_lacks_its_embeddings(lab: Lab, case: Path) -> Found:
    return lacking(lab, case, "llm", "embed_tokens")


@fault("refused")
def language_model_lacks_a_layer(lab: Lab, case: Path) -> Found:
    return lacking(lab, case, "llm", "layers.2.")


@fault("refused")
def base_weights_of_nan(lab: Lab, case: Path) -> Found:
    """In every precision, as with int8: no score is made of such weights."""
    from safetensors.torch import load_file, save_file

    here = lab.other_world(case)
    file = here / "llm" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    return refused_at_start(lab.run("train", here / "config.yaml", "--run-dir", case / "run"), "finite")


@fault("refused")
def kernel_named_in_a_models_configuration(lab: Lab, case: Path) -> Found:
    """Nothing is fetched for it."""
    here = lab.other_world(case)
    file = here / "llm" / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) | {"_attn_implementation": "owner/kernel"}
    file.write_text(json.dumps(values), encoding="utf-8")
    return refused_at_start(lab.run("train", here / "config.yaml", "--run-dir", case / "run"), "owner/kernel")


@fault("refused")
def adapter_beside_the_base(lab: Lab, case: Path) -> Found:
    """Whatever is installed: it is not put into the base unasked."""
    here = lab.other_world(case)
    (here / "llm" / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    return refused_at_start(lab.run("train", here / "config.yaml", "--run-dir", case / "run"), "adapter_config.json")


@fault("refused")
def most_pictures_missing(lab: Lab, case: Path) -> Found:
    here = lab.other_world(case)
    for number in range(18):
        (here / "data" / "images" / f"{number}.png").unlink()
    ended = lab.run("train", here / "config.yaml", "--run-dir", case / "run")
    return Found(True, ended.state, ended.seconds, said=" / ".join(ended.lines[-1:]))
