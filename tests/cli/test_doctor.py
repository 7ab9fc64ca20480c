"""``mitrain doctor``: what it says of this machine is so, and a known fault is said."""

import json

import torch

from mitrain.cli import machine, main
from mitrain.core import provenance
from mitrain.models import quant


def test_the_document_is_this_machines(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == provenance.version("torch")
    assert found["cpu"]["torch"] == torch.backends.cpu.get_cpu_capability()
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert {fault["package"] for fault in found["faults"]} <= {"bitsandbytes"}


def test_a_fault_is_a_line_with_what_it_means(capsys, monkeypatch):
    fault = {
        "package": "x",
        "what": "x is wrong for:",
        "measured": "32 (off by 1.5)",
        "columns": [32],
        "means": "Not ours.",
    }
    monkeypatch.setattr(quant, "nf4_fault", lambda: fault)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "known fault: x is wrong for: 32 (off by 1.5). Not ours."
    monkeypatch.setattr(quant, "nf4_fault", lambda: None)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no known fault of another package shows here"


def test_flags_are_words_of_the_first_kind_of_line(tmp_path):
    about = tmp_path / "cpuinfo"
    about.write_text("model name\t: avx512f by name only\nflags\t\t: fpu avx2 amx_tile\n")
    assert machine.cpu_flags(about) == {"fpu", "avx2", "amx_tile"}
    assert machine.cpu_flags(tmp_path / "absent") == set()
