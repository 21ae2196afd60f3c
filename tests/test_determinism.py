"""The same input and seed give the same bytes, in any process; files get the modes that the umask leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import in_child, note, tree
from tiny_run import CONTEXT, make_source, write_text

from uptrain.conversion.convert import convert

PROCESSES = 10
CONVERSIONS: dict[str, dict[str, Any]] = {
    "mean": {"method": "mean"},
    "random": {"method": "random", "seed": 3},
    "factorize": {"method": "factorize"},
    "search": {"method": "align", "grouping": "search"},
}
CALIBRATED = {
    "calibrated": {
        "calibration": "text.jsonl",
        "calibration_tokens": 8 * CONTEXT,
        "reconstruct_steps": 2,
    },
}
# Read from the standard input: where to work, and what to convert there, by the target's name.
CODE = """
import json, os, sys
from uptrain.conversion.convert import convert
folder, conversions = json.load(sys.stdin)
os.chdir(folder)
for target, options in conversions.items():
    convert("../source", target, 2, device="cpu", max_shard_bytes=100_000, **options)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint whose tensors and metadata come in no sorted order."""
    source = make_source(tmp_path / "source", num_key_value_heads=4)
    write_text(tmp_path / "text.jsonl", 12)
    return source


def convert_in_a_process(folder: Path, conversions: dict[str, Any], hash_seed: int) -> None:
    folder.mkdir()
    (folder / "text.jsonl").symlink_to("../text.jsonl")
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps([str(folder), conversions]),
        env=environment,
        text=True,
        check=True,
    )


@pytest.mark.parametrize(
    ("processes", "conversions"),
    [
        (2, CONVERSIONS),
        pytest.param(PROCESSES, CONVERSIONS | CALIBRATED, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("source")
def test_the_same_bytes_in_every_process(
    tmp_path: Path, processes: int, conversions: dict[str, Any]
) -> None:
    contents = set()
    for number in range(processes):
        folder = tmp_path / f"work-{number}"
        convert_in_a_process(folder, conversions, hash_seed=number)
        contents.add(frozenset(tree(folder).items()))
    assert len(contents) == 1
    assert {name.split("/")[0] for name in tree(folder)} == {*conversions, "text.jsonl"}
    same = {"same bytes": processes}
    name = f"convert, {len(conversions)} ways"
    note(fault="hash seeds", operation=name, points=processes, outcomes=same)


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_modes_follow_the_umask(tmp_path: Path, source: Path, umask: int) -> None:
    target = tmp_path / "target"

    def work() -> None:
        os.umask(umask)
        convert(source, target, 2, max_shard_bytes=100_000)

    assert in_child(work) == 0
    modes = {path.stat().st_mode & 0o777 for path in target.rglob("*")}
    assert modes == {0o666 & ~umask}
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask
