"""mitrain: frozen language models that see and hear, by training a small adapter beside them.

    import mitrain
    mit = mitrain.attach(model, mitrain.MiTConfig(modalities={"image": 768}, layers="last third"))

The command line and the packaging must not pay for torch and transformers: they are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mitrain.core.version import __version__

if TYPE_CHECKING:
    from mitrain.inference.export import from_pretrained, load_adapter
    from mitrain.inference.hub import push_to_hub
    from mitrain.methods.mit.bound import set_adapter, using_adapter
    from mitrain.methods.mit.mit import MiT, MiTConfig, attach
    from mitrain.methods.trainer_callback import AdapterCallback

__all__ = [
    "AdapterCallback",
    "MiT",
    "MiTConfig",
    "__version__",
    "attach",
    "from_pretrained",
    "load_adapter",
    "push_to_hub",
    "set_adapter",
    "using_adapter",
]


def __getattr__(name: str) -> Any:
    if name == "push_to_hub":
        return import_module("mitrain.inference.hub").push_to_hub
    if name == "AdapterCallback":
        return import_module("mitrain.methods.trainer_callback").AdapterCallback
    if name in ("MiT", "MiTConfig", "attach"):
        return getattr(import_module("mitrain.methods.mit.mit"), name)
    if name in ("set_adapter", "using_adapter"):
        return getattr(import_module("mitrain.methods.mit.bound"), name)
    if name in ("from_pretrained", "load_adapter"):
        return getattr(import_module("mitrain.inference.export"), name)
    raise AttributeError(f"module 'mitrain' has no attribute {name!r}")
