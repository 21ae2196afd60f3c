"""What the rows of a run's log tell while it runs: spikes, the best step, an overfit."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

_WINDOW_STEPS = 50
_MIN_STEPS = 10
# Deviations from the median that no ordinary step of a run reached in our runs.
_SPIKE = 10.0
_RISING = 3

Rows = Sequence[dict[str, Any]]


def is_spike(rows: Rows, loss: float) -> bool:
    """Say whether a step's loss stands out from those of the steps before it.

    Args:
        rows: Of the log, before that step.
        loss: Of that step.

    Returns:
        Whether it lies above the median of the last 50 steps by ten times their median absolute
        deviation; never within the first ten steps.
    """
    losses = (row["loss"] for row in reversed(rows) if "loss" in row)
    recent: list[float] = list(itertools.islice(losses, _WINDOW_STEPS))
    if len(recent) < _MIN_STEPS:
        return False
    median = statistics.median(recent)
    deviation = statistics.median(abs(each - median) for each in recent)
    return loss > median + _SPIKE * deviation


def best_step(rows: Rows) -> int | None:
    """Give the step with the lowest validation loss; the earliest of equals, None if none."""
    measured = [row for row in rows if "validation_loss" in row]
    best = min(measured, key=lambda row: row["validation_loss"], default=None)
    return None if best is None else int(best["step"])


def is_overfit(rows: Rows) -> bool:
    """Say whether the validation loss has just risen for the third time in a row."""
    measured = [row["validation_loss"] for row in rows if "validation_loss" in row]
    rises = 0
    for before, after in itertools.pairwise(measured):
        rises = rises + 1 if after > before else 0
    return rises == _RISING
