"""Aurora's fusion: text layers that read a other encoder's tokens by cross-attention, and what Aurora adds to them.

Where the text model has no cross-attention of its own, one is composed from each layer's self-attention: see `Composed`.

Shapes: B batch, T text tokens, N tokens of the other encoder, D width of the text model, c of the other
encoder, n fusion layers.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from mitrain.core.errors import ModelError
from mitrain.methods.aurora.config import AuroraConfig
from mitrain.models import loading
from mitrain.models.batch import mean_over
from mitrain.models.layers import Layers
from mitrain.models.layouts import BERT, CROSS, LLAMA

RESIDUAL = 0.1
"""Weight of the transformed queries in the residual form, from the authors' release."""
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass
class Pass:
    """One run of the fusion layers: the other encoder's tokens, which text tokens are real, and what the running layer's
    attention blocks gave (A_self, A_cross). ``shown`` (B, N): which of the other encoder's tokens are read, None: all."""

    tokens: Tensor
    visible: Tensor
    shown: Tensor | None = None
    entered: Tensor | None = None
    own: Tensor | None = None
    across: Tensor | None = None


@dataclass(frozen=True)
class Composed:
    """A cross-attention made of a layer's frozen self-attention: A ← A + s W_o softmax(W_q ã · W_k z / √d_h) W_v z.

    where:
        A (B, T, D) = the state after self-attention, ã = A as the layer would normalise it for attention
        z (B, N, D) = the other encoder's tokens after their encoder's final norm, turned to width D by a fixed orthogonal
            map where c ≠ D, each then of mean 0 and of root mean square ``rms``
        s = a trained scalar, or a vector (D,), per layer; s = 0 is the text alone

    W_k and W_v have only seen states of the text's scale: larger ones would saturate the softmax on one token, which
    then passes no gradient to the updates, so ``rms`` is what the norm before them gives, √(mean γ² + mean β²). The
    basis of the other encoder's states stays foreign to them, and how much of a foreign state helps is known from data
    only: an update of rank R cannot switch a matrix of full rank off, a scalar can.
    """

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    norm: nn.Module
    before: bool
    rms: float
    head_dim: int
    scaling: float
    head_norms: tuple[nn.Module, nn.Module] | None = None

    def __call__(self, asking: Tensor, tokens: Tensor, shown: Tensor | None) -> Tensor:
        """(B, T, D) of the states A (B, T, D) and the other encoder's standardised ``tokens`` (B, N, D), where ``shown``."""
        asking = self.norm(asking) if self.before else asking
        tokens = (tokens * self.rms).to(asking.dtype)
        q, k, v = (
            module(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for module, x in ((self.q, asking), (self.k, tokens), (self.v, tokens))
        )
        if self.head_norms:
            q, k = self.head_norms[0](q), self.head_norms[1](k)
        grouped = q.shape[1] != k.shape[1]
        mask = None if shown is None else shown[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scaling, enable_gqa=grouped)
        return self.o(out.transpose(1, 2).flatten(2))


def compose(layer: nn.Module, head_dim: int, name: str) -> tuple[Composed, nn.Module]:
    """The cross-attention of ``layer`` (of BERT's or Llama's kind), and the attention block that it follows."""
    for layout in (BERT, LLAMA):
        block = getattr(layer, layout.attention, None)
        if layout.kin and {child for child, _ in layer.named_children()} != layout.kin:
            continue
        try:
            q, k, v, o = (block.get_submodule(path) for path in (layout.q, layout.k, layout.v, layout.o))
        except AttributeError:
            continue
        norm = (layer if layout.pre else block).get_submodule(layout.beside)
        norms = (block.q_norm, block.k_norm) if hasattr(block, "q_norm") else None
        if norms is None or all(norm.weight.shape == (head_dim,) for norm in norms):
            inside = block.get_submodule(layout.q.rpartition(".")[0])
            scaling = float(getattr(inside, "scaling", None) or head_dim**-0.5)
            return Composed(q, k, v, o, norm, layout.pre, rms_of(norm), head_dim, scaling, norms), block
    raise ModelError(
        f"no cross-attention can be composed from the layers of {name}: give a text model of BERT's or Llama's kind, or"
        " set adapter.fusion_layers=0"
    )


@torch.no_grad()
def rms_of(norm: nn.Module) -> float:
    """The root mean square of what ``norm`` gives for inputs that vary alike: √(mean γ² + mean β²)."""
    parameters = [p for p in (norm.weight, getattr(norm, "bias", None)) if p is not None]
    if norm.weight.is_meta:
        return 1.0
    with loading.gathered(parameters):
        return float(sum(p.double().square().mean() for p in parameters).sqrt())


class Fusion(nn.Module):
    """The last n text layers, run on text states and a other encoder's tokens; GQT on each layer's output Y:

        residual (the release)  Y ← Y + 0.1 (γ_s ⊙ A_self + β_s) + 0.1 (γ_c ⊙ A_cross + β_c)
        gate (the authors)      Y ← g ⊙ Y + (1 − g) ⊙ E,  E = γ ⊙ A_self + β,  g = softmax_i Σ_j Y_i · E_j   over tokens

    γ = β = 0 at the start. Then the residual form is the frozen layer, and the gate, taken as written, is 1/T: it
    divides the layer's signal by the text's length. Padding is left out of both sums.
    ``gqt`` (n, pairs, 2, D), ``scale`` (n,) or (n, D) the s of composed layers, ``turn`` (D, c) the fixed map (a buffer).
    """

    def __init__(self, config: AuroraConfig, layers: int, widths: tuple[int, int], composed: bool, like: Tensor):
        super().__init__()
        self.config, self.layers, (self.width, self.encoder_width) = config, layers, widths
        if config.gqt_pairs:
            self.gqt = nn.Parameter(like.new_zeros(layers, config.gqt_pairs, 2, self.width))
        if composed:
            each = config.fusion_gate == "channels"
            start = float(not each) if config.fusion_scale is None else config.fusion_scale
            self.scale = nn.Parameter(like.new_full((layers, self.width) if each else (layers,), start))
        if composed and self.width != self.encoder_width:
            self.register_buffer("turn", orthogonal(self.width, self.encoder_width).to(like))
        self._pass: Pass | None = None
        self._text: Layers | None = None
        self._crossing: Callable[[], AbstractContextManager] = contextlib.nullcontext

    @property
    def first(self) -> int:
        """The lowest text layer that reads the other encoder."""
        return self._text.depth - self.layers

    @property
    def composed(self) -> bool:
        return hasattr(self, "scale")

    def check(self, layers: int, widths: tuple[int, int], composed: bool) -> None:
        """ModelError unless the parameters were made for such models."""
        if (layers, widths, composed) != (self.layers, (self.width, self.encoder_width), self.composed):
            raise ModelError("this Aurora's fusion was made for models of other widths or depth: make a new one")

    def place(self, text: Layers, crossing: Callable[[], AbstractContextManager], undo: Callable[..., None]) -> None:
        """Put hooks on the fusion layers of ``text``. ``crossing()``: inside, projections take the fusion's updates."""
        self._text, self._crossing = text, crossing
        undo(self._forget)
        config = text.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for index in range(text.depth - self.layers, text.depth):
            layer = text.modules[index]
            if self.composed:
                cross, block = compose(layer, head_dim, type(text.model).__name__)
                undo(layer.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                undo(block.register_forward_hook(self._composed_hook(index, cross)).remove)
            else:
                undo(getattr(layer, BERT.attention).register_forward_hook(self._record("own")).remove)
                undo(getattr(layer, CROSS).register_forward_hook(self._record("across")).remove)

    def _forget(self) -> None:
        self._text, self._crossing = None, contextlib.nullcontext

    def forward(self, hidden: Tensor, visible: Tensor, tokens: Tensor, shown: Tensor | None = None) -> Tensor:
        """Final fused states (B, T, D).

        hidden: (B, T, D) what enters the lowest fusion layer. visible: (B, T) bool. tokens: (B, N, c) final tokens, of
        which those ``shown`` (B, N) are read, or all.
        """
        self._pass = Pass(self._standard(tokens) if self.composed else tokens.to(hidden.dtype), visible, shown)
        try:
            for index in range(self.first, self._text.depth):
                hidden = self._transform(index - self.first, self._layer(index, hidden))
        finally:
            self._pass = None
        return self._text.finish(hidden)

    def _layer(self, index: int, hidden: Tensor) -> Tensor:
        if self.composed:
            return self._text.run(index, hidden, self._pass.visible)
        mask = create_bidirectional_mask(
            config=self._text.model.config, inputs_embeds=hidden, attention_mask=self._pass.visible
        )
        read = create_bidirectional_mask(
            config=self._text.model.config,
            inputs_embeds=hidden,
            attention_mask=self._pass.shown,
            encoder_hidden_states=self._pass.tokens,
        )
        given = {"encoder_hidden_states": self._pass.tokens, "encoder_attention_mask": read}
        return first_of(self._text.modules[index](hidden, attention_mask=mask, **given))

    def _standard(self, tokens: Tensor) -> Tensor:
        """Tokens of mean 0 and mean square 1, in the text model's width and the parameters' type."""
        tokens = tokens.to(self.scale.device, self.scale.dtype)
        if self.width != self.encoder_width:
            tokens = F.linear(tokens, self.turn)
        return F.layer_norm(tokens, (self.width,))

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._pass is not None:
            self._pass.entered = args[0] if args else kwargs["hidden_states"]

    def _composed_hook(self, index: int, cross: Composed) -> Callable[..., Any]:
        def add(block: nn.Module, args: tuple, output: Any) -> Any:
            seen = self._pass
            if seen is None:
                return None
            out = first_of(output)
            seen.own = seen.entered + out if cross.before else out
            with self._crossing():
                added = self.scale[index - self.first].to(out.dtype) * cross(seen.own, seen.tokens, seen.shown)
            seen.across = seen.own + added
            return (out + added, *output[1:]) if isinstance(output, tuple) else out + added

        return add

    def _record(self, name: str) -> Callable[..., None]:
        def keep(block: nn.Module, args: tuple, output: Any) -> None:
            if self._pass is not None:
                setattr(self._pass, name, first_of(output))

        return keep

    def _transform(self, place: int, y: Tensor) -> Tensor:
        if not self.config.gqt_pairs:
            return y
        pairs = self.gqt[place].to(y.dtype)
        kept = (self._pass.own, self._pass.across)[: len(pairs)]
        changed = [gamma * state + beta for (gamma, beta), state in zip(pairs, kept, strict=True)]
        if self.config.gqt == "residual":
            return y + RESIDUAL * sum(changed)
        return gated(y, changed[0], self._pass.visible)


def gated(y: Tensor, e: Tensor, visible: Tensor) -> Tensor:
    """g ⊙ Y + (1 − g) ⊙ E (B, T, D), with g = softmax_i Σ_j Y_i · E_j over the tokens that ``visible`` (B, T) admits."""
    total = e.masked_fill(~visible[..., None], 0).sum(1, keepdim=True)
    likeness = (y * total).sum(-1).masked_fill(~visible, torch.finfo(y.dtype).min)
    g = likeness.softmax(-1).unsqueeze(-1)
    return g * y + (1 - g) * e


def enhanced(fused: Tensor, contexts: Tensor) -> Tensor:
    """ICE: f_i + Σ_j softmax_j(f_i · e_j / √D) e_j for ``fused`` f (B, D) and ``contexts`` e (M, D).

    Every f, of a right pair or a wrong one, sees the same contexts. The paper's product is not divided by √D; states of a
    transformer have norms near √D, with which the softmax would be a choice of the nearest.
    """
    return fused + (fused @ contexts.T / fused.shape[-1] ** 0.5).softmax(-1) @ contexts


def pooled(hidden: Tensor, mask: Tensor, name: str) -> Tensor:
    """(B, D): the first (``cls``), the ``last`` or the ``mean`` of the real tokens of (B, T, D), in its type."""
    if name == "mean":
        return mean_over(hidden, mask)
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[:, 0] if name == "cls" else hidden[rows, mask.sum(1) - 1]


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(first, group): the place of the first of each kind of equal rows (B, …), and each row's kind.

    ``rows[first][group]`` are the rows. They are told apart by sums over their bits, and then compared.
    """
    bits = rows.flatten(1).contiguous().view(INTEGERS[rows.element_size()]).to(torch.int64)
    places = torch.arange(len(rows), device=rows.device)
    _, group = (bits * torch.arange(1, 2 * bits.shape[1], 2, device=rows.device)).sum(1).unique(return_inverse=True)
    first = places.new_full((len(rows),), len(rows)).scatter_reduce(0, group, places, "amin")[: int(group.max()) + 1]
    return (first, group) if torch.equal(rows[first[group]], rows) else (places, places)


def orthogonal(out: int, into: int) -> Tensor:
    """A fixed (out, into) matrix, float64, whose columns (or rows, the fewer) are orthonormal."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(max(out, into), min(out, into), generator=generator, dtype=torch.float64, device="cpu")
    q, _ = torch.linalg.qr(wide)
    return q if out >= into else q.T


def first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
