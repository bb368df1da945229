import os
import signal
import time

import pytest

from kdtune.runs import InterruptFlag

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def without_nohup():
    """A SIGHUP that is ignored stays so; the tests themselves may be run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_sets_the_flag(number):
    told = []
    with InterruptFlag(told.append) as interrupt:
        assert not interrupt.requested and interrupt.signal_name is None
        os.kill(os.getpid(), number)
        assert interrupt.requested
        assert interrupt.signal_name == number.name
        deadline = time.monotonic() + 5
        while not told and time.monotonic() < deadline:
            time.sleep(0.005)
    assert told[0].startswith(f"{number.name}: the run will save after this step and end")
    assert ("Ctrl-C again" in told[0]) == (number == signal.SIGINT)


def test_the_second_ctrl_c_raises():
    with InterruptFlag() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested


def test_repeated_signals_stay_a_flag_told_once_and_ctrl_c_after_them_raises():
    told = []
    with InterruptFlag(told.append) as interrupt:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert interrupt.signal_name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    assert len(told) == 1


def test_handlers_come_back_even_after_an_error():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), InterruptFlag():
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with InterruptFlag() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
