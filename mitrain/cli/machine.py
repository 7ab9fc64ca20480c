"""What a machine is, and which known faults of other packages it shows: measured on the spot, not looked up."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from mitrain.core.provenance import machine, versions
from mitrain.models import quant

PACKAGES = ("mitrain", "torch", "transformers", "tokenizers", "safetensors", "triton", "bitsandbytes", "deepspeed", "peft")
VECTORS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "neon", "asimd", "sve")


def examine() -> dict[str, Any]:
    """versions, python, system, cpu, gpus, environment and faults; ready to be shown as JSON."""
    return {
        "versions": versions(PACKAGES),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {
            "name": machine(),
            "vectors": [name for name in VECTORS if name in cpu_flags()],
            "torch": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "environment": {name: os.environ[name] for name in ("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS") if name in os.environ},
        "faults": [fault for fault in (quant.nf4_fault(),) if fault is not None],
    }


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The instructions that the processor names; none where the system does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return {word for line in lines if line.startswith(("flags", "Features")) for word in line.partition(":")[2].split()}


def as_text(report: dict[str, Any]) -> str:
    """A line for each part, then one for each check, with what to do where it found something."""
    cpu = report["cpu"]
    lines = [
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"Python {report['python']}, {report['system']}",
        f"CPU: {cpu['name']}; {' '.join(cpu['vectors']) or 'vector units unknown'}; torch uses {cpu['torch']}, "
        f"{cpu['threads']} threads",
        f"GPU: {', '.join(report['gpus']) or 'none that torch sees'}",
        *(f"{name}={value}" for name, value in report["environment"].items()),
    ]
    wide = max(len(check["name"]) for check in report["checks"])
    for check in report["checks"]:
        lines.append(f"{'ok ' if check['ok'] else 'BAD'}  {check['name']:<{wide}}  {check['detail']}")
        lines += [f"     {'':<{wide}}  -> {check['fix']}"] if check["fix"] else []
    bad = sum(not check["ok"] for check in report["checks"])
    return "\n".join([*lines, f"{bad} of {len(report['checks'])} checks found something to mend"])
