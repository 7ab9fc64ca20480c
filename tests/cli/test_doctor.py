"""``mitrain doctor``: what it says of this machine is so, and what is to be mended ends it with 1."""

import json
import subprocess
from types import SimpleNamespace

import torch
from commands import as_json

from mitrain.cli import checks, doctor, machine, main
from mitrain.cli.checks import Check
from mitrain.core import provenance
from mitrain.models import quant


def test_the_document_is_this_machines(capsys, monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", (lambda: Check("port", True, "29500 is free"),))
    found = as_json(capsys, "doctor")
    assert found["versions"]["torch"] == provenance.version("torch")
    assert found["cpu"]["torch"] == torch.backends.cpu.get_cpu_capability()
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert {fault["package"] for fault in found["faults"]} <= {"bitsandbytes"}
    assert found["checks"][0] == {"name": "port", "ok": True, "detail": "29500 is free", "fix": ""}
    assert [check["name"] for check in found["checks"]] == ["port", "known-faults"]


def test_every_check_runs_on_this_machine():
    found = checks.check_all()
    assert len({check.name for check in found}) == len(checks.CHECKS) and all(check.detail for check in found)
    assert all(bool(check.fix) != check.ok for check in found)


def test_a_fault_is_a_line_with_what_it_means(capsys, monkeypatch):
    fault = {
        "package": "x",
        "what": "x is wrong for:",
        "measured": "32 (off by 1.5)",
        "columns": [32],
        "means": "Not ours.",
    }
    monkeypatch.setattr(checks, "CHECKS", ())
    monkeypatch.setattr(quant, "nf4_fault", lambda: fault)
    assert main(["doctor"]) == 0
    assert "ok   known-faults  x is wrong for: 32 (off by 1.5). Not ours." in capsys.readouterr().out.splitlines()
    monkeypatch.setattr(quant, "nf4_fault", lambda: None)
    assert main(["doctor"]) == 0
    assert "ok   known-faults  none of another package shows here" in capsys.readouterr().out.splitlines()


def test_what_is_to_be_mended_ends_it_with_1(capsys, monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", (lambda: Check("disk", False, "full", "make room"),))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "BAD  disk          full" in lines and "                   -> make room" in lines
    assert lines[-1] == "1 of 2 checks found something to mend"


def ended(monkeypatch, result):
    def run(command, **options):
        assert command[-3:] == ["mitrain", "doctor", "--json"] and "--nproc-per-node=2" in command
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(subprocess, "run", run)
    return doctor.of_two_ranks(3)


def test_two_ranks_that_do_not_come_to_an_end_are_a_fault(monkeypatch):
    rows = [{"name": name, "ok": True, "detail": "", "fix": ""} for name in ("port", "bandwidth", "step")]
    done = SimpleNamespace(stdout=json.dumps({"checks": rows}), stderr="", returncode=0)
    assert ended(monkeypatch, done) == rows[1:]
    (red,) = ended(monkeypatch, SimpleNamespace(stdout="", stderr="W0\nmitrain: no port\nmore", returncode=1))
    assert (red["name"], red["ok"], red["detail"]) == ("step", False, "mitrain: no port")
    (red,) = ended(monkeypatch, subprocess.TimeoutExpired("torchrun", 3))
    assert red["detail"] == "two ranks had not finished after 3 s" and "torchrun" in red["fix"]


def test_flags_are_words_of_the_first_kind_of_line(tmp_path):
    about = tmp_path / "cpuinfo"
    about.write_text("model name\t: avx512f by name only\nflags\t\t: fpu avx2 amx_tile\n")
    assert machine.cpu_flags(about) == {"fpu", "avx2", "amx_tile"}
    assert machine.cpu_flags(tmp_path / "absent") == set()
