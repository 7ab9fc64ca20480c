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


PLACES = {
    "push_to_hub": "inference.hub",
    "AdapterCallback": "methods.trainer_callback",
    **dict.fromkeys(("MiT", "MiTConfig", "attach"), "methods.mit.mit"),
    **dict.fromkeys(("set_adapter", "using_adapter"), "methods.mit.bound"),
    **dict.fromkeys(("from_pretrained", "load_adapter"), "inference.export"),
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'mitrain' has no attribute {name!r}")
    return getattr(import_module(f"mitrain.{PLACES[name]}"), name)
