"""A signal outside of training: an exception where the main thread stands, sent again where it was swallowed, and the
process's end where the thread hears nothing. Real signals, in a process of their own."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from mitrain.training.guard import Interrupted, Interruptible

HEAD = """
import ctypes, os, signal, threading, time
from mitrain.training import guard
guard.DEAF_S, guard.AGAIN_S = 0.3, 0.1
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup

def send(number):
    os.kill(os.getpid(), number)
"""


def ran(body: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HEAD + body]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_the_main_thread_hears_which_signal_it_was(name):
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(Interrupted) as caught, Interruptible():
            os.kill(os.getpid(), signal.Signals[name])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert caught.value.number == signal.Signals[name]
    assert isinstance(caught.value, KeyboardInterrupt)


def test_signals_at_once_are_one_and_do_not_disturb_what_cleans_up():
    done = ran("""
with guard.Interruptible():
    try:
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)
            send(signal.SIGHUP)
            time.sleep(1)  # three times as long as a swallowed one takes to be noticed
            print('cleaned up', flush=True)
    except KeyboardInterrupt as error:
        print(error.number, flush=True)
        os._exit(0)
""")
    assert (done.stdout, done.returncode) == ("cleaned up\n15\n", 0)


def test_one_that_a_callback_swallows_comes_again():
    done = ran("""
class Dying:
    def __del__(self):
        send(signal.SIGTERM)

with guard.Interruptible():
    try:
        Dying()
        print('swallowed', flush=True)
        time.sleep(60)
    except KeyboardInterrupt as error:
        print('again', error.number, flush=True)
        os._exit(0)
""")
    assert done.stdout == "swallowed\nagain 15\n"


def test_a_thread_that_hears_nothing_ends_with_its_process():
    """A lock of C that is taken twice: no signal ends that wait."""
    done = ran("""
lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
libc.pthread_mutex_lock(lock)
with guard.Interruptible():
    threading.Timer(0.1, send, [signal.SIGTERM]).start()
    libc.pthread_mutex_lock(lock)
    print('not reached')
""")
    assert (done.stdout, done.returncode) == ("", 128 + signal.SIGTERM)
    assert done.stderr.strip() == "mitrain: stopped by SIGTERM in a call that did not return"


def test_a_stop_request_inside_it_is_left_alone():
    """Whatever a step takes: the request is read at its end."""
    done = ran("""
with guard.Interruptible(), guard.StopRequest() as stop:
    send(signal.SIGTERM)
    time.sleep(1)
    print(stop.requested)
""")
    assert (done.stdout, done.returncode) == ("SIGTERM\n", 0)


def test_handlers_come_back_and_no_thread_stays():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before, others = [signal.getsignal(number) for number in numbers], set(threading.enumerate())
    with Interruptible():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        (watcher,) = set(threading.enumerate()) - others  # another test's may be waiting for its signal still
    watcher.join(10)
    assert not watcher.is_alive()
    assert [signal.getsignal(number) for number in numbers] == before and signal.set_wakeup_fd(-1) == -1
