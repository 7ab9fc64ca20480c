"""Imported once by the server that commands are forked from: everything they would import, and nothing done."""

import importlib
import threading
import warnings

import PIL.Image
from tqdm import tqdm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what others import
    for module in (
        "mitrain.cli",
        "mitrain.training.trainer",
        "mitrain.inference.scoring",
        "mitrain.inference.export",
        "benchmarks.faults.lab",
        "transformers.models.llama.modeling_llama",
        "transformers.models.dinov2.modeling_dinov2",
        "transformers.conversion_mapping",
    ):
        importlib.import_module(module)
PIL.Image.init()
tqdm.set_lock(threading.RLock())  # its default is a semaphore of all processes, which a killed one leaves behind
