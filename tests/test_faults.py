"""Every operation on files fails or is killed, once: what is there is whole, and the next run ends well."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faults import Point, note
from many import in_processes
from operations import ALL, ERRORS, OPERATIONS, Sweep

HOUR = 3600


def sweep(name: str, folder: Path, kinds: tuple[str, ...], share: int, shares: int) -> int:
    """Sweep the points of an operation, or a share of them; gives how many.

    Args:
        name: Of the operation.
        folder: An empty one.
        kinds: Each point fails in all of these ways; `any error` takes turns with them.
        share: Which one, from 0.
        shares: How many there are.
    """
    swept = Sweep(name, folder)
    failures = []
    for index, point in enumerate(swept.points):
        if index % shares != share:
            continue
        for kind in kinds:
            kind = ERRORS[index // shares % 3] if kind == "any error" else kind
            try:
                swept.act(point, kind)
            except Exception as error:
                where = f"{kind} at {point.operation} {point.number} of {point.path}"
                failures.append(f"{where}: {type(error).__name__}: {error}")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures[:10])
    points = Counter(point.operation for point in swept.points[share::shares])
    note(
        fault="sweep",
        operation=name,
        points=points,
        outcomes=swept.outcomes,
        next=len(swept.recovered),
    )
    return len(swept.points)


ONCE = ("any error", "SIGKILL")
LASTING = ("any error", "EIO from then on", "SIGKILL")
FAST = {
    "convert": LASTING,
    "convert --overwrite": ONCE,
    "training checkpoint": ONCE,
    "export": ONCE,
    "model card": ALL,
    "evaluation": ONCE,
    "token shards": ONCE,
}


@pytest.mark.parametrize("name", FAST)
def test_every_point_fails_and_is_killed_once(name: str, tmp_path: Path) -> None:
    (points,) = in_processes(1, sweep, name, tmp_path, FAST[name], 0, 1, patience_seconds=HOUR)
    assert points > 5


SHARES = {"convert --calibration": 4, "finetune": 4, "run": 1}
KINDS = {"convert --calibration": LASTING, "finetune": ONCE, "run": ONCE}
SLOW = [
    (name, share, SHARES.get(name, 1))
    for name in OPERATIONS
    for share in range(SHARES.get(name, 1))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share", "shares"), SLOW)
def test_every_point_fails_in_every_way(name: str, share: int, shares: int, tmp_path: Path) -> None:
    kinds = KINDS.get(name, ALL)
    in_processes(1, sweep, name, tmp_path, kinds, share, shares, patience_seconds=HOUR)


RENAMES = ("rename", "replace")
MAKES = ("open", "mkdir", *RENAMES)


def too_early(points: list[Point]) -> list[str]:
    """Give what is put in its place before all of it is on the disk, or is not put there lastingly."""
    found = []
    for index, point in enumerate(points):
        if point.operation not in RENAMES:
            continue
        before, after = points[:index], points[index + 1 :]
        parent = str(Path(point.path).parent)
        if not any((each.operation, each.path) == ("fsync", parent) for each in after):
            found.append(f"{parent} after {point.operation} of {point.path}")
        last: dict[str, str] = {}  # of each file and folder in it, what was last done
        for each in before:
            place = str(Path(each.path).parent) if each.operation in MAKES else each.path
            if each.operation in (*MAKES, "write", "fsync"):
                last[place] = each.operation
        found += [
            f"{path} before {point.operation} of {point.path}"
            for path, operation in last.items()
            if f"{path}/".startswith(f"{point.path}/") and operation != "fsync"
        ]
    return found


def sync_points(name: str, folder: Path) -> tuple[list[str], int]:
    points = Sweep(name, folder).points
    return too_early(points), sum(point.operation in RENAMES for point in points)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "run"])
def test_nothing_is_put_in_its_place_before_it_is_on_the_disk(name: str, tmp_path: Path) -> None:
    ((found, renames),) = in_processes(1, sync_points, name, tmp_path)
    assert renames
    assert found == []


def modes(name: str, folder: Path) -> set[int]:
    """Give the modes of all that an operation makes, under an unusual mask."""
    swept = Sweep(name, folder)
    swept.start()
    os.umask(0o027)
    made_before = set(swept.work.rglob("*"))
    swept.run()
    return {path.stat().st_mode & 0o777 for path in {*swept.work.rglob("*")} - made_before}


@pytest.mark.parametrize("name", ["convert", "training checkpoint", "token shards", "finetune"])
def test_modes_follow_the_umask(name: str, tmp_path: Path) -> None:
    (found,) = in_processes(1, modes, name, tmp_path)
    assert found <= {0o750, 0o640}


DIGESTS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from faults import tree
from operations import OPERATIONS
for name in OPERATIONS:
    if name in sys.argv[3:]:
        folder = Path(sys.argv[2]) / name
        folder.mkdir()
        OPERATIONS[name].prepare(folder)
        OPERATIONS[name].run(folder)
        print(name, sorted(tree(folder / OPERATIONS[name].final).items()))
"""


@pytest.mark.parametrize("processes", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_processes_that_hash_otherwise_write_the_same_bytes(processes: int, tmp_path: Path) -> None:
    names = ["convert --overwrite", "convert --calibration", "training checkpoint", "finetune"]
    printed = set()
    for number in range(processes):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, "-c", DIGESTS, str(Path(__file__).parent), str(folder), *names]
        environment = os.environ | {"PYTHONHASHSEED": str(number), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        printed.add(done.stdout)
    assert len(printed) == 1
    assert len(printed.pop().splitlines()) == len(names)
    note(
        fault="hash seeds",
        operation=", ".join(names),
        points=processes,
        outcomes={"same bytes": processes},
    )
