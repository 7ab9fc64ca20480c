"""Budgets, stop requests through real signals in a process of their own, and the watchdog."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from mitrain.core.errors import UserError
from mitrain.training.guard import Heartbeat, SkipBudget, StopRequest


def test_skips_in_a_row_end_the_run_and_applied_steps_forgive():
    budget = SkipBudget(in_a_row=2, total=100)
    for step, reason in enumerate(["non-finite loss", None, "non-finite loss", "no samples"]):
        budget.record(step, reason)
    with pytest.raises(UserError, match="3 steps skipped in a row at step 9.*non-finite loss 3 times") as caught:
        budget.record(9, "non-finite loss", saved=4)
    assert "the last applied step was 6" in str(caught.value)
    assert "the checkpoint of step 4 is the last finite one; lower train.lr" in str(caught.value)


def test_the_total_counts_through_applied_steps_and_through_a_resume():
    budget = SkipBudget(in_a_row=1, total=2)
    for step in range(4):
        budget.record(step, "no samples" if step % 2 else None)
    resumed = SkipBudget(in_a_row=1, total=2)
    resumed.load_state_dict(budget.state_dict())
    resumed.record(4, None)
    with pytest.raises(UserError, match="3 steps skipped in total"):
        resumed.record(5, "no samples")


def test_a_budget_of_zero_allows_none():
    with pytest.raises(UserError, match="1 steps skipped in a row"):
        SkipBudget(in_a_row=0).record(1, "no samples")


def run_with_signals(body: str, *numbers: signal.Signals) -> subprocess.CompletedProcess:
    """Run ``body`` in a new process; every line "ready" that it prints is answered by the next signal."""
    script = "import os, sys, time, signal\nfrom mitrain.training.guard import StopRequest\n"
    script += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # ignored where the tests run under nohup
    script += "def ready():\n    print('ready', flush=True)\n    sys.stdin.readline()\n" + body
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for number in numbers:
        while (line := process.stdout.readline()) not in ("ready\n", ""):
            lines.append(line)
        process.send_signal(number)
        process.stdin.write("go on\n")
        process.stdin.flush()
    rest, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, "".join(lines) + rest, errors)


TRAIN = """
for run in range(4):
    with StopRequest() as stop:
        for step in range(3):
            ready()
            if stop.requested:
                print('stopped by', stop.requested, 'after step', step)
                break
    print('saved')
"""


def test_the_first_signal_asks_and_the_step_is_finished():
    done = run_with_signals(TRAIN, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    assert done.returncode == 0
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        assert f"stopped by {name} after step 0\nsaved\n" in done.stdout
        assert f"{name}: stopping after this step" in done.stderr


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


TWICE = """
with StopRequest() as stop:
    ready()
    print('asked by', stop.requested, flush=True)
    for attempt in range(3):
        try:
            ready()
            print('went on', flush=True)
        except KeyboardInterrupt:
            print('aborted at once')
"""


def test_only_a_second_ctrl_c_aborts():
    done = run_with_signals(TWICE, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    assert done.stdout == "asked by SIGTERM\nwent on\nwent on\naborted at once\n"


SHIELDED = """
with StopRequest() as stop:
    ready()
    try:
        with stop.shield():
            with stop.shield():
                ready()
            print('written whole', flush=True)
        print('not reached')
    except KeyboardInterrupt:
        print('then aborted')
"""


def test_an_abort_waits_for_the_end_of_a_write():
    done = run_with_signals(SHIELDED, signal.SIGINT, signal.SIGINT)
    assert done.stdout == "written whole\nthen aborted\n"
    assert "as soon as the checkpoint is written" in done.stderr


def test_a_shield_without_an_abort_raises_nothing():
    done = run_with_signals(SHIELDED.replace("'not reached'", "'went on'"), signal.SIGINT, signal.SIGTERM)
    assert done.stdout == "written whole\nwent on\n"


def test_former_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(RuntimeError), StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_in_another_thread_only_requests_count():
    seen = []

    def work() -> None:
        with StopRequest() as stop:
            stop.request("time is up")
            stop.request("later reason")
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [("time is up", handler)]


HANG = """
import threading
from mitrain.training.guard import Heartbeat
def stuck_here():
    time.sleep({sleep})
with Heartbeat(minutes={minutes}) as heart:
    heart.beat()
    stuck_here()
print('went on')
"""


def test_the_watchdog_prints_where_a_hang_is_and_interrupts_nothing():
    done = run_with_signals(HANG.format(minutes=0.2 / 60, sleep=1))
    assert done.stdout == "went on\n"
    assert "Timeout" in done.stderr and "in stuck_here" in done.stderr


def test_the_watchdog_is_silent_when_off_and_after_the_end(capfd):
    with Heartbeat(minutes=0) as heart:
        heart.beat()
    done = run_with_signals(HANG.format(minutes=0.5 / 60, sleep=0) + "time.sleep(1)")
    assert done.stderr == "" and capfd.readouterr().err == ""
