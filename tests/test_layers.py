"""The plan of the package, held by a walk over every syntax tree: which folder may import which, and who may import an
optional or heavy package. ``python tests/test_layers.py`` prints the plan as the imports draw it.

A folder imports only what stands before it in its row of LAYERS; inside a folder imports are free. An import inside a
function, under ``TYPE_CHECKING`` or by name counts like any other (see ``source_tree``).
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from source_tree import ROOT, dotted, imports, our_files

# From the ground up; folders of one row do not import each other. The package's front shows what users import.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("core",),  # settings, files, processes, errors
    ("models",),  # the frozen side
    ("data", "methods"),
    ("tasks",),
    ("training",),
    ("inference",),  # what is made of a trained run
    ("compare",),  # many runs beside one another
    ("cli",),
    ("__init__", "__main__"),
)
LAYER_OF = {folder: number for number, row in enumerate(LAYERS) for folder in row}

# What may import an optional or heavy package, or one of our own that lies beside mitrain; a folder ends with a slash.
ALLOWED: dict[str, tuple[str, ...]] = {
    "av": ("mitrain/data/containers.py",),
    "deepspeed": ("mitrain/training/engine/",),
    "bitsandbytes": ("mitrain/models/quant/",),
    "datasets": ("mitrain/core/hub.py",),
    "matplotlib": ("mitrain/compare/plots.py", "mitrain/training/curves.py"),
    "pyarrow": ("mitrain/data/tables.py",),
    "soundfile": ("mitrain/data/audio.py",),
    "soxr": ("mitrain/data/audio.py",),
    "peft": ("mitrain/methods/peft.py",),
    **dict.fromkeys(("mlflow", "tensorboard", "trackio", "wandb"), ("mitrain/training/tracker_process.py",)),
    "triton": ("kernels/mitrain_kernels/",),
    "mitrain_kernels": ("mitrain/methods/", "mitrain/models/", "kernels/mitrain_kernels/"),
    "benchmarks": (),
    "mitrain_demo": (),
}


def folder_of(name: str) -> str:
    """The folder of mitrain that a dotted name enters; ``mitrain`` itself and ``mitrain.attach`` enter by the front."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYER_OF else "__init__"


def layer_fault(path: str, name: str) -> str | None:
    """Why a file of mitrain may not import ``name`` (a name inside mitrain), or None."""
    here, there = folder_of(dotted(path)), folder_of(name)
    if here == there or LAYER_OF[there] < LAYER_OF[here]:
        return None
    if there == "__init__":
        return "import the module itself, not through mitrain/__init__.py"
    return f"{there} does not stand below {here}"


def package_fault(path: str, name: str) -> str | None:
    allowed = ALLOWED.get(name.split(".")[0])
    if allowed is None or path in allowed or path.startswith(tuple(folder for folder in allowed if folder.endswith("/"))):
        return None
    return f"only {', '.join(allowed) or 'nothing installed'} may import {name.split('.')[0]}"


def faults(files: Mapping[str, str]) -> list[str]:
    """Everything in ``files`` (path → source) that the plan forbids, one line each."""
    found = []
    for path, source in files.items():
        parts = Path(path).parts
        folder = parts[1].removesuffix(".py")
        if parts[0] == "mitrain" and folder not in LAYER_OF:
            found.append(f"{path}: in no layer: give {folder!r} its place in LAYERS of tests/test_layers.py")
            continue
        if Path(path).stem in sys.stdlib_module_names:
            found.append(f"{path}: named like a module of the standard library")
        for line, name in imports(path, source):
            reason = package_fault(path, name)
            if name.split(".")[0] == "mitrain":
                reason = layer_fault(path, name) if parts[0] == "mitrain" else "the kernels import nothing of mitrain"
            if reason:
                found.append(f"{path}:{line}: imports {name}: {reason}")
    return found


