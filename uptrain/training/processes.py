"""What the processes of a run do together: an error of one is an error of all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from uptrain.errors import UptrainError, one_line

T = TypeVar("T")


def rank() -> int:
    """Give the number of this process, from 0; the first is the main one."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Give the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def norm(part: torch.Tensor) -> float:
    """Give the norm of what all processes hold together.

    Args:
        part: [], the norm of what this one holds.
    """
    if count() == 1:
        return float(part)
    squared = part.double().square()
    dist.all_reduce(squared)
    return float(squared.sqrt())


def in_all(act: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Act in every process, and wait until all have.

    Args:
        act: Gives something that can be pickled.
        group: What they speak through; the run's own if not given.

    Returns:
        The results, in the order of processes.

    Raises:
        Exception: What `act` raised here; else, if it failed elsewhere, an UptrainError of the same
            kind and text, or a RuntimeError.
    """
    if count() == 1:
        return [act()]
    error: Exception | None = None
    mine: tuple[Any, type[Exception] | None, str] = (None, None, "")
    try:
        mine = (act(), None, "")
    except Exception as caught:  # whatever it is, the others must not wait for this process
        error = caught
        kind = type(caught) if isinstance(caught, UptrainError) else RuntimeError
        mine = (None, kind, str(caught) if kind is not RuntimeError else one_line(caught))
    outcomes: list[Any] = [mine] * count()
    dist.all_gather_object(outcomes, mine, group=group)
    if error is not None:
        raise error
    for _, kind, text in outcomes:
        if kind is not None:
            raise kind(text)
    return [result for result, _, _ in outcomes]


def in_main(act: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Act in the main process alone; all wait for its result, or raise its error.

    Args:
        act: As for `in_all`.
        group: As for `in_all`.
    """
    result: T = in_all(lambda: act() if rank() == 0 else None, group)[0]  # type: ignore[assignment]
    return result
