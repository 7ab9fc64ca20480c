"""``mitrain plan``: whether a configuration fits on a machine, and what a step of it takes there.

Everything is counted on the models without weights that the configuration describes; what is assumed is listed.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mitrain.core.config import override
from mitrain.core.errors import ConfigError, ModelError
from mitrain.models import TextBackbone, loading
from mitrain.models.quant.linear import FrozenLinear
from mitrain.models.release import releasable
from mitrain.models.text import read_tokenizer
from mitrain.training import schema
from mitrain.training.build import Model, assemble, described, encoders_of, resolve_model
from mitrain.training.engine.deepspeed_config import PERSIST
from mitrain.training.plan import batch as batches
from mitrain.training.plan.evaluation import generating, scoring
from mitrain.training.plan.machines import NETWORK_TEXT, NETWORKS, Machine, resident
from mitrain.training.plan.tracing import Traced, passed, traced, without_storage
from mitrain.training.plan.traffic import Traffic, traffic
from mitrain.training.schema import RunConfig

TOKENS = 64
ENCODED = 32  # texts that are run together while the cache is filled
MOST = 10**9
"""Samples of a batch, where nothing grows with them."""
ROW = 2000
"""Bytes of a sample that stay in memory: its fields, token ids, entries of the caches' indices (measured)."""
HEAP = 0.2
"""Of what lives, so much more is kept by glibc in holes that freed tensors leave: first runs of five configurations kept a
tenth to two fifths (docs/results/plan-memory)."""
FAR, SLOW, BUSY, LAUNCH_S = 0.4, 0.6, 0.7, 10e-6
"""Shares of the stated rates of products, memory and links in the longest time of a step; what an operator adds to it."""
REMEDIES = (
    ("train.checkpoint_activations=true",),
    ("model.dtype=bf16",),
    ("model.quantize=int8",),
    ("model.quantize=nf4",),
    ("zero.stage=3",),
    ("zero.stage=3", "model.quantize=nf4"),
    ("zero.stage=3", "model.quantize=nf4", "train.checkpoint_activations=true"),
)
Range = tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """``per_rank_bytes``: at the moment of a step when most is held, by part; ``moments``: the whole at others.

    ``activations_by_part``: what the backward pass needs of each part of the model. ``largest_batch``: the greatest
    ``train.batch`` (over all ranks) that fits. ``macs_forward``: of one sample; ``flops_step``: of a step of all ranks.
    ``communication_bytes_step``: bytes of the tensors that are gathered and reduced in a step; ``communication_ms``: over
    each link. ``step_ms_range``: at the machine's stated rates, and at shares of them. ``epoch``: hours and cost.
    """

    fits: bool
    machine: str
    ranks: int
    nodes: int
    memory_bytes: int
    total_bytes: int
    per_rank_bytes: dict[str, int]
    moments: dict[str, int]
    activations_by_part: dict[str, int]
    largest_batch: int
    trainable_parameters: int
    frozen_parameters: int
    macs_forward: int
    flops_step: int
    communication_bytes_step: int
    communication: dict[str, int]
    communication_ms: dict[str, float]
    step_ms_range: Range
    epoch: dict[str, Any] | None
    remedies: list[str]
    assumptions: list[str]
    config_hash: str
    config: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class PlanRequest:
    """``ranks``: all of them; ``samples``: how many there are where the data is not at hand; ``price``: of a GPU-hour."""

    machine: Machine
    ranks: int = 1
    nodes: int = 1
    network: str = "infiniband"
    tokens: int = TOKENS
    samples: int | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.nodes < 1 or self.ranks % self.nodes:
            raise ConfigError(f"--gpus {self.ranks} on --nodes {self.nodes}: give as many GPUs to every node, at least 1")
        if self.tokens < 2 or (self.samples or 1) < 1 or (self.price or 0) < 0:
            raise ConfigError("--tokens, --samples and --price: give at least 2 tokens, a sample, and no price below 0")


@dataclass
class Measured:
    """A configuration's ``step`` on one rank, of any number of samples: it has ``share`` of them.

    ``process``: bytes of this process, with all that training imports, its models without weights and their tokenizer.
    ``held``: bytes beside the weights at other moments (0: they do not come): while the frozen layers below the changed
    ones fill the cache with the longest texts, while the task is fitted, while val is scored, and while the model speaks.
    """

    model: Model
    step: Callable[[int], Traced]
    share: int
    process: int
    samples: int | None
    held: dict[str, int] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)

    @property
    def traced(self) -> Traced:
        return self.step(self.share)


