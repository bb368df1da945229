import os
import signal

import pytest

from kdtune.training import InterruptFlag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_sets_the_flag(number):
    with InterruptFlag() as interrupt:
        assert not interrupt.requested and interrupt.signal_name is None
        os.kill(os.getpid(), number)
        assert interrupt.requested
        assert interrupt.signal_name == number.name


def test_the_second_ctrl_c_raises():
    with InterruptFlag() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested


def test_repeated_sigterm_stays_a_flag_and_ctrl_c_after_it_raises():
    with InterruptFlag() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal_name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_come_back_even_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), InterruptFlag():
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
