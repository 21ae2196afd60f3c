"""Disks that are too small, or fill while they are written to: nothing half stays."""

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from faults import Point, fill_after, note, own_mounts, small_disk, tree, watched
from many import in_processes
from operations import (
    Sweep,
    export,
    prepare_conversion,
    prepare_export,
    save_states,
    to_two,
)

from uptrain.checkpoint.staging import check_room, write_bytes
from uptrain.errors import CheckpointError, UptrainError
from uptrain.training.saved import find_states

PAGE_BYTES = 4096


def no_room(free_bytes: int) -> Any:
    """Let every disk have so many bytes free."""
    usage = shutil._ntuple_diskusage(2**50, 2**50 - free_bytes, free_bytes)
    return mock.patch("shutil.disk_usage", return_value=usage)


def refused_writes(name: str, folder: Path) -> tuple[str, list[Point]]:
    """Run an operation on a disk without room; gives what it says, and what it still wrote."""
    swept = Sweep(name, folder)
    swept.start()
    found = tree(swept.work)
    points: list[Point] = []
    with no_room(10), watched(swept.work, lambda point, _: points.append(point)):
        try:
            swept.run()
        except UptrainError as error:
            assert tree(swept.work) == found
            return str(error), [point for point in points if point.nbytes]
    return "nothing", []


@pytest.mark.parametrize(
    "name", ["convert", "convert --calibration", "training checkpoint", "export", "finetune"]
)
def test_what_there_is_no_room_for_is_refused_before_the_first_byte(
    name: str, tmp_path: Path
) -> None:
    ((message, written),) = in_processes(1, refused_writes, name, tmp_path)
    assert "its disk has 0.0 MiB free; make room, or choose another disk" in message
    assert written == []


def test_what_just_fits_is_begun(tmp_path: Path) -> None:
    with no_room(1000):
        check_room(tmp_path / "target", 1000)
        with pytest.raises(CheckpointError, match="needs"):
            check_room(tmp_path / "target", 1001)


def test_a_write_that_the_system_cuts_short_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    write_bytes(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def fill(name: str, folder: Path, thresholds: int) -> None:
    """Let the disk be full after so many bytes as are written, and fewer."""
    swept = Sweep(name, folder)
    written = sum(point.nbytes for point in swept.points)
    for part in range(thresholds):
        swept.start()
        swept.fail(partial(swept.run_with, fill_after(written * part // thresholds)), False)
        swept.judge("full")
    assert swept.outcomes.keys() <= {"full: absent", "full: old"}
    note(fault="disk full", operation=name, points=thresholds, outcomes=swept.outcomes)


@pytest.mark.parametrize(
    "name",
    ["convert", "training checkpoint"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("convert --overwrite", "convert --calibration", "export", "token shards")
    ],
)
def test_a_disk_that_fills_at_any_byte_leaves_nothing_half(name: str, tmp_path: Path) -> None:
    in_processes(1, fill, name, tmp_path, 50, patience_seconds=3600)


# Real disks: each a tmpfs that only the process sees.


@dataclass(frozen=True)
class Small:
    """What writes to a disk of its own, the rest of what it needs lying elsewhere."""

    prepare: Callable[[Path], object]
    """Makes what lies elsewhere."""
    begin: Callable[[Path, Path], object]
    """Makes, given that and the disk, what is there before."""
    run: Callable[[Path, Path], object]
    see: Callable[[Path], Any] = tree
    """Gives what counts of the disk."""


def newest_states(disk: Path) -> Any:
    return [tree(state.folder) for state in find_states(disk / "checkpoints")[-1:]]


SMALL = {
    "convert": Small(
        prepare_conversion,
        lambda folder, disk: None,
        lambda folder, disk: to_two(folder, disk / "target"),
    ),
    "export": Small(
        prepare_export,
        lambda folder, disk: shutil.copytree(folder / "final", disk / "final"),
        lambda folder, disk: export(folder, target=disk / "final"),
    ),
    "training checkpoint": Small(
        lambda folder: None,
        lambda folder, disk: save_states(disk, 1, 2, size=128),
        lambda folder, disk: save_states(disk, 3, size=128),
        newest_states,
    ),
}


def used_bytes(disk: Path) -> int:
    """Count whole pages, as a tmpfs does."""
    files = [path for path in disk.rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // PAGE_BYTES) * PAGE_BYTES for path in files)


def fill_tmpfs(name: str, folder: Path, thresholds: int) -> dict[str, int] | None:
    """Write to disks of growing size; gives how often it ended in which way, None if none can be made."""
    if not own_mounts():
        return None
    small, disk = SMALL[name], folder / "disk"
    small.prepare(folder)
    elsewhere = tree(folder)
    disk.mkdir()
    with small_disk(disk, 2**30):
        small.begin(folder, disk)
        old, least = small.see(disk), used_bytes(disk)
        used = [least]
        with watched(disk, lambda *_: used.append(used_bytes(disk))):
            small.run(folder, disk)
        new, pages = small.see(disk), (max(used) - least) // PAGE_BYTES
    outcomes = {"refused": 0, "full": 0, "new": 0}
    for part in range(thresholds):
        nbytes = least + max(1, pages * part // (thresholds - 1)) * PAGE_BYTES
        for free_bytes in (None, 2**40):  # in truth, or before another process fills it
            with small_disk(disk, nbytes), no_room(free_bytes) if free_bytes else nullcontext():
                small.begin(folder, disk)
                try:
                    small.run(folder, disk)
                    outcome, expected = "new", new
                except UptrainError as error:
                    is_refused = " free; make room" in str(error)
                    assert is_refused or "No space left on device" in str(error)
                    outcome, expected = "refused" if is_refused else "full", old
                    assert not [*disk.rglob("*.uptrain-staging")]
                assert small.see(disk) == expected
                outcomes[outcome] += 1
    disk.rmdir()
    assert tree(folder) == elsewhere
    note(fault="small disk", operation=name, points=2 * thresholds, outcomes=outcomes)
    return outcomes


@pytest.mark.parametrize("name", SMALL)
def test_a_small_disk_is_refused_or_left_as_it_was(name: str, tmp_path: Path) -> None:
    (found,) = in_processes(1, fill_tmpfs, name, tmp_path, 50)
    if found is None:
        pytest.skip("this system lets nobody mount a disk")
    assert found["refused"] > 35  # all but those that lack the small files, or the rest of a page
    assert found["full"] > 40
    assert found["new"] >= 2  # the largest
