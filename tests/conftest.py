"""One thread for each test process; how many families a run has checked."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread, whose sums are always added in the same order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count the families that tests have recorded."""
    passed = terminalreporter.stats.get("passed", [])
    found = [value for test in passed for key, value in test.user_properties if key == "family"]
    if found:
        terminalreporter.write_line(f"{len(set(found))} families checked, in {len(found)} forms")
