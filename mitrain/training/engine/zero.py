"""The engine on DeepSpeed's ZeRO; the only folder that imports deepspeed.

Gradients of a step are summed on each rank, reduced once, divided by the step's true count through DeepSpeed's loss
scale, and clipped and applied by DeepSpeed. At stage 3 the frozen weights lie in shards on all ranks and are gathered
layer by layer; the trainable ones stay whole on every rank, their optimizer states do not.
"""

import importlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn

from mitrain.core import allocator, dist
from mitrain.core.errors import ConfigError
from mitrain.models import loading
from mitrain.models.release import is_released
from mitrain.training.engine.base import Group, OptimizerConfig, T
from mitrain.training.engine.deepspeed_config import Json, ZeroConfig, deepspeed_json, gather_limits
from mitrain.training.engine.local import LocalEngine, checked_count

BUCKET = 1 << 24  # elements of gradients that are reduced at a time, at most: 64 MiB of float32


def deepspeed() -> ModuleType:
    """DeepSpeed, quiet, and on a CPU without its shared-memory operator: that compiles for minutes, its lock outlives a
    killed process and then looks like a hang, and training does not use it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError:
        raise ConfigError(
            "zero.stage needs DeepSpeed, which is not installed: pip install 'mitrain[deepspeed]', or set zero.stage=0"
        ) from None
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its own calls
    # Its Muon, which no setting of ours asks for, is compiled where it is defined: 50 MB of torch's compiler on every rank.
    with suppress(ImportError), patch.object(torch, "compile", lambda function=None, **_: function or (lambda own: own)):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.ERROR)
    log.handlers.clear()  # its own speaks on stdout
    log.propagate = True
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # an attribute path leads to torch itself
    return deepspeed


def join() -> ModuleType:
    """DeepSpeed with its communication set up on the ranks' own process group; alone, on a group of one."""
    ds = deepspeed()
    if not dist.initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    here = dist.rank_info()
    for name, value in zip(dist.LAUNCHED, (here.rank, here.world, here.local), strict=True):
        os.environ.setdefault(name, str(value))  # DeepSpeed reads the last; one alone would be no place to us
    if not ds.comm.is_initialized():
        ds.init_distributed(dist_backend=distributed.get_backend(), verbose=False)
        if distributed.get_backend() == "gloo":
            sys.modules["deepspeed.comm.comm"].cdb.all_gather_function = gather_in_place
    return ds


def gather_in_place(
    output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
) -> "Broadcasts | None":
    """As torch's ``all_gather_into_tensor``, by a broadcast of each rank's part: gloo's own gathers into a second output,
    which it then copies."""
    parts = output_tensor.flatten().chunk(distributed.get_world_size(group))  # views: collectives take what is contiguous
    own = parts[distributed.get_rank(group)]
    if own.data_ptr() != input_tensor.data_ptr():
        own.copy_(input_tensor.flatten())
    works = Broadcasts(
        [distributed.broadcast(part, group=group, group_src=rank, async_op=True) for rank, part in enumerate(parts)]
    )
    return works if async_op else works.wait()


class Broadcasts:
    """Several collectives on their way, to be waited for as one."""

    def __init__(self, works: "list[distributed.Work]"):
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def checked_json(zero: ZeroConfig, optimizer: OptimizerConfig) -> Json:
    """DeepSpeed's JSON as DeepSpeed itself understands it; ConfigError where it does not."""
    made, ds = deepspeed_json(zero, optimizer, dist.world()), join()
    try:
        ds.DeepSpeedConfig(made)
    except Exception as error:  # pydantic's, assertions, its own: for a misspelt or impossible setting
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"DeepSpeed refuses its configuration ({reason}): check zero.config") from None
    return made


def sharding(zero: ZeroConfig, optimizer: OptimizerConfig) -> Callable[[nn.Module], None] | None:
    """At stage 3, what spreads a module's weights (those of rank 0) over the ranks as it is loaded; else None."""
    if zero.stage < 3:
        return None
    made = checked_json(zero, optimizer)
    ds = join()
    small = ds.DeepSpeedConfig(made).zero_config.param_persistence_threshold
    allocator.map_large()

    def shard(module: nn.Module) -> None:
        ds.zero.Init(module=module, config_dict_or_path=made)
        for parameter in module.parameters():  # DeepSpeed says so when all is loaded; until then `release` must know
            parameter.ds_persist = parameter.ds_numel <= small

    return shard


def gather_as_needed(parts: Mapping[str, nn.Module], zero: ZeroConfig) -> None:
    """Let modules whose weights lie in shards gather them when they are called, without an optimizer: for evaluation."""
    made = checked_json(zero, OptimizerConfig())
    initialize(Root(parts), made)