def arrows(files: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """(folder, folder that it imports) → by how many imports."""
    found: Counter[tuple[str, str]] = Counter()
    for path, source in files.items():
        here = folder_of(dotted(path)) if path.startswith("mitrain/") else "mitrain_kernels"
        for _, name in imports(path, source):
            top = name.split(".")[0]
            there = folder_of(name) if top == "mitrain" else top
            if there != here and (there in LAYER_OF or there == "mitrain_kernels"):
                found[here, there] += 1
    return found


def plan(files: Mapping[str, str]) -> Iterator[str]:
    """A line for each folder, from the top down: its lines of code, and what it imports."""
    drawn = arrows(files)
    lines: Counter[str] = Counter()
    for path, source in files.items():
        lines[folder_of(dotted(path)) if path.startswith("mitrain/") else "mitrain_kernels"] += source.count("\n")
    for folder in [*(folder for row in reversed(LAYERS) for folder in row), "mitrain_kernels"]:
        below = ", ".join(f"{there} ({count})" for (here, there), count in sorted(drawn.items()) if here == folder)
        yield f"{folder:16}{lines[folder]:6} lines   {below}"
    yield f"{len(drawn)} arrows"


def test_every_import_goes_down_and_every_package_has_its_place():
    found = faults(our_files())
    assert not found, "\n".join(found)


def test_the_plan_is_drawn_from_the_imports():
    drawn = list(plan({"mitrain/data/x.py": "from mitrain.core import files\n", "mitrain/core/files.py": ""}))
    assert "data                 1 lines   core (1)" in drawn
    assert drawn[-1] == "1 arrows"


def test_kernels_is_a_folder_and_not_a_package():
    assert (ROOT / "kernels" / "mitrain_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def fault_of(path: str, source: str) -> str:
    (fault,) = faults({path: source})
    return fault


def test_imports_upwards_and_sideways_are_seen():
    below = "does not stand below"
    assert below in fault_of("mitrain/core/config.py", "from mitrain.training.trainer import Trainer")
    assert below in fault_of("mitrain/core/config.py", "def f():\n    from mitrain.training import trainer")
    assert below in fault_of("mitrain/data/x.py", "import mitrain.tasks.base")
    assert below in fault_of("mitrain/data/x.py", "from ..tasks import base")
    assert below in fault_of("mitrain/data/x.py", "from mitrain.methods import base")
    assert below in fault_of("mitrain/models/x.py", "importlib.import_module('mitrain.training.build')")
    assert below in fault_of("mitrain/core/x.py", "from mitrain import training")
    assert faults({"mitrain/data/x.py": "from .images import open_image\nfrom mitrain.core.errors import DataError"}) == []


def test_the_front_is_no_passage():
    assert "import the module itself" in fault_of("mitrain/training/trainer.py", "from mitrain import attach")
    assert faults({"mitrain/__init__.py": "from mitrain.inference.export import load_adapter"}) == []


def test_optional_packages_are_seen():
    wandb = "only mitrain/training/tracker_process.py may"
    assert wandb in fault_of("mitrain/training/trainer.py", "import wandb.sdk")
    assert wandb in fault_of("mitrain/training/trainer.py", "need_extra('wandb', 'wandb', 'logging')")
    assert "only mitrain/training/engine/" in fault_of("mitrain/training/x.py", "def f():\n    import deepspeed")
    assert "only mitrain/models/quant/" in fault_of("mitrain/models/x.py", "from bitsandbytes import nn")
    assert "only kernels/mitrain_kernels/" in fault_of("mitrain/methods/x.py", "import triton.language as tl")
    assert "may import mitrain_kernels" in fault_of("mitrain/tasks/x.py", "from mitrain_kernels import infused_attention")
    assert "import nothing" in fault_of("kernels/mitrain_kernels/x.py", "from mitrain.core.errors import UserError")
    assert "nothing installed may import benchmarks" in fault_of("mitrain/cli/x.py", "from benchmarks import parity")
    assert "nothing installed may" in fault_of("mitrain/core/x.py", "from mitrain_demo import MODELS")
    assert faults({"mitrain/training/tracker_process.py": "need_extra('wandb', 'wandb', 'logging')"}) == []


def test_new_folders_and_standard_names_are_seen():
    assert "give 'newfolder' its place" in fault_of("mitrain/newfolder.py", "")
    assert "give 'newfolder' its place" in fault_of("mitrain/newfolder/x.py", "")
    assert "standard library" in fault_of("mitrain/methods/select.py", "")


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by their names alone, and a second one ends the run of the whole suite."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]


if __name__ == "__main__":
    print(*plan(our_files()), sep="\n")
