"""A tiny model with an answer task, questions for it, and what is seen with them."""

import torch
from folders import COLOURS
from tiny import scramble

from mitrain import methods
from mitrain.data.formats.records import AnswerSample
from mitrain.data.hidden_states import TextStates
from mitrain.methods.mit.mit import MiTConfig
from mitrain.models import TextBackbone
from mitrain.tasks.answer import AnswerConfig, AnswerTask
from mitrain.tasks.base import Parts


def parts_of(folder, cache=None, gate="prefix", width=6):
    """The text model in ``folder`` under MiT, all of whose maps do something."""
    text = TextBackbone.load(folder, torch.float32)
    adapter = methods.build(MiTConfig(layers=[1, 2], gate=gate), {"image": width})
    adapter.attach({"text": text.model})
    scramble(adapter)
    return Parts(text, adapter, TextStates(text, 1, cache))


def make(folder, cache=None, gate="prefix", **config):
    return AnswerTask(AnswerConfig(**config), parts_of(folder, cache, gate))


def samples(candidates=True):
    prompts = ["the colour of this picture is", "this thing is a", "is this red"]
    answers = ["red", "blue square", "yes"]
    offered = [tuple(COLOURS), ("blue square", "red", "green square"), ("yes", "no")] if candidates else [()] * 3
    return [
        AnswerSample(str(i), {"image": f"{i}.png"}, p, a, c, f"kind{i % 2}", "o")
        for i, (p, a, c) in enumerate(zip(prompts, answers, offered, strict=True))
    ]


FEATURES = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def opened(answers, prompt="this thing is a"):
    """Samples without candidates."""
    return [AnswerSample(str(i), {"image": f"{i}.png"}, prompt, answer) for i, answer in enumerate(answers)]