def initialize(root: "Root", made: Json, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """DeepSpeed's engine for the modules under ``root``; a user's JSON stands before the `gather_limits` of their size."""
    if (sizes := made["zero_optimization"])["stage"] == 3:
        frozen = sum(loading.elements(p) for p in root.parameters() if not (p.requires_grad or is_released(p)))
        made = {**made, "zero_optimization": {**sizes, **gather_limits(frozen, sizes)}}
        for parameter in filter(loading.is_sharded, root.parameters()):
            parameter.ds_persist = False  # DeepSpeed says anew which are small, under a user's limit to all of them together
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports much of torch that is deprecated
        engine = join().initialize(model=root, optimizer=optimizer, config=made, dist_init_required=False)[0]
    if made["zero_optimization"]["stage"] == 3:
        hold_tied(root)
    return engine


class Root(nn.Module):
    """All modules whose weights DeepSpeed holds, under one roof; its forward pass is whatever is asked of it."""

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()


class ZeroEngine(LocalEngine):
    """`LocalEngine` at ZeRO stage 1, 2 or 3. ``parts``: modules whose weights it holds; at stage 3 the frozen ones too.

    A step is discarded where any rank's loss or gradient is not finite. A parameter that no rank has a gradient for
    counts as having a zero one (``LocalEngine`` leaves it alone).
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        groups: Iterable[Group],
        schedule: Callable[[int], float],
        config: OptimizerConfig | None,
        zero: ZeroConfig,
        scale: float = 1.0,
    ):
        super().__init__(groups, schedule, config, scale)
        self.stage, self.lockstep = zero.stage, zero.stage == 3
        self.json = with_bucket(checked_json(zero, self.config), sum(map(loading.elements, self.params.values())))
        self.deepspeed = join()
        self.engine = initialize(Root(parts), self.json, self.optimizer)
        self.sharded = self.engine.optimizer  # DeepSpeed's optimizer around ours
        self.sharded.override_loss_scale(1.0)
        self._summing = ExitStack()
        if self.stage == 3:
            self._keep_whole()

    def _keep_whole(self) -> None:
        """Let the trainable weights stay gathered between the steps, as DeepSpeed does with small ones."""
        params = list(self.params.values())
        for param in params:
            if not param.ds_persist:
                param.ds_persist = True
                self.sharded.persistent_parameters.append(param)
        params[0].all_gather(params)

    # A step

    def forward(self, compute: Callable[[], T]) -> T:
        return self.engine(compute) if self.stage == 3 else compute()

    def backward(self, loss_sum: Tensor, count: float | Tensor) -> None:
        """As ``LocalEngine``'s; at stage 3 an empty micro-batch runs too, since the other ranks wait for its shards."""
        count = checked_count(count)
        if count == 0 and not self.lockstep:
            return
        self._begin()
        self.sharded.override_loss_scale(self.scale.value)
        # Times 0, not left out: the backward pass of an idle rank still gathers what the others' passes gather.
        self.engine.backward(loss_sum if count else loss_sum * 0, scale_wrt_gas=False)
        if count:
            self._losses.append(loss_sum.detach())
            self._count += count

    def _begin(self) -> None:
        """From here to the end of the step gradients are summed on this rank alone."""
        if not self.engine.inside_no_sync_ctxt:
            self._summing.enter_context(self.engine.coalesce_grad_reduction())

    def _update(self, count: float, reached: list[nn.Parameter]) -> float:
        self._begin()
        without = [param for param in self.params.values() if param.grad is None]
        with loading.gathered(without):
            for param in without:
                param.grad = torch.zeros_like(param)
        self._summing.close()  # reduces: DeepSpeed takes the mean over ranks
        # It divides by its loss scale: with count / ranks the mean over ranks of sums becomes the sum / count.
        self.sharded.override_loss_scale(count / dist.world())
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return norm if self.engine.was_step_applied() else math.nan

    def _discard(self) -> None:
        """Let DeepSpeed throw a step away by itself: a gradient that is not a number makes it do so on all ranks."""
        if not dist.any_rank(self.engine.inside_no_sync_ctxt):
            return
        first = next(iter(self.params.values()))
        with loading.gathered([first]):
            first.grad = torch.full_like(first, math.nan)
        self._update(1.0, [])

    def _clear(self) -> None:
        self._losses: list[Tensor] = []
        self._count = 0.0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """DeepSpeed learns the order of modules from a step to the next, and would gather what ran after it ahead of its
        call, also what was let go of since (`mitrain.models.release`)."""
        yield
        if self.stage == 3 and not (order := self.sharded.parameter_offload.get_param_coordinator()).is_invalid_trace():
            order._invalidate_trace()

    # States that belong to no rank

    @contextmanager
    def gathered(self, write: bool = False) -> Iterator[None]:
        """DeepSpeed lets go of the trainable weights too whenever it has seen modules run in another order."""
        params = list(self.params.values())
        with loading.gathered(params):
            yield
            if write and self.stage == 3:
                # Into the shards, and gathered again, as `_keep_whole` has them.
                params[0].partition(param_list=params, has_been_updated=True)
                params[0].all_gather(params)
            if write:
                # The optimizer updates copies of its own, which must follow.
                self.sharded.refresh_fp32_params()

    def _flat(self) -> list[Tensor]:
        """This rank's parts of the trainable weights, each of several parameters."""
        return self.sharded.fp32_partitioned_groups_flat if self.stage == 3 else self.sharded.single_partition_of_fp32_groups

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self._link()
        return super().state_dict()

    def _link(self) -> None:
        """Let each parameter's view show the flat states that there are now. DeepSpeed does it once, at stages 1 and 2 after
        the first group's first step, when the other groups have none."""
        if self.stage < 3:
            self.sharded._hp_optimizer_states_linked = False
            self.sharded._lazy_init_hp_params_optimizer_state()

    def _slots(self, param: nn.Parameter) -> Mapping[str, Any]:
        # DeepSpeed fills the states with zeros at once; torch, whose format this is, has none before the first step.
        if not self.applied:
            return {}
        kept = self.optimizer.state[self._flat()[0]]
        whole = self.deepspeed.utils.safe_get_full_optimizer_state
        states = {slot: whole(param, slot) for slot, value in kept.items() if isinstance(value, Tensor) and slot != "step"}
        return {**states, "step": torch.tensor(float(kept["step"]))} if "step" in kept else states

    def _take_slots(self, slots: Mapping[str, dict[str, Tensor]]) -> None:
        self.optimizer.state.clear()
        if not slots:
            return
        for flat in self._flat():
            self.optimizer.state[flat] = {
                slot: blank(slot, value, flat) for slot, value in next(iter(slots.values())).items()
            }
        self._link()
        for name, held in slots.items():
            for slot, value in held.items():
                if slot != "step":
                    self._put(self.params[name], value, slot)

    def _put(self, param: nn.Parameter, value: Tensor, slot: str) -> None:
        if self.stage < 3:
            self.deepspeed.utils.safe_set_full_optimizer_state(param, value, slot)
            return
        # A rank's shard, equally long on all: the last one's end is padded.
        part = torch.zeros_like(param.ds_tensor, dtype=value.dtype)
        own = value.flatten()[part.numel() * dist.rank() :][: part.numel()]
        part[: own.numel()] = own
        self.deepspeed.utils.safe_set_local_optimizer_state(param, part, slot)


def with_bucket(made: Json, trained: int) -> Json:
    """DeepSpeed's JSON with a bucket for a quarter of the gradients of ``trained`` elements, unless the user says how large.

    DeepSpeed allocates 5e8 elements (2 GB of float32) however few are trained, and copies of what is in it while it reduces.
    """
    sizes = {"reduce_bucket_size": min(-(-trained // 4), BUCKET), **made["zero_optimization"]}
    return {**made, "zero_optimization": sizes}


def blank(slot: str, value: Tensor, flat: Tensor) -> Tensor:
    """A new state of ``flat`` for the slot of which ``value`` is one parameter's: steps are counted, the rest is zero."""
    if slot == "step":
        return value.to(flat.device, torch.float32).clone()
    return torch.zeros_like(flat)


# Weights that an embedding and a language head share: DeepSpeed lets go of an embedding's when it has run, unless it runs
# again within ``stage3_max_reuse_distance`` parameters, and the head, behind all layers of a large model, does not.


def hold_tied(root: nn.Module) -> None:
    """Let modules under ``root`` that share sharded parameters keep them from the first one's call to the last one's.

    Where the last one was not called since (a model without its head, states from a cache) nothing is kept the next time.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    pairs = {(shared[0], shared[-1]) for shared in owners.values() if len(shared) > 1}
    for first, last in pairs:
        Held(first, last)


class Held:
    """Two modules' common parameters; ``last`` counts as using them from the moment that ``first`` is called."""

    def __init__(self, first: nn.Module, last: nn.Module):
        own = {id(parameter) for parameter in last.parameters(recurse=False)}
        self.parameters = [parameter for parameter in first.parameters(recurse=False) if id(parameter) in own]
        self.user: int = last.ds_id
        self.awaited = False
        first.register_forward_pre_hook(self._begin)
        last.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        if self.awaited:
            for parameter in self.parameters:
                parameter.ds_active_sub_modules.add(self.user)
        self.awaited = False

    def _end(self, *_: Any) -> None:
        self.awaited = True
