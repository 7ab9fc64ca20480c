"""A plan in lines for people."""

from collections.abc import Mapping

from mitrain.training.plan.plan import Plan

LARGEST = 6  # parts of the model whose activations are shown


def text(plan: Plan) -> str:
    where = f"{plan.ranks} × {plan.machine}" + (f" on {plan.nodes} nodes" if plan.nodes > 1 else "")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        f"{plan.config} on {where}: {verdict}",
        f"memory per rank           {gib(plan.total_bytes)} of {gib(plan.memory_bytes)} GiB",
        *rows(plan.per_rank_bytes),
        *(["at other moments"] if plan.moments.keys() - {"backward"} else []),
        *rows({name: size for name, size in plan.moments.items() if name != "backward"}),
        "activations by part",
        *rows(largest(plan.activations_by_part)),
        f"largest train.batch       {plan.largest_batch:,}",
        f"parameters                {plan.trainable_parameters:,} trained, {plan.frozen_parameters:,} frozen",
        f"forward pass              {plan.macs_forward / 1e9:,.4g} GMAC a sample",
        f"step                      {plan.flops_step / 1e12:,.4g} TFLOP, {between(plan.step_ms_range)} ms",
    ]
    if plan.ranks > 1:
        over = ", ".join(f"{ms:,.1f} ms over {name}" for name, ms in plan.communication_ms.items())
        kinds = ", ".join(f"{gib(size)} {kind}" for kind, size in plan.communication.items() if size)
        lines.append(f"communication a step      {gib(plan.communication_bytes_step)} GiB ({kinds}): {over}")
    if plan.epoch:
        cost = f", cost {between(plan.epoch['cost'])}" if plan.epoch["cost"] else ""
        lines.append(
            f"epoch                     {plan.epoch['steps']:,} steps, {between(plan.epoch['gpu_hours'])} device hours{cost}"
        )
    if not plan.fits:
        lines += ["it would fit with any one of", *(f"    {remedy}" for remedy in plan.remedies)]
    return "\n".join([*lines, "assumed", *(f"    {line}" for line in plan.assumptions)])


def rows(sizes: Mapping[str, int]) -> list[str]:
    return [f"    {name:24}{gib(size):>9}" for name, size in sizes.items()]


def largest(sizes: Mapping[str, int]) -> dict[str, int]:
    """The largest, and the others together."""
    ordered = sorted(sizes.items(), key=lambda pair: -pair[1])
    rest = sum(size for _, size in ordered[LARGEST:])
    return dict(ordered[:LARGEST]) | ({f"{len(ordered) - LARGEST} others": rest} if rest else {})


def gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"


def between(numbers: tuple[float, float] | list[float]) -> str:
    return " to ".join(f"{number:,.3g}" if number < 1000 else f"{number:,.0f}" for number in numbers)
