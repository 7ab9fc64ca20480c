"""The floor plan, held by a walk over every syntax tree: what may import what, and who holds the key to which door.

A module may import what stands on a lower floor, and its own room; nothing on its own floor, nothing above it.
An import inside a function, under ``TYPE_CHECKING`` or by name counts like any other (see ``source_tree``).
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from source_tree import ROOT, dotted, imports, our_files

# From the ground up. A room is a file or a folder right under mitrain/.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("terminal",),  # how text is shown
    ("errors",),
    ("parsing", "waiting", "wandb_process"),  # what comes from outside, within bounds; how long a process waits
    (
        "config",
        "dist",
        "files",
        "costs",
        "hf",
        "markdown",
        "launchers",
        "provenance",
        "reading",
        "untrusted",
    ),  # L0: arithmetic, files, what a Hugging Face model looks like
    ("schedule", "quant", "pretrained", "trunk", "stack", "ownership"),
    ("doctor", "adapters", "backbones", "prepare", "tasks", "data"),  # L1: one paper, format or task per file
    # L2: machinery, handed its objects
    (
        "engine",
        "checkpoint",
        "fingerprint",
        "guard",
        "telemetry",
        "features",
        "evaluate",
        "cautions",
        "figures",
        "probe",
    ),
    ("states",),  # features of what methods change
    ("schema",),  # the configuration of all of them
    ("model",),  # backbones + adapter + task
    ("runs", "dryrun"),
    ("floors", "resume"),
    ("trainer", "scoring"),  # L3
    ("report", "export", "merge"),
    ("bench",),  # whole runs, beside one another
    ("compare",),  # many of them, and what they say of claims
    ("cli",),  # L4
    ("__main__",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# The package's front: shows what adapters/ and export offer, and nobody inside goes through it except for the version.
FRONT = "__init__"
FRONT_SHOWS = ("adapters", "export")

# Optional or heavy packages, each behind one door; a folder ends with a slash.
DOORS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("mitrain/training/engine/",),
    "bitsandbytes": ("mitrain/models/quant/",),
    "peft": ("benchmarks/", "mitrain/methods/peft.py"),
    "wandb": ("mitrain/training/telemetry.py", "mitrain/training/wandb_process.py"),
    "triton": ("kernels/mitrain_kernels/",),
    "mitrain_kernels": ("mitrain/methods/", "mitrain/models/", "kernels/mitrain_kernels/"),
}


def room_of(name: str) -> str:
    """The room of mitrain that a dotted name enters; ``mitrain`` itself and ``mitrain.attach`` enter by the front."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR_OF else FRONT


def layer_fault(path: str, name: str) -> str | None:
    """Why a file of mitrain may not import ``name`` (a name inside mitrain), or None."""
    here, there = room_of(dotted(path)), room_of(name)
    if here == there or name == "mitrain.__version__":
        return None
    if here == FRONT:
        return None if there in FRONT_SHOWS else f"the front shows only {FRONT_SHOWS}"
    if there == FRONT:
        return "nobody inside goes through mitrain/__init__.py: import the module itself"
    if FLOOR_OF[there] < FLOOR_OF[here]:
        return None
    return f"{there} does not stand below {here}"


def door_fault(path: str, name: str) -> str | None:
    doors = DOORS.get(name.split(".")[0])
    if doors is None or path in doors or path.startswith(tuple(door for door in doors if door.endswith("/"))):
        return None
    return f"only {', '.join(doors)} may import {name.split('.')[0]}"


def faults(files: Mapping[str, str]) -> list[str]:
    """Everything in ``files`` (path → source) that the floor plan forbids, one line each."""
    found = []
    for path, source in files.items():
        parts = Path(path).parts
        room = parts[1].removesuffix(".py")
        if parts[0] == "mitrain" and room not in FLOOR_OF and room != FRONT:
            found.append(f"{path}: no floor yet: give {room!r} its place in FLOORS of tests/test_layers.py")
            continue
        if Path(path).stem in sys.stdlib_module_names:
            found.append(f"{path}: named like a module of the standard library")
        for line, name in imports(path, source):
            reason = door_fault(path, name)
            if name.split(".")[0] == "mitrain":
                reason = layer_fault(path, name) if parts[0] == "mitrain" else "the kernels know nobody of ours"
            if reason:
                found.append(f"{path}:{line}: imports {name}: {reason}")
    return found


def test_every_import_goes_down_and_every_door_is_kept():
    found = faults(our_files())
    assert not found, "\n".join(found)


def test_kernels_is_a_folder_and_not_a_package():
    assert (ROOT / "kernels" / "mitrain_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def fault_of(path: str, source: str) -> str:
    (fault,) = faults({path: source})
    return fault


def test_imports_upwards_and_sideways_are_seen():
    assert "does not stand below" in fault_of("mitrain/core/config.py", "from mitrain.training.trainer import Trainer")
    assert "does not stand below" in fault_of("mitrain/core/config.py", "def f():\n    from mitrain import trainer")
    assert "does not stand below" in fault_of("mitrain/data/x.py", "import mitrain.tasks.base")
    assert "does not stand below" in fault_of("mitrain/data/x.py", "from ..tasks import base")
    assert "does not stand below" in fault_of(
        "mitrain/training/guard.py", "importlib.import_module('mitrain.training.build')"
    )
    assert (
        faults({"mitrain/data/x.py": "from .images import open_image\nfrom mitrain.core.errors import DataError"}) == []
    )


def test_the_front_is_no_passage():
    assert "nobody inside" in fault_of("mitrain/training/trainer.py", "from mitrain import attach")
    assert "the front shows only" in fault_of("mitrain/__init__.py", "from mitrain.training.trainer import Trainer")
    assert faults({"examples/demo/mitrain_demo/x.py": "from mitrain import __version__"}) == []


def test_doors_are_seen():
    assert "only mitrain/training/telemetry.py, mitrain/training/wandb_process.py" in fault_of(
        "mitrain/training/trainer.py", "import wandb.sdk"
    )
    assert "only mitrain/training/telemetry.py, mitrain/training/wandb_process.py" in fault_of(
        "mitrain/training/trainer.py", "need_extra('wandb', 'wandb', 'logging')"
    )
    assert "only mitrain/training/engine/" in fault_of("mitrain/checkpoint.py", "def f():\n    import deepspeed")
    assert "only mitrain/models/quant/" in fault_of("mitrain/models/x.py", "from bitsandbytes import nn")
    assert "only kernels/mitrain_kernels/" in fault_of("mitrain/methods/x.py", "import triton.language as tl")
    assert "may import mitrain_kernels" in fault_of(
        "mitrain/training/build.py", "from mitrain_kernels import infused_attention"
    )
    assert "the kernels know nobody" in fault_of(
        "kernels/mitrain_kernels/x.py", "from mitrain.core.errors import UserError"
    )
    assert faults({"mitrain/training/telemetry.py": "need_extra('wandb', 'wandb', 'logging')"}) == []


def test_new_rooms_and_standard_names_are_seen():
    assert "give 'newroom' its place" in fault_of("mitrain/newroom.py", "")
    assert "give 'newroom' its place" in fault_of("mitrain/newroom/x.py", "")
    assert "standard library" in fault_of("mitrain/methods/select.py", "")
