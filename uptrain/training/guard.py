"""What surrounds a run: the lock on its output, the signals that stop it."""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from uptrain.errors import TrainingError

_ECHO_SECONDS = 2.0


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Create a run's output folder and keep other runs out of it; a crash releases the lock.

    Raises:
        TrainingError: If it cannot be created, or another run is at work in it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise TrainingError(
            f"{output}: cannot be created ({error.strerror}); choose another output"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(
                f"{output}: another run is at work in it; wait for it or choose another output"
            ) from error
        yield
    except BaseException:
        with suppress(OSError):  # a run that could not start leaves no empty folder
            output.rmdir()
        raise
    finally:
        os.close(lock)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Take SIGTERM and SIGINT as a wish to stop; a second one acts as it would have.

    Only if it is no echo: torchrun passes on to its workers what a terminal told them already.

    Yields:
        Whether such a signal came.
    """
    asked = threading.Event()
    since = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread can handle signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: Any) -> None:
        nonlocal since
        if not asked.is_set():
            since = time.monotonic()
            asked.set()
        elif time.monotonic() - since > _ECHO_SECONDS:
            restore()
            signal.raise_signal(number)  # to this thread, so that it acts at once

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        restore()
