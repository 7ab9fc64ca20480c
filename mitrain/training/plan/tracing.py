"""One training step on tensors that have shapes and no storage (torch's FakeTensorMode), counted as it runs.

What is counted follows from the operators that the model, the method and the task really call, forward and backward, so
that no formula has to know them. Shapes: B samples of one rank.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from mitrain.methods.kernels import one_block_of_each_size
from mitrain.models import layouts
from mitrain.tasks.base import Batch
from mitrain.training.build import Model
from mitrain.training.engine import regularised

ATEN = torch.ops.aten
ELSEWHERE = "embeddings, norms, views"


@dataclass
class Traced:
    """A step of one micro-batch on one rank.

    ``flops``: of matrix products, convolutions and attention (over all pairs of tokens), 2 for each multiply-accumulate;
    ``forward_flops``: of them, the forward pass's. ``kept``: bytes that live when the forward pass has ended, by the part of
    the model that made them; ``peak``: the most bytes that lived at once beside the weights, ``gradients`` of them the
    gradients'. ``course``: the bytes that lived so, each time an operator had made a tensor.
    ``operators``: (flops, bytes read and written) of each operator that touches memory. ``order``: the modules with frozen
    weights in the order in which they run, and whether the backward pass comes by.
    """

    flops: int
    forward_flops: int
    kept: dict[str, int]
    gradients: int
    course: list[int]
    operators: list[tuple[int, int]]
    order: list[tuple[nn.Module, bool]]

    @property
    def peak(self) -> int:
        return max(self.course)


class Meter(TorchDispatchMode):
    """Inside, counts FLOPs, bytes moved, and the storages that operators make and that are still alive.

    ``mode``: of the tensors without storage; None: those with storage are counted, of a step that is computed.
    ``gradients``: bytes of those that the backward pass has made. ``rows``: how many of a batch can differ: its samples.
    """

    def __init__(self, mode: FakeTensorMode | None = None):
        super().__init__()
        self.mode, self.counts = mode, Tensor if mode is None else FakeTensor
        self.flops = self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self.course: list[int] = []
        self.operators: list[tuple[int, int]] = []
        self.parts, self.times = [ELSEWHERE], 1
        self.live: dict[int, tuple[int, str, Any]] = {}
        self.rows: int | None = None
        self.formulas = {**flop_registry, **own_operators()}

    def comes(self, times: int) -> None:
        """What is called from now on comes so often, and makes and lets go of the same each time."""
        self.times = times

    def known(self, *outside: Tensor) -> None:
        """These tensors were there before: views and changes of them are nothing new."""
        for tensor in outside:
            self.live[tensor.untyped_storage()._cdata] = (0, "", None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in UNKNOWN and isinstance(args[0], FakeTensor):
            return UNKNOWN[func](args[0], self.rows)
        given = [*tensors_of(args), *tensors_of(kwargs.values())]
        if any(not isinstance(tensor, FakeTensor) and tensor.is_meta for tensor in given):
            args, kwargs = tree_map(filled, (args, kwargs))
        out = func(*args, **kwargs) if given or self.mode is None else self._new(func, args, kwargs)
        results = [tensor for tensor in tensors_of((out,)) if isinstance(tensor, self.counts)]
        if not results:
            return out
        formula = self.formulas.get(func._overloadpacket)
        count = formula(*args, **kwargs, out_val=out) if formula else 0
        self.flops += count * self.times
        if not func.is_view:
            self.operators += [(count, sum(map(size_of, given)) + sum(map(size_of, results)))] * self.times
        for tensor in results:
            self._hold(tensor.untyped_storage())
        return out

    def _new(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor made of nothing: whole numbers are real ones, since they may decide what is computed."""
        if func.namespace == "aten":
            with self.mode:
                out = func(*args, **kwargs)
            if isinstance(out, Tensor) and out.is_floating_point():
                return out
        return func(*args, **kwargs)

    def _hold(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.live:
            return
        gone = weakref.ref(storage, partial(self._release, key))
        self.live[key] = (storage.nbytes(), self.parts[-1], gone)
        self.now += storage.nbytes()
        self.course.append(self.now)
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients

    def _release(self, key: int, _: Any) -> None:
        self.now -= self.live.pop(key, (0,))[0]

    def gradient_made(self, parameter: Tensor) -> None:
        self.gradients += size_of(parameter.grad)

    def by_part(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for size, part, _ in self.live.values():
            found[part] += size
        return {part: size for part, size in found.items() if size}


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among ``values`` and in lists of them: what an operator takes and gives is no deeper."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


def different(values: Tensor, most: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """As if all of ``values`` differed, or ``most`` of them, which come again in their order."""
    count = min(values.numel(), most or values.numel())
    kinds = torch.arange(values.numel()).view(values.shape) % max(1, count)
    return values.flatten()[:count], kinds, torch.bincount(kinds.flatten(), minlength=count)


UNKNOWN: dict[Any, Callable[[Tensor, int | None], Any]] = {
    ATEN._local_scalar_dense.default: lambda value, _: 1.0 if value.is_floating_point() else 0,
    ATEN.equal.default: lambda *_: True,
    ATEN._unique2.default: different,
}
"""Answers where an operator asks for numbers that tensors without storage have not: what makes the most work. The rows of a
matching loss show no more files than the batch has samples."""


def filled(value: Any) -> Any:
    """Zeros for a tensor of the meta device that a library keeps where no module shows it, as PEFT its prompts' indices."""
    lost = isinstance(value, Tensor) and value.is_meta and not isinstance(value, FakeTensor)
    return torch.zeros_like(value, device="cpu") if lost else value


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def own_operators() -> dict[Any, Any]:
    """By operator, what torch has no formula for, in its counter's terms: attention as its CPU computes it, and infused
    attention, as both products of attention."""
    ours = torch.ops.mitrain_kernels
    found = {
        ATEN._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        ATEN._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
        getattr(ours, "infused_attention", None): attention_flops,
    }
    return {operator: formula for operator, formula in found.items() if operator is not None}


def attention_flops(q: Any, k: Any, v: Any, *others: Any, out_shape: Any = None, **more: Any) -> int:
    """``q`` (B, H, T, d) against ``k``, ``v`` (B, G, S, d): every query head has its own products."""
    q, k, v = map(shape_of, (q, k, v))
    return sdpa_flop_count(q, (k[0], q[1], *k[2:]), (v[0], q[1], *v[2:]))


def attention_backward_flops(upstream: Any, q: Any, k: Any, v: Any, *others: Any, out_shape: Any = None, **more: Any) -> int:
    upstream, q, k, v = map(shape_of, (upstream, q, k, v))
    return sdpa_backward_flop_count(upstream, q, (k[0], q[1], *k[2:]), (v[0], q[1], *v[2:]))


def shape_of(value: Any) -> Any:
    """torch's counter gives shapes, an operator its tensors."""
    return tuple(value.shape) if isinstance(value, Tensor) else value


def without_storage(mode: FakeTensorMode, roots: Sequence[nn.Module]) -> None:
    """Turn every parameter and buffer into one that has no storage and says it lies on a CPU, in place: whoever refers to it
    does so still.

    Whole numbers may decide what is computed: they are real ones, 0 where there were none.
    """
    done: set[int] = set()
    for module in {id(m): m for root in roots for m in root.modules()}.values():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or id(tensor) in done:
                continue
            done.add(id(tensor))
            if tensor.is_floating_point() or isinstance(tensor, nn.Parameter):
                with mode:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            elif tensor.is_meta:
                empty = torch.zeros_like(tensor, device="cpu")
            else:
                continue
            while weakref.getweakrefs(empty):  # the mode's memory of it; what is swapped may have none
                empty = empty.detach()
            if isinstance(tensor, nn.Parameter):
                empty.requires_grad_(tensor.requires_grad)._is_param = True
            torch.utils.swap_tensors(tensor, empty)


def parts_of(model: Model) -> dict[int, str]:
    """The part of the model that each module belongs to, by the module's id."""
    found: dict[int, str] = {}

    def mark(root: nn.Module | None, name: str) -> None:
        for module in root.modules() if root is not None else ():
            found.setdefault(id(module), name)

    mark(model.adapter, "adapter")
    mark(model.task, "task head")
    mark(model.text.model.get_output_embeddings() if model.text.speaks else None, "language head")
    for what, backbone in model.frozen.items():
        name = "" if what == "text" else f"{what} "
        stacks = layouts.layer_lists(backbone if what == "text" else backbone.model)
        for i, layer in enumerate(layer for owner, attribute in stacks for layer in getattr(owner, attribute)):
            mark(layer, f"{name}layer {i}")
    return found


@contextmanager
def told_parts(meter: Meter, model: Model, order: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Inside, ``meter`` knows which part runs, and ``order`` gets each module with weights of its own that are frozen."""
    parts = parts_of(model)
    frozen = {id(p) for part in model.frozen.values() for p in part.parameters() if not p.requires_grad}

    def enter(module: nn.Module, _: Any) -> None:
        meter.parts.append(parts.get(id(module), meter.parts[-1]))

    def leave(module: nn.Module, _: Any, out: Any) -> None:
        meter.parts.pop()
        if any(id(p) in frozen for p in module._parameters.values()):
            order.append((module, any(t.requires_grad for t in tree_leaves(out) if isinstance(t, Tensor))))

    with ExitStack() as undo:
        undo.callback(hooks.register_module_forward_pre_hook(enter).remove)
        undo.callback(hooks.register_module_forward_hook(leave, always_call=True).remove)
        yield


def metered(model: Model, mode: FakeTensorMode | None) -> tuple[Meter, list[Tensor]]:
    """A meter that knows the model's weights, and these."""
    meter = Meter(mode)
    modules = [*model.frozen.values(), *model.trainable.values()]
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers()) if isinstance(t, meter.counts)}
    meter.known(*tensors.values())
    return meter, list(tensors.values())


def passed(model: Model, run: Callable[[Meter], object], mode: FakeTensorMode | None = None) -> int:
    """The most bytes that live at once beside the weights while ``run``, which is given the meter, computes without
    gradients."""
    meter, _ = metered(model, mode)
    with torch.no_grad(), meter, one_block_of_each_size(meter.comes) if mode else nullcontext():
        run(meter)
    return meter.peak


def traced(model: Model, batch: Batch, mode: FakeTensorMode | None = None) -> Traced:
    """A step of ``model``, whose weights are `without_storage` in ``mode``; without it, one that is computed."""
    model.train()
    (meter, weights), order = metered(model, mode), []
    meter.rows = len(batch.samples)
    with ExitStack() as undo:
        for weight in weights:
            if weight.requires_grad:
                undo.callback(weight.register_post_accumulate_grad_hook(meter.gradient_made).remove)
                undo.callback(setattr, weight, "grad", None)
        undo.enter_context(meter)
        if mode:
            undo.enter_context(one_block_of_each_size(meter.comes))
        with told_parts(meter, model, order):
            total, _ = regularised(model.task.loss(batch), model.adapter.extra_loss())
        forward, kept = meter.flops, meter.by_part()
        total.backward()
    return Traced(meter.flops, forward, kept, meter.gradients_at_peak, meter.course, meter.operators, order)
