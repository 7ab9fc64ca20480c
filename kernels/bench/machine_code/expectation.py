"""What the instructions of infused_attention's kernels let one expect beside FlashAttention: ``machine-code --expect``.

An ESTIMATE: no kernel has run on a GPU. It takes the roofs (``pipes.py``) of the loop without masks, in which a long
sequence spends its time, and the share of the peak that FlashAttention's authors published.
"""

from collections.abc import Sequence
from typing import Any

from bench.machine_code.attention_cases import KERNELS, attention_case
from bench.machine_code.compilation import Case

WIDTHS = (64, 128, 256)
PEERS = {"sm_80": ("FlashAttention-2 on an A100", 73.0), "sm_90": ("FlashAttention-3 on an H100", 75.0)}
"""Highest published shares of the peak, of the forward pass. Sources: abstracts of arXiv 2307.08691 and 2407.08608."""
DOTS = {"query": 3, "key": 4}
PEER_DOTS = 5
"""Of a backward pass in one kernel, which adds up dQ with atomics, in an order that changes from run to run."""


def work(targets: Sequence[str]) -> list[tuple[Case, str]]:
    named = [t for t in PEERS if t in targets]
    return [(attention_case(t, name, d, "bf16", False), t) for t in named for d in WIDTHS for name in KERNELS]


def backward(query: float, key: float) -> float:
    """The share of the peak, counted in the five dots that are needed, of 3 dots at one share and 4 at another."""
    return PEER_DOTS / (DOTS["query"] / query + DOTS["key"] / key)


def shares(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each target and head width the roofs of all kernels, and of both passes (alternating, wide) in percent."""
    found = []
    for target in sorted({row["target"] for row in rows}, key=list(PEERS).index):
        for width in WIDTHS:
            mine = [row for row in rows if (row["target"], row["head_dim"]) == (target, width)]
            roofs = {row["kernel"].removeprefix("infused_attention_"): row["roofs"] for row in mine}
            passes = {"forward": [roofs["forward"][i] for i in (2, 1)]}
            passes["backward"] = [backward(roofs["query"][i], roofs["key"][i]) for i in (2, 1)]
            found.append({"target": target, "head_dim": width, "roofs": roofs, "passes": passes})
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| | d | forward | query | key | forward pass | backward pass | forward beside its peer |",
        "|---" * 8 + "|",
    ]
    for share in shares(rows):
        name, published = PEERS[share["target"]]
        cells = [share["target"], str(share["head_dim"])]
        cells += [" / ".join(f"{x:.0f}" for x in share["roofs"][kernel]) for kernel in KERNELS]
        cells += ["{:.0f}–{:.0f}".format(*share["passes"][name]) for name in ("forward", "backward")]
        low, high = (min(x / published, 1.0) for x in share["passes"]["forward"])
        cells.append(f"{low:.2f}–{high:.2f} × {name}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
