"""The first signal is noted, the second kills."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from jaxformer.errors import Stopped
from jaxformer.training.stopping import StopRequest

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_until_it_is_asked_for(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match=number.name) as caught:
            stop.check()
        assert caught.value.exit_code == 75
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(ZeroDivisionError), StopRequest():
        assert [signal.getsignal(each) for each in SIGNALS] != before
        raise ZeroDivisionError
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_between_items():
    taken = []
    with StopRequest() as stop, pytest.raises(Stopped):
        for item in stop.between(range(5)):
            taken.append(item)
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert taken == [0, 1, 2]
    assert list(StopRequest().between("abc")) == ["a", "b", "c"]


def test_in_another_thread_it_does_nothing():
    def work() -> None:
        with StopRequest() as stop:
            stop.check()
            worked.append(True)

    worked: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert worked


CHILD = """
import time
from jaxformer.training.stopping import StopRequest
with StopRequest():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_kills_at_once(second):
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)  # the first is only noted
        child.send_signal(second)
        assert child.wait(5) == -second
    finally:
        child.kill()
        child.communicate()
