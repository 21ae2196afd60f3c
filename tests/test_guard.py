"""Signals: one wish to stop, however often it is told at once."""

import signal
import time

import pytest

from uptrain.training import guard
from uptrain.training.guard import stop_on_signal


def tell(number: int) -> None:
    signal.raise_signal(number)
    time.sleep(0)  # Python handles it between two of its instructions


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_wish_and_its_echo_are_one(first, second):
    before = signal.getsignal(first)
    with stop_on_signal() as asked:
        assert not asked()
        tell(first)
        assert asked()
        tell(second)
    assert signal.getsignal(first) is before


def test_a_later_signal_acts_as_it_would_have(monkeypatch):
    monkeypatch.setattr(guard, "_ECHO_SECONDS", -1.0)
    # Where tests run in the background of a shell, it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_on_signal() as asked:
            tell(signal.SIGINT)
            assert asked()
            with pytest.raises(KeyboardInterrupt):
                tell(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
