"""The kernels of infused SwiGLU as the offline compiler takes them."""

from mitrain_kernels.infused_swiglu.triton_kernel import TILES, backward_kernel, forward_kernel

from bench.machine_code.compilation import Case


def audit_cases(target: str) -> list[Case]:
    """Both kernels as they run for padded bfloat16 activations and float32 factors, f trained."""
    tensors = dict.fromkeys(("GRAD", "GATE", "UP", "OUT", "DGATE", "DUP"), "*bf16")
    lengths = dict.fromkeys(("tokens", "splits", "samples", "width", "grad_stride", "gate_stride", "up_stride"), "i32")
    signature = {**tensors, **lengths, "FACTOR": "*fp32", "PARTS": "*fp32"}
    cases = []
    for kernel, tile in zip((forward_kernel, backward_kernel), TILES[target], strict=True):
        constants = {"BOUNDS": None, "ROWS": tile.rows, "COLUMNS": tile.columns}
        used = {name: kind for name, kind in signature.items() if name in kernel.arg_names}
        aligned = tuple(name for name in used if name == "width" or name.endswith("stride"))
        name = "infused_swiglu_" + kernel.fn.__name__.removesuffix("_kernel")
        cases.append(Case(name, kernel, used, constants, tile.warps, 3, 0, "bf16", aligned, dots=False))
    return cases
