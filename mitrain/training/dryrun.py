"""``--dry-run``: what a configuration would train and hold, without weights, data or a hub.

Everything is built on torch's meta device, so counts come from the very modules that would be trained. What a step of it
holds and takes, ``mitrain plan`` says.
"""

from dataclasses import asdict, dataclass

from mitrain.core.errors import ConfigError
from mitrain.models import loading, quant
from mitrain.training.build import Model, build
from mitrain.training.schema import RunConfig, TrainConfig

ORDER = ("fp32", "bf16", "fp16", "int8", "nf4")


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, and bytes per rank by ZeRO stage.

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
        return "\n".join(lines)


def dry_run(config: RunConfig, ranks: int = 1) -> Counts:
    """Count what ``config`` trains and freezes."""
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks} must be positive")
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
    return Counts(
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
    """Bytes per rank by ZeRO stage (Rajbhandari et al., SC 2020), of ``trainable`` parameters and ``frozen`` bytes.

    The trainable weights and their gradients are whole on every rank, in fp32, at every stage (`engine.zero`). AdamW's two
    moments are; from stage 1 on they are shared by the ranks, with DeepSpeed's copy of the weights. Stage 3 shares what is
    frozen, too.
    """
    part = lambda size: -(-size // ranks)  # noqa: E731
    shared = 8 * trainable + part(12 * trainable)
    return {"0": 16 * trainable + frozen, "1": shared + frozen, "2": shared + frozen, "3": shared + part(frozen)}


def frozen_bytes(config: RunConfig, model: Model, frozen: int, precision: str) -> int:
    """Bytes of the ``frozen`` parameters, unsharded; low-bit formats hold those of the language model's layers."""
    if precision in loading.DTYPES:
        return loading.DTYPES[precision].itemsize * frozen
    matrices = [ref.module.weight for ref in quant.linear_refs(model.text.model)]
    table = [model.text.model.get_input_embeddings().weight] if config.model.quantize_embedding else []
    rest = frozen - sum(weight.numel() for weight in (*matrices, *table))
    return (
        quant.bytes_in(matrices, precision)
        + quant.bytes_in(table, "int8")
        + loading.DTYPES[config.model.dtype].itemsize * rest
    )
