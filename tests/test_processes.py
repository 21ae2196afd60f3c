"""Processes that act together: results in their order, an error of one in all."""

import pytest
from many import in_processes

from uptrain.errors import DataError
from uptrain.training import processes


def refuse() -> None:
    raise DataError("the text is too short; add some")


def stumble() -> None:
    if processes.rank() == 1:
        raise KeyError("missing")


def act() -> tuple[list[int], str]:
    with pytest.raises(DataError, match="the text is too short; add some"):
        processes.in_main(refuse)
    with pytest.raises(KeyError if processes.rank() == 1 else RuntimeError, match="missing"):
        processes.in_all(stumble)
    ranks = processes.in_all(lambda: processes.rank() * 10)
    return ranks, processes.in_main(lambda: f"from {processes.rank()} of {processes.count()}")


def test_all_hear_of_everything():
    assert in_processes(3, act) == [([0, 10, 20], "from 0 of 3")] * 3


def test_one_process_is_all_of_them():
    assert processes.in_all(lambda: 7) == [7]
    assert processes.in_main(lambda: "alone") == "alone"
    with pytest.raises(DataError):
        processes.in_main(refuse)
