"""What others offer, measured beside ours: bitsandbytes' own int8 module, and PEFT's LoRA, under ZeRO-3.

bitsandbytes' module comes in through transformers (``load_in_8bit``), as its users get it; MiT and the engine are ours.
LoRA is trained by DeepSpeed as its guide says, with no engine of ours; alone, and unsharded, by plain torch. Both see
the same pictures' texts in the same order; LoRA, which infuses nothing, the texts alone.
"""

import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from benchmarks.parity.cells import Cell, Plan
from benchmarks.parity.steps import Measured, Subject
from mitrain.core import dist
from mitrain.core.errors import MissingExtraError
from mitrain.data.sources import limit
from mitrain.models import TextBackbone, loading
from mitrain.models.tokens import Tokens
from mitrain.training import schema
from mitrain.training.build import (
    Model,
    assemble,
    encoders_of,
    resolve_data,
    resolve_model,
    seed_everything,
)
from mitrain.training.engine import Group, LocalEngine
from mitrain.training.engine.deepspeed_config import deepspeed_json
from mitrain.training.engine.local import make_optimizer
from mitrain.training.engine.zero import join
from mitrain.training.schema import RunConfig

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def eight_bit(config: RunConfig) -> PreTrainedModel:
    """The language model with bitsandbytes' Linear8bitLt, whole on every rank: transformers does not shard it."""
    wanted = BitsAndBytesConfig(load_in_8bit=True)
    model = loading.load(
        AutoModelForCausalLM,
        resolve_model(config.model.llm),
        "language model in bitsandbytes' int8",
        quantization_config=wanted,
        device_map="cpu",
        dtype=torch.float32,
    )
    return model


class InBitsandbytes(Measured):
    """Our trainer with bitsandbytes' module in place of our low-bit layers."""

    def _load(self, config: RunConfig) -> Model:
        tokenizer = loading.load(AutoTokenizer, resolve_model(config.model.llm), "tokenizer")
        text = TextBackbone(eight_bit(config), tokenizer, torch.float32, sharded=config.zero.stage == 3)
        return assemble(config, text, encoders_of(config.model, text.device))


def lora(cell: Cell, plan: Plan) -> Subject:
    """PEFT's LoRA on the answers of the same texts."""
    try:
        import peft
    except ImportError:
        raise MissingExtraError("the peer PEFT is not installed: pip install peft") from None
    config = schema.load(plan.config, plan.overrides(cell))
    source = resolve_model(config.model.llm)
    if cell.precision == "fp32":
        model = loading.load_model(AutoModelForCausalLM, source, "language model", dtype=torch.float32)
    else:
        model = eight_bit(config)
    loading.freeze(model)
    seed_everything(config.seed)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [Group("lora", trained, config.train.lr)]
    texts = Texts(config, loading.load(AutoTokenizer, source, "tokenizer"), plan)
    if cell.zero:
        return sharded_lora(config, model, groups, texts)
    engine = LocalEngine(groups, lambda _: 1.0, config.train.optimizer)

    def step() -> float:
        total, answers = texts.loss(model)
        engine.backward(total, answers)
        return engine.step().loss

    return Subject(timed(step), {"text": model}, list(trained.values()), engine.optimizer)


def sharded_lora(config: RunConfig, model: nn.Module, groups: list[Group], texts: "Texts") -> Subject:
    optimizer = make_optimizer(config.train.optimizer, groups)
    trained = list(groups[0].params.values())
    made = deepspeed_json(config.zero, config.train.optimizer, dist.world())
    engine = join().initialize(model=model, optimizer=optimizer, config=made, dist_init_required=False)[0]

    def step() -> float:
        total, answers = texts.loss(engine)
        loss, whole = dist.sum_across(torch.tensor([float(total), answers], dtype=torch.float64)).tolist()
        engine.backward(total * (dist.world() / whole))  # DeepSpeed takes the mean over ranks
        engine.step()
        return loss / whole

    return Subject(timed(step), {"text": model}, trained, optimizer)


def timed(step: Callable[[], float]) -> Callable[[], tuple[float, float]]:
    def run() -> tuple[float, float]:
        start = time.perf_counter()
        return step(), time.perf_counter() - start

    return run


class Texts:
    """Prompts with their answers, ``plan.batch`` a step, of which each rank has its share."""

    def __init__(self, config: RunConfig, tokenizer: Any, plan: Plan):
        self.tokenizer, self.texts, self.batch = tokenizer, Tokens(tokenizer), plan.batch
        root = resolve_data(config.data)
        samples = limit(config.data.read(root, "train"), plan.samples)
        self.batches: Iterator[list[Any]] = (
            samples[i * self.batch : (i + 1) * self.batch] for i in count() if i < len(samples) // self.batch
        )

    def loss(self, model: Callable[..., Any]) -> tuple[Tensor, float]:
        """The next batch's summed cross-entropy of this rank's share, and the number of its answers' tokens."""
        samples = next(self.batches)
        rows = [self.row(sample) for sample in samples[dist.shard_of(len(samples))]]
        longest = max(len(ids) for ids, _ in rows)
        ids, labels = (
            torch.tensor([r[i] + [fill] * (longest - len(r[0])) for r in rows]) for i, fill in ((0, 0), (1, -100))
        )
        mask = torch.tensor([[1] * len(r[0]) + [0] * (longest - len(r[0])) for r in rows])
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
        return total, float((labels[:, 1:] != -100).sum())

    def row(self, sample: Any) -> tuple[list[int], list[int]]:
        """Token ids, and the same as labels where they are the answer's or its end."""
        row, start = self.texts.answered(sample.prompt, sample.answer)
        row = [*row, self.tokenizer.eos_token_id]
        return row, [*([-100] * start), *row[start:]]
