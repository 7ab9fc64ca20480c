"""mitrain: parameter-efficient multimodal fusion. Frozen language models learn to see.

mit = mitrain.attach(model, mitrain.MiTConfig(modalities={"image": 768}))
model(input_ids=ids, infused={"image": features}, labels=ids).loss.backward()
mit.detach()
"""

from mitrain.adapters.mit import MiTConfig, attach

__all__ = ["MiTConfig", "attach"]
__version__ = "0.1.0"
