"""``--dry-run``: what a configuration would train and hold, without weights, data or a hub.

Everything is built on torch's meta device, so counts come from the very modules that would be trained; bytes are
`mitrain.costs`' arithmetic.
"""

from dataclasses import asdict, dataclass

from mitrain import costs, hf
from mitrain.errors import ConfigError
from mitrain.model import Model, build
from mitrain.schema import RunConfig
from mitrain.tasks.segment import SegmentTask

TOKENS = 64


@dataclass(frozen=True)
class Plan:
    """Counts of parameters, and estimated bytes per rank by ZeRO stage."""

    trainable_parameters: int
    frozen_parameters: int
    infusion_parameters: int
    infusion_parameters_per_layer: int
    infused_layers: list[int]
    head_parameters: int
    share: float
    bytes_per_rank: dict[str, int]
    activation_bytes_per_sample: int
    largest_batch: int
    tokens_assumed: int
    memory_bytes: int
    ranks: int
    config_hash: str

    def to_dict(self) -> dict:
        return asdict(self)

    def text(self) -> str:
        def count(n: float) -> str:
            return f"{n:,.0f}"

        lines = [
            f"trainable parameters      {count(self.trainable_parameters)}  ({100 * self.share:.2f} % of the frozen ones)",
            f"  infusion                {count(self.infusion_parameters)}",
            f"    in each layer         {count(self.infusion_parameters_per_layer)}",
            f"  task head               {count(self.head_parameters)}",
            f"frozen parameters         {count(self.frozen_parameters)}",
            f"infused layers            {', '.join(map(str, self.infused_layers)) or 'none'}",
            f"bytes per rank, {self.ranks} rank(s), weights + gradients + optimizer:",
        ]
        lines += [
            f"  ZeRO {stage}                  {size / 2**30:8.2f} GiB" for stage, size in self.bytes_per_rank.items()
        ]
        lines += [
            f"activations per sample    {self.activation_bytes_per_sample / 2**20:8.1f} MiB"
            f"  (estimate, {self.tokens_assumed} tokens)",
            f"largest batch             {self.largest_batch}"
            f"  (estimate, {self.memory_bytes / 2**30:.0f} GiB per rank, ZeRO 0)",
        ]
        return "\n".join(lines)


def dry_run(config: RunConfig, *, memory_gb: float, ranks: int, tokens: int = TOKENS) -> Plan:
    """Count what ``config`` trains and freezes, and estimate its memory."""
    if memory_gb <= 0 or ranks < 1:
        raise ConfigError(f"--memory {memory_gb} and --ranks {ranks} must be positive")
    model = build(config, empty=True)
    adapter, head = hf.count_parameters(model.adapter), hf.count_parameters(model.task)
    frozen = hf.count_parameters(model.text.model) - adapter + sum(hf.count_parameters(e.model) for e in model.encoders)
    layers = list(getattr(model.adapter, "layers", ()))
    size = costs.float_bytes(config.model.dtype)
    stages = {
        str(s): costs.training_memory(adapter + head, frozen_size(frozen * size, s, ranks), "fp32", s, ranks).total
        for s in range(4)
    }
    per_sample = activations(config, model, tokens)
    budget = int(memory_gb * 2**30)
    return Plan(
        trainable_parameters=adapter + head,
        frozen_parameters=frozen,
        infusion_parameters=adapter,
        infusion_parameters_per_layer=per_layer(model),
        infused_layers=layers,
        head_parameters=head,
        share=(adapter + head) / frozen,
        bytes_per_rank=stages,
        activation_bytes_per_sample=per_sample,
        largest_batch=costs.largest_batch(budget, stages["0"], per_sample),
        tokens_assumed=tokens,
        memory_bytes=budget,
        ranks=ranks,
        config_hash=config.hash,
    )


def frozen_size(size: int, stage: int, ranks: int) -> int:
    return costs.share(size, stage == 3, ranks)


def per_layer(model: Model) -> int:
    """Parameters of one infused layer (all are alike)."""
    infusions = list(getattr(model.adapter, "infusions", ()))
    return hf.count_parameters(infusions[0]) if infusions else 0


def activations(config: RunConfig, model: Model, tokens: int) -> int:
    """Estimated bytes that one sample's backward pass needs of the language model and of the task's head."""
    shape = costs.LlmShape.from_config(model.text.model.config.get_text_config().to_dict())
    infused = len(getattr(model.adapter, "layers", ()))
    above = shape.layers - model.adapter.first_layer("text")
    logits = 0 if isinstance(model.task, SegmentTask) else max(1, tokens // 8)
    text = costs.activation_bytes(
        shape,
        tokens,
        above,
        infused,
        precision=config.model.dtype,
        checkpointed=config.train.checkpoint_activations,
        logit_tokens=logits,
    )
    return max(1, text + model.task.activation_bytes())