def empty_model(config: RunConfig) -> tuple[Model, FakeTensorMode]:
    """The configuration's model in its own precision, on tensors without storage."""
    model = config.model
    text = TextBackbone.empty(
        described(model), loading.DTYPES[model.dtype], model.attention, model.quantize, model.quantize_embedding
    )
    encoders = encoders_of(model, torch.device("cpu"))
    made = assemble(config, text, encoders, empty=True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    without_storage(mode, [made.text.model, *made.encoders.values(), *made.trainable.values()])
    return made, mode


def measured(config: RunConfig, asked: PlanRequest) -> Measured:
    """Steps of the longest samples, and what is held at other moments."""
    share = -(-config.train.batch // asked.ranks)
    model, mode = empty_model(config)
    model.text.tokenizer = tokenizer = tokenizer_at_hand(config)
    process = resident()
    samples, val, why = batches.at_hand(config)
    if samples and val and tokenizer:
        drawn = batches.longest(samples, model.task.tokens, max(share, ENCODED))
        val = [val[i] for i in model.task.order(val)]
        scored = batches.largest_batch(val, model.task.tokens, config.train.eval_batch)
        said = [f"the {share} longest of {len(samples):,} training samples"]
        model.task.remember(samples)
    else:
        model.text.tokenizer = model.text.tokenizer or batches.WordTokenizer()
        drawn, scored = (
            [batches.stand_in(model, i, asked.tokens) for i in range(count)]
            for count in (max(share, ENCODED), config.train.eval_batch)
        )
        said = [f"texts of {asked.tokens} tokens (--tokens), since {why or 'the tokenizer is not at hand'}"]
    filled = drawn[:ENCODED] if keeps_states(config, model) else []
    rows = model.texts(filled, False) if filled else []
    encoding = passed(model, lambda _: model.text.trunk(rows, model.states.depth), mode) if rows else 0
    step = lambda size: traced(  # noqa: E731
        model, batches.batch_of(model, [drawn[i % share] for i in range(size)], mode), mode
    )
    speaks = model.task.must_generate(val or scored)
    held = {"evaluation": scoring(model, scored, mode), "generation": generating(model, scored, mode) if speaks else 0}
    held |= {"encoding": encoding, "fit": model.task.bytes_to_fit(len(samples) or asked.samples or 0)}
    return Measured(model, cache(step), share, process, len(samples) or asked.samples, held, said)


def alike(one: Traced, other: Traced) -> bool:
    """Whether both made the same tensors, of other sizes."""
    return len(one.course) == len(other.course)


def largest(found: Measured, room: float) -> int:
    """The most samples whose step takes no more than ``room`` bytes, from steps of fewer and more of them.

    Where both make the same tensors, what lives at each moment grows evenly. Else, as where a part of the samples is run at
    a time, it is the peak that does, and what the forward pass keeps: with few samples the gradients may make every peak.
    """
    share = found.share
    few, more = (share, 4 * share + 32) if room >= found.traced.peak else (1, share)
    if room >= found.step(more).peak and not alike(found.step(few), found.step(more)):
        few, more = more, 2 * more
    one, other = found.step(few), found.step(more)
    courses = [step.course if alike(one, other) else [step.peak, sum(step.kept.values())] for step in (one, other)]
    low, high = np.asarray(courses, dtype=float)
    slope, fixed = (high - low) / max(more - few, 1), np.where(low <= room, np.inf, -np.inf)
    most = few + np.divide(room - low, slope, out=fixed, where=slope > 0).min()
    return math.floor(min(max(0, most), MOST))


def tokenizer_at_hand(config: RunConfig) -> Any:
    if config.model.llm_shape:
        return None
    try:
        tokenizer = read_tokenizer(resolve_model(config.model.llm))
    except ModelError:
        return None
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def plan(config: RunConfig, asked: PlanRequest, *, remedies: bool = True, found: Measured | None = None) -> Plan:
    """What ``config`` takes; where it does not fit, with what it would (each tried). ``found``: `measured` already, of as
    many samples a rank."""
    found = found or measured(config, asked)
    sent = sent_in(config, asked, found)
    parts, moments = memory(config, asked, found, sent)
    total, budget = max(moments.values()), asked.machine.memory
    times = step_ms(config, asked, found, sent)
    room = found.traced.peak + (budget - moments["backward"]) / (1 + heap(asked.machine))
    most = largest(found, room) * asked.ranks
    fits = total <= budget
    per_step = config.train.batch * config.train.accumulate
    made = Plan(
        fits=fits,
        machine=asked.machine.name,
        ranks=asked.ranks,
        nodes=asked.nodes,
        memory_bytes=budget,
        total_bytes=total,
        per_rank_bytes=parts,
        moments=moments,
        activations_by_part=found.traced.kept,
        largest_batch=most if max(value for key, value in moments.items() if key != "backward") <= budget else 0,
        trainable_parameters=sum(p.numel() for p in found.model.trained()),
        frozen_parameters=sum(p.numel() for p in frozen(found.model, *found.model.frozen)),
        macs_forward=round(found.traced.forward_flops / 2 / found.share),
        flops_step=round(found.traced.flops / found.share * per_step),
        communication_bytes_step=sent.total,
        communication={"gathers": sent.gathers, "scatters": sent.scatters, "reductions": sent.reductions},
        communication_ms=link_ms(asked, sent),
        step_ms_range=times,
        epoch=epoch(asked, times, found.samples, per_step),
        remedies=[],
        assumptions=[*found.assumptions, *assumptions(config, asked)],
        config_hash=config.hash,
        config=config.name,
    )
    return made if fits or not remedies else with_remedies(made, config, asked, found)


def with_remedies(made: Plan, config: RunConfig, asked: PlanRequest, found: Measured) -> Plan:
    tried, batch, known = [], made.largest_batch, {apart_from_zero(config): found}
    for _ in range(2):  # several micro-batches keep their gradients meanwhile, so that the first may be too large
        if not asked.ranks <= batch < config.train.batch:
            break
        accumulate = -(-config.train.batch * config.train.accumulate // batch)
        changes = (f"train.batch={batch}", f"train.accumulate={accumulate}")
        smaller = plan(schema.from_dict(override(config.to_dict(), changes)), asked, remedies=False)
        if smaller.fits:
            tried.append(" ".join(changes))
            break
        batch = smaller.largest_batch
    for changes in REMEDIES:
        try:
            other = schema.from_dict(override(config.to_dict(), changes))
            if other.to_dict() == config.to_dict() or at_least(made, changes) > asked.machine.memory:
                continue
            step = known.get(key := apart_from_zero(other)) or known.setdefault(key, measured(other, asked))
            if max(memory(other, asked, step, sent_in(other, asked, step))[1].values()) <= asked.machine.memory:
                tried.append(" ".join(changes))
        except (ConfigError, ModelError):
            continue  # a change that this configuration does not take is no remedy
    return Plan(**{**vars(made), "remedies": tried or ["a machine with more memory, or a smaller model"]})


def at_least(made: Plan, changes: Sequence[str]) -> float:
    """Bytes that a remedy leaves at best, so that what cannot fit need not be traced: half the precision halves what there
    is beside the process, and weights that are held otherwise leave the activations."""
    process, kept = (made.per_rank_bytes.get(part, 0) for part in ("process", "activations"))
    if "train.checkpoint_activations=true" in changes:
        return process
    return (process + made.total_bytes) / 2 if "model.dtype=bf16" in changes else process + kept


def apart_from_zero(config: RunConfig) -> str:
    """Configurations of which this is the same are `measured` alike: how weights are shared changes no operator."""
    return json.dumps({**config.to_dict(), "zero": None}, sort_keys=True)


def sent_in(config: RunConfig, asked: PlanRequest, found: Measured) -> Traffic:
    weights, held = bytes_of(found.model.trained()), frozen(found.model, *found.model.frozen)
    # When DeepSpeed's limits are set encoders are still there, and the whole text model beside one that is changed.
    gone = set() if found.model.adapter.traits.changes_encoder else unread(config, found.model, text_alone=True)
    elements = sum(t.numel() for t in held if isinstance(t, torch.nn.Parameter) and id(t) not in gone)
    return traffic(config.zero, asked.ranks, weights, elements, found.traced.order, config.train.accumulate)


# Memory


def frozen(model: Model, *names: str) -> list[Tensor]:
    """Frozen parameters and buffers of the parts ``names``, each once."""
    parts = [model.frozen[name] for name in names]
    held = {id(t): t for part in parts for t in (*part.parameters(), *part.buffers()) if not t.requires_grad}
    own = {id(t) for part in model.trainable.values() for t in (*part.parameters(), *part.buffers())}
    return [t for key, t in held.items() if key not in own]


def keeps_states(config: RunConfig, model: Model) -> bool:
    """Whether the cache is to hold what leaves the layers below the changed ones."""
    return bool(config.cache) and not config.data.buffer and model.states.depth > 0


def unread(config: RunConfig, model: Model, text_alone: bool = False) -> set[int]:
    """The ids of the frozen weights that a run does not hold in its steps, since the cache stands for them.

    At stage 3 small ones stay whole on every rank, and low-bit ones in their shards.
    """
    if not config.cache or config.data.buffer:
        return set()
    sharded = config.zero.stage == 3
    parts = [part for one, part in model.unread(keeps_states(config, model)) if one is model.text or not text_alone]
    modules = [m for part in parts for m in part]
    own = [m._parameters[n] for m in modules for n in releasable(m) if not (sharded and isinstance(m, FrozenLinear))]
    return {id(p) for p in own if not sharded or p.numel() > PERSIST}


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def per_rank(tensors: Sequence[Tensor], config: RunConfig, ranks: int) -> int:
    """Bytes of frozen ``tensors`` on a rank: shards at stage 3, but for small ones."""
    if config.zero.stage < 3:
        return bytes_of(tensors)
    if config.zero.offload_params:
        return bytes_of([t for t in tensors if t.numel() <= PERSIST])
    return sum(-(-t.numel() // ranks) * t.element_size() if t.numel() > PERSIST else bytes_of([t]) for t in tensors)


def memory(config: RunConfig, asked: PlanRequest, found: Measured, sent: Traffic) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes by part at the fullest moment of the passes, the whole at each moment)."""
    model, on_cpu = found.model, asked.machine.name == "cpu"
    weights, gone = bytes_of(model.trained()), unread(config, model)
    text, encoders = frozen(model, "text"), frozen(model, *(model.frozen.keys() - {"text"}))
    of_rank = lambda tensors: per_rank([t for t in tensors if id(t) not in gone], config, asked.ranks)  # noqa: E731
    fixed = {
        "process": found.process if on_cpu else asked.machine.reserve,
        "frozen language model": of_rank(text),
        "frozen encoders": of_rank(encoders),
        "gathered frozen weights": sent.held,
        "trained weights": weights,
        "optimizer": optimizer(config, asked.ranks, weights),
        "samples and caches": ROW * (found.samples or 0) if on_cpu else 0,
    }
    base = sum(fixed.values())
    several = config.train.accumulate > 1 or config.zero.stage > 0
    # With one micro-batch the gradients are made while activations are let go; the trace has them among what lives.
    step = {
        "gradients": weights if several else found.traced.gradients,
        "activations": found.traced.peak - found.traced.gradients,
    }
    flat = 2 * weights if asked.ranks > 1 else 0
    missing = per_rank([t for t in (*text, *encoders) if id(t) in gone], config, asked.ranks)
    # Before the first step: with what the cache will stand for; torch makes its states in that step, DeepSpeed at once.
    before = base + missing - (0 if config.zero.stage else fixed["optimizer"])
    moments = {"backward": base + sum(step.values()), "reduction": base + weights + flat}
    if gone:
        moments["encoding"] = before + found.held["encoding"]
    if found.held["fit"]:
        moments["fit"] = before + found.held["fit"]
    moments["evaluation"] = base + found.held["evaluation"]
    if found.held["generation"]:
        moments["generation"] = (
            base + per_rank([t for t in text if id(t) in gone], config, asked.ranks) + found.held["generation"]
        )
    if on_cpu:
        files = [bytes_of(list(module.state_dict().values())) for module in model.trainable.values()]
        moments["save"] = base + saving([*files, optimizer(config, 1, weights)])
    kept = {name: round(heap(asked.machine) * (size - fixed["process"])) for name, size in moments.items()}
    parts = {**fixed, **step, "kept by the allocator": kept["backward"]}
    return {name: size for name, size in parts.items() if size}, {name: moments[name] + kept[name] for name in moments}


def heap(machine: Machine) -> float:
    """What the C library keeps of freed tensors, of all that lives: on a GPU the reserve is there for it."""
    return HEAP if machine.name == "cpu" else 0.0


def saving(groups: Sequence[int]) -> int:
    """The most bytes that writing a checkpoint holds, by the bytes of its files' tensors, in the order of writing.

    A file is three copies at once: of the tensors, safetensors' buffer, and the bytes made of it. The bytes of the file
    before are let go when they are there.
    """
    return max(before + 3 * size for before, size in pairwise([0, *groups]))


def optimizer(config: RunConfig, ranks: int, weights: int) -> int:
    """Bytes of the optimizer's states on a rank, DeepSpeed's copies of the weights among them."""
    chosen, zero = config.train.optimizer, config.zero
    states = 2 if chosen.name != "sgd" else 1 if chosen.momentum else 0
    if zero.offload_optimizer:
        return 0
    return -(-weights * (states + 1) // ranks) if zero.stage else weights * states


# Time


def step_ms(config: RunConfig, asked: PlanRequest, found: Measured, sent: Traffic) -> Range:
    """A step's milliseconds: at the machine's stated rates, all communication hidden; and at shares of them, none hidden."""
    machine, operators = asked.machine, found.traced.operators
    rate, width = machine.flops[config.model.dtype], machine.bandwidth
    states = 7 * bytes_of(found.model.trained()) / width  # weights, two moments: read and written; gradients: read
    link = min(link_ms(asked, sent)["node" if asked.nodes == 1 else asked.network] / 1e3, 1e6)
    low = config.train.accumulate * sum(max(f / rate, b / width) for f, b in operators) + states
    high = config.train.accumulate * sum(max(f / rate / FAR, b / width / SLOW) + LAUNCH_S for f, b in operators)
    return 1e3 * max(low, link), 1e3 * (high + states / SLOW + link / BUSY)


def link_ms(asked: PlanRequest, sent: Traffic) -> dict[str, float]:
    speeds = {"node": asked.machine.link, **NETWORKS}
    return {name: 1e3 * sent.sent(asked.ranks) / speed for name, speed in speeds.items()}


def epoch(asked: PlanRequest, times: Range, samples: int | None, per_step: int) -> dict[str, Any] | None:
    """What one pass over the training samples takes; evaluation, encoding and saving are not in it."""
    if not samples:
        return None
    steps = max(1, samples // per_step)
    hours = [steps * ms / 3.6e6 for ms in times]
    of_all = [asked.ranks * h for h in hours]
    cost = None if asked.price is None else [round(asked.price * h, 2) for h in of_all]
    return {"samples": samples, "steps": steps, "hours": hours, "gpu_hours": of_all, "cost": cost}


def assumptions(config: RunConfig, asked: PlanRequest) -> list[str]:
    machine, rate = asked.machine, asked.machine.flops[config.model.dtype]
    lines = [
        f"{machine.name}: {rate / 1e12:,.4g} TFLOP/s in {config.model.dtype}, {machine.bandwidth / 1e9:,.0f} GB/s"
        + (" (measured now on one thread's share)" if machine.name == "cpu" else " (data sheet, dense; no GPU was used)"),
        f"longest: {FAR:.0%} of that, {SLOW:.0%} of memory's, {BUSY:.0%} of a link's, {LAUNCH_S * 1e6:g} µs an operator",
    ]
    if config.cache:
        lines.append("files' features and the states of texts below the first changed layer are in the cache")
    if asked.ranks > 1:
        link = f"{machine.link / 1e9:g} GB/s in the node"
        far = f", {NETWORK_TEXT[asked.network]} between nodes" if asked.nodes > 1 else ""
        lines.append(f"ring collectives over {link}{far}")
    if machine.name != "cpu":
        lines.append(
            "reserved: 0.75 GiB for CUDA and libraries, 4 % for the allocator; attention keeps what it keeps on a CPU"
        )
    return lines
