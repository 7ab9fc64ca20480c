"""``--dry-run``: what a configuration would train and hold, without weights, data or a hub.

Everything is built on torch's meta device, so counts come from the very modules that would be trained; bytes are
`mitrain.models.costs`' arithmetic.
"""

from dataclasses import asdict, dataclass

from mitrain.core.errors import ConfigError
from mitrain.models import costs, loading, quant
from mitrain.training.build import Model, build
from mitrain.training.schema import RunConfig, TrainConfig

TOKENS = 64
ORDER = ("fp32", "bf16", "fp16", "int8", "nf4")


@dataclass(frozen=True)
class Plan:
    """Counts of parameters, and estimated bytes per rank by ZeRO stage.

    ``bytes_per_rank`` is the configured precision's; ``bytes_by_precision`` has the others beside it.
    """

    trainable_parameters: int
    frozen_parameters: int
    infusion_parameters: int
    infusion_parameters_per_layer: int
    infused_layers: list[int]
    head_parameters: int
    share: float
    precision: str
    bytes_per_rank: dict[str, int]
    bytes_by_precision: dict[str, dict[str, int]]
    activation_bytes_per_sample: int
    largest_batch: int
    tokens_assumed: int
    memory_bytes: int
    ranks: int
    config_hash: str
    length: str

    def to_dict(self) -> dict:
        return asdict(self)

    def text(self) -> str:
        def count(n: float) -> str:
            return f"{n:,.0f}"

        lines = [
            f"training                  {self.length}",
            f"trainable parameters      {count(self.trainable_parameters)}"
            f"  ({100 * self.share:.2f} % of the pretrained ones)",
            f"  adapter                 {count(self.infusion_parameters)}",
            *([f"    in each layer         {count(self.infusion_parameters_per_layer)}"] if self.infused_layers else []),
            f"  task head               {count(self.head_parameters)}",
            f"frozen parameters         {count(self.frozen_parameters)}",
            *([f"infused layers            {', '.join(map(str, self.infused_layers))}"] if self.infused_layers else []),
            f"GiB per rank, {self.ranks} rank(s), weights + gradients + optimizer; * is configured:",
            "    frozen in " + "".join(f"{f'ZeRO {stage}':>11}" for stage in self.bytes_per_rank),
        ]
        lines += [
            f"  {'*' if name == self.precision else ' '} {name:9} "
            + "".join(f"{size / 2**30:11.2f}" for size in sizes.values())
            for name, sizes in self.bytes_by_precision.items()
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
    adapter, head = loading.count_parameters(model.adapter), loading.count_parameters(model.task)
    trained = {id(p) for p in model.adapter.parameters()}
    held = {id(p): p for module in model.frozen.values() for p in module.parameters()}
    frozen = sum(loading.elements(p) for key, p in held.items() if key not in trained)
    infused = model.adapter.attachment.infused_parameters
    precision = config.model.dtype if config.model.quantize == "none" else quant.storage(config.model.quantize)
    sizes = {
        name: stage_bytes(adapter + head, frozen_bytes(config, model, frozen, name), ranks)
        for name in sorted({"fp32", "bf16", "int8", "nf4", precision}, key=ORDER.index)
    }
    per_sample = activations(config, model, tokens)
    budget = int(memory_gb * 2**30)
    return Plan(
        trainable_parameters=adapter + head,
        frozen_parameters=frozen,
        infusion_parameters=adapter,
        infusion_parameters_per_layer=next(iter(infused.values()), 0),
        infused_layers=list(infused),
        head_parameters=head,
        share=(adapter + head) / model.pretrained,
        precision=precision,
        bytes_per_rank=sizes[precision],
        bytes_by_precision=sizes,
        activation_bytes_per_sample=per_sample,
        largest_batch=costs.largest_batch(budget, sizes[precision]["0"], per_sample),
        tokens_assumed=tokens,
        memory_bytes=budget,
        ranks=ranks,
        config_hash=config.hash,
        length=length(config.train),
    )


def length(train: TrainConfig) -> str:
    """How long a run is, in words."""
    step = f"{train.batch * train.accumulate} samples"
    if train.steps:
        return f"{train.steps} steps of {step}"
    return f"{train.epochs:g} epochs in steps of {step}; how many steps those are, the data's size says: train to see it"


def stage_bytes(trainable: int, frozen: int, ranks: int) -> dict[str, int]:
    """Bytes per rank by ZeRO stage, of ``trainable`` parameters and ``frozen`` bytes, which stage 3 shards."""
    shares = {str(stage): costs.share(frozen, stage == 3, ranks) for stage in range(4)}
    return {s: costs.training_memory(trainable, size, "fp32", int(s), ranks).total for s, size in shares.items()}


def frozen_bytes(config: RunConfig, model: Model, frozen: int, precision: str) -> int:
    """Bytes of the ``frozen`` parameters, unsharded; low-bit formats hold those of the language model's layers."""
    if precision in costs.FLOAT_BYTES:
        return costs.float_bytes(precision) * frozen
    layers, table = quant.split_of(model.text.model, config.model.quantize_embedding)
    rest = costs.float_bytes(config.model.dtype) * (frozen - layers.linear - table.linear)
    return costs.frozen_bytes(layers, precision) + costs.frozen_bytes(table, "int8") + rest


def activations(config: RunConfig, model: Model, tokens: int) -> int:
    """Estimated bytes that one sample's backward pass needs of the backbones and of the task's head."""
    shape = costs.LlmShape.from_config(model.text.model.config.get_text_config().to_dict())
    infused = len(model.adapter.attachment.infused_parameters)
    above = shape.layers - model.adapter.attachment.first_layers["text"]
    logits = max(1, tokens // 8) if model.task.speaks else 0
    text = costs.activation_bytes(
        shape,
        tokens,
        above,
        infused,
        precision=config.model.dtype,
        checkpointed=config.train.checkpoint_activations,
        logit_tokens=logits,
    )
    passes = model.adapter.traits.passes
    return max(1, passes * (text + encoder_activations(config, model)) + model.task.activation_bytes())


def encoder_activations(config: RunConfig, model: Model) -> int:
    """The same of the first encoder, where the method changes it."""
    if not model.adapter.traits.changes_encoder:
        return 0
    encoder = next(iter(model.encoders.values()))
    sizes = {name: getattr(encoder.settings, name, None) for name in costs.SIZES}  # some have other names in the file
    shape = costs.encoder_shape(encoder.settings.to_dict() | sizes)
    above = max(0, encoder.depth - model.adapter.attachment.first_layers["encoder"])
    return costs.activation_bytes(shape, encoder.tokens, above, 0, precision=config.model.dtype) if shape else 0
