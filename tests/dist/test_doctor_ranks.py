"""``mitrain doctor`` on two ranks: the faults of each, and what they find together."""

import json
import socket


def test_ranks_in_order_say_how_fast_they_reach_one_another(forge):
    first, second = forge.start(2, "doctor_worker:run", "sound").wait()
    assert (first.code, second.code, second.out) == (0, 0, ""), first.err + second.err
    found = {check["name"]: check for check in json.loads(first.out)["checks"]}
    assert found["disk"]["detail"] == "empty" and found["bandwidth"]["ok"] and found["step"]["ok"]
    assert "MB/s a rank in an all-reduce of 16 MiB over 2 ranks" in found["bandwidth"]["detail"]


def test_a_fault_of_any_rank_is_told_with_its_machine(forge):
    first, second = forge.start(2, "doctor_worker:run", "odd").wait()
    assert (first.code, second.code) == (1, 1), first.err + second.err
    found = {check["name"]: check for check in json.loads(first.out)["checks"]}
    assert (found["disk"]["detail"], found["disk"]["fix"]) == (f"{socket.gethostname()}: full", "make room")
    assert not found["bandwidth"]["ok"] and "GLOO_SOCKET_IFNAME" in found["bandwidth"]["fix"]
    assert found["step"]["detail"] == "ranks [1] hold other weights than rank 0 after one step"
