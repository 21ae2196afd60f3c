"""Progress on standard error: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_FIRST_LINE_SECONDS = 2.0
_LINE_EVERY_SECONDS = 10.0


class Advance(Protocol):
    """Report `amount` more units done; `text` is shown beside the bar until the next one."""

    def __call__(self, amount: float, text: str = "") -> None:
        """Report progress."""


@contextmanager
def progress(description: str, total: float, unit: str = "", start: float = 0) -> Iterator[Advance]:
    """Show how far a piece of work is, with its rate and the time left.

    Args:
        description: What is being done, such as `convert`.
        total: The work to do, in `unit`.
        unit: `bytes`, `tokens`, `steps`, …
        start: What an earlier run did already.

    Yields:
        A function to call as work is done.
    """
    if sys.stderr.isatty():
        with _live_bar(description, total, unit, start) as advance:
            yield advance
    else:
        yield _plain_lines(description, total, unit, start)


@contextmanager
def _live_bar(description: str, total: float, unit: str, start: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    bar = Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        count,
        TextColumn("" if unit == "bytes" else unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(description, total=total, completed=int(start), text="")

        def advance(amount: float, text: str = "") -> None:
            if text:
                bar.update(task, advance=amount, text=text)
            else:
                bar.update(task, advance=amount)

        yield advance


def _plain_lines(description: str, total: float, unit: str, start: float) -> Advance:
    done = start
    begun = time.monotonic()
    next_line = begun + _FIRST_LINE_SECONDS

    def advance(amount: float, text: str = "") -> None:
        nonlocal done, next_line
        done += amount
        now = time.monotonic()
        if now < next_line:
            return
        next_line = now + _LINE_EVERY_SECONDS
        left = (total - done) * (now - begun) / max(done - start, 1e-9)
        parts = [f"{description}: {_amount(done, total, unit)}"]
        parts += [text] * bool(text) + [f"{left:.0f} s left"]
        print(", ".join(parts), file=sys.stderr, flush=True)

    return advance


def _amount(done: float, total: float, unit: str) -> str:
    if unit == "bytes":
        return f"{done / 2**20:,.0f} of {total / 2**20:,.0f} MiB"
    return f"{done:,.0f} of {total:,.0f} {unit}".rstrip()
