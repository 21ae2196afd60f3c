"""Runs are killed at random times: what is there is whole, and the next run ends to the bit as one."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from faults import in_child, note, start_child
from many import in_processes
from operations import Sweep


def kill_at_random(name: str, folder: Path, kills: int) -> None:
    """Kill runs after some time, wherever they are by then."""
    swept = Sweep(name, folder)
    swept.start()
    begun = time.monotonic()
    assert in_child(swept.run) == 0
    took = time.monotonic() - begun
    chooser = random.Random(0)
    for _ in range(kills):
        swept.start()
        child = start_child(swept.run)
        time.sleep(chooser.uniform(0, took))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        swept.judge("SIGKILL")
    note(fault="random SIGKILL", operation=name, points=kills, outcomes=swept.outcomes)


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("convert", 20),
        pytest.param("convert", 100, marks=pytest.mark.slow),
        pytest.param("convert --overwrite", 50, marks=pytest.mark.slow),
        pytest.param("convert --calibration", 50, marks=pytest.mark.slow),
        pytest.param("finetune", 100, marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_time_leaves_nothing_half(name: str, kills: int, tmp_path: Path) -> None:
    in_processes(1, kill_at_random, name, tmp_path, kills, patience_seconds=3600)
