"""One thread for each test process; how many families a run has checked."""

import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count the families that tests have recorded."""
    passed = terminalreporter.stats.get("passed", [])
    found = [value for test in passed for key, value in test.user_properties if key == "family"]
    if found:
        terminalreporter.write_line(f"{len(set(found))} families checked, in {len(found)} forms")
