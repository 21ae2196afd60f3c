"""Every operation on files fails or is killed, once: what is there is whole, and the next run ends well."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import (
    Point,
    fill_after,
    in_child,
    kill_at,
    note,
    own_mounts,
    points_of,
    raise_at,
    small_disk,
    start_child,
    tree,
    watched,
)
from many import in_processes
from tiny_run import CONTEXT, EXAMPLE, make_recipe, make_source, write_text
from transformers import AutoTokenizer

from uptrain.checkpoint.card import model_card
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.staging import replace_file
from uptrain.conversion.convert import convert
from uptrain.data.shards import TokenShards
from uptrain.errors import CheckpointError, DataError, TrainingError, UptrainError
from uptrain.loading import load_model
from uptrain.run import run
from uptrain.training.export import export_checkpoint
from uptrain.training.guard import locked
from uptrain.training.loop import finetune
from uptrain.training.saved import clean_states, find_states
from uptrain.training.state import StateWriter

ERRORS = ("ENOSPC", "EIO", "EDQUOT")
ALL = (*ERRORS, "EIO from then on", "SIGKILL")


@dataclass(frozen=True)
class Operation:
    """Something that writes files, in a folder of its own."""

    prepare: Callable[[Path], object]
    """Makes what the folder holds before."""
    run: Callable[[Path], object]
    again: Callable[[Path], object]
    """The next run, whatever the one before left."""
    final: str
    """What must be absent, old or new, and whole."""
    see: Callable[[Path], Any] = lambda final: tree(final) if final.exists() else None
    """Gives what counts of it."""
    stays: tuple[str, ...] = ()
    """How names begin of what an error may leave, for the next run to go on from."""
    volatile: tuple[str, ...] = ()
    """Names of files whose content tells times."""
    is_swept: Callable[[Point], bool] = lambda point: True


# Conversions, of a checkpoint in one file to one in two.

CALIBRATED: dict[str, Any] = {
    "calibration_tokens": 8 * CONTEXT, "reconstruct_steps": 1, "device": "cpu"
}  # fmt: skip


def prepare_conversion(folder: Path) -> None:
    make_source(folder / "source", num_key_value_heads=4)
    write_text(folder / "source" / "README.md", 1)
    write_text(folder / "text.jsonl", 12)


def to_two(folder: Path, **options: Any) -> None:
    convert(folder / "source", folder / "target", 2, max_shard_bytes=100_000, **options)


def to_two_again(folder: Path, **options: Any) -> None:
    to_two(folder, overwrite=(folder / "target").exists(), **options)


def prepare_overwrite(folder: Path) -> None:
    prepare_conversion(folder)
    convert(folder / "source", folder / "target", 1)


# Training checkpoints: two are there, a third is saved, the first removed.


def save_states(folder: Path, *steps: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    with StateWriter(folder / "checkpoints", model, optimizer, {"seed": 0}) as writer:
        for step in steps:
            writer.save(step)


def save_again(folder: Path) -> None:
    clean_states(folder / "checkpoints")
    save_states(folder, 3)


def see_newest(folder: Path) -> Any:
    return tree(find_states(folder)[-1].folder)


# Exports, over the one of an earlier run.


def prepare_export(folder: Path) -> None:
    make_source(folder / "source")
    export(folder, 1)


def export(folder: Path, steps: int = 2) -> None:
    source = open_checkpoint(folder / "source")
    model = load_model(source, torch.device("cpu"))
    with torch.no_grad():
        model.model.norm.weight += steps
    export_checkpoint(model, source, folder / "final", {"steps": steps, "tokens": 0})


def rewrite_card(folder: Path) -> None:
    heads = {"source": 4, "target": 2}
    record = {"source": {"name": "source", "revision": None}, "num_key_value_heads": heads}
    record |= {"method": "mean", "grouping": "contiguous", "seed": 0, "uptrain_version": "0"}
    replace_file(folder / "README.md", model_card(record).encode())


# Token shards, of a text that has none yet, and of one that changed.


def tokenise(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    TokenShards.prepare(folder / "tokens", [folder / "text.jsonl"], tokenizer, shard_tokens=500)


def prepare_other_tokens(folder: Path) -> None:
    write_text(folder / "text.jsonl", 12)
    tokenise(folder)
    write_text(folder / "text.jsonl", 13)


def see_tokens(folder: Path) -> Any:
    try:
        return TokenShards.open(folder).digest
    except DataError:
        return None


# Whole runs.


def recipe_of(folder: Path, **changes: Any) -> Any:
    validation = str(folder / "validation.jsonl")
    return make_recipe(folder, steps=3, save_every_steps=1, validation=validation, **changes)


def train(folder: Path) -> None:
    finetune(recipe_of(folder), resume=True)


def prepare_run(folder: Path) -> None:
    make_source(folder / "source", num_key_value_heads=4)
    recipe_of(folder)


def run_all(folder: Path) -> None:
    recipe = recipe_of(folder).model_dump(exclude_unset=True)
    recipe |= {"convert": {"num_key_value_heads": 2}}
    run(
        type(recipe_of(folder)).model_validate(
            recipe | {"evaluate": {"data": recipe["data"]["validation"]}}
        )
    )


OPERATIONS = {
    "convert": Operation(prepare_conversion, to_two, to_two_again, "target"),
    "convert --overwrite": Operation(
        prepare_overwrite,
        lambda folder: to_two(folder, overwrite=True),
        to_two_again,
        "target",
        stays=("target.uptrain-replaced",),
    ),
    "convert --calibration": Operation(
        prepare_conversion,
        lambda folder: to_two(folder, calibration=folder / "text.jsonl", **CALIBRATED),
        lambda folder: to_two_again(folder, calibration=folder / "text.jsonl", **CALIBRATED),
        "target",
        stays=("target.uptrain-partial",),
    ),
    "training checkpoint": Operation(
        lambda folder: save_states(folder, 1, 2),
        lambda folder: save_states(folder, 3),
        save_again,
        "checkpoints",
        see_newest,
    ),
    "export": Operation(prepare_export, export, export, "final", stays=("final.uptrain-replaced",)),
    "model card": Operation(
        lambda folder: (folder / "README.md").write_text("old"),
        rewrite_card,
        rewrite_card,
        "README.md",
        Path.read_bytes,
    ),
    "token shards": Operation(
        lambda folder: write_text(folder / "text.jsonl", 12),
        tokenise,
        tokenise,
        "tokens",
        see_tokens,
        stays=(".tokens.lock",),
        volatile=("seen.json",),
    ),
    "token shards anew": Operation(
        prepare_other_tokens,
        tokenise,
        tokenise,
        "tokens",
        see_tokens,
        stays=(".tokens.lock",),
        volatile=("seen.json",),
    ),
    "finetune": Operation(
        recipe_of,
        train,
        train,
        "output/final",
        stays=("output",),
        volatile=("seen.json", "train.jsonl"),
    ),
    "run": Operation(
        prepare_run,
        run_all,
        run_all,
        "output/final",
        lambda final: tree(final).keys() if final.exists() else None,
        stays=("output",),
        volatile=("seen.json", "train.jsonl", "report.json", "report.md", "loss.png"),
        is_swept=lambda point: "report" in point.path or "README" in point.path,
    ),
}


class Sweep:
    """An operation, what it starts from, and what a run of it gives that nothing befalls."""

    def __init__(self, name: str, folder: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not outlive a fork
        os.environ["ACCELERATE_USE_CPU"] = "true"
        self.operation = OPERATIONS[name]
        self.before, self.work = folder / "before", folder / "work"
        self.before.mkdir()
        self.operation.prepare(self.before)
        self.start()
        self.old, self.inputs = self.see(), tree(self.before)
        self.inputs = {
            path: digest
            for path, digest in self.inputs.items()
            if not path.startswith(self.operation.final)
        }
        self.run()  # imports what is imported late
        self.start()
        points = points_of(self.work, self.run)
        self.points = [point for point in points if self.operation.is_swept(point)]
        self.new = self.see()
        assert self.new not in (None, self.old)
        self.operation.again(self.work)
        self.end = self.content()
        self.recovered: set[frozenset[Any]] = set()
        self.outcomes: Counter[str] = Counter()

    def start(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.before, self.work)

    def run(self) -> None:
        self.operation.run(self.work)

    def see(self) -> Any:
        return self.operation.see(self.work / self.operation.final)

    def content(self) -> dict[str, str | None]:
        """Give the digests of all files that are to be the same after every good end."""
        names = self.operation.volatile
        return {p: d for p, d in tree(self.work).items() if Path(p).name not in names}

    def act(self, point: Point, kind: str) -> None:
        """Let a point fail in one way, judge what is there, and let the next run follow."""
        self.start()
        if kind == "SIGKILL":
            status = in_child(lambda: self.run_with(kill_at(point)))
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "it was not killed"
        else:
            number, _, is_lasting = kind.partition(" ")
            self.fail(lambda: self.run_with(raise_at(point, number, bool(is_lasting))), is_lasting)
        self.judge(kind)

    def run_with(self, before: Any) -> None:
        with watched(self.work, before):
            self.run()

    def fail(self, act: Callable[[], object], is_lasting: object) -> None:
        """Act; an error is said in one line that names a file, and leaves nothing."""
        try:
            act()
        except UptrainError as error:
            assert str(self.work) in str(error), f"no file is named: {error}"
            assert "\n" not in str(error), f"not one line: {error}"
            allowed = (self.operation.final, *self.operation.stays)
            left = [
                p for p in tree(self.work) if p not in self.inputs and not p.startswith(allowed)
            ]
            assert is_lasting or not left, f"{left[0]} is left by: {error}"
        else:
            assert self.see() == self.new, "it went on, to another end"

    def judge(self, kind: str) -> None:
        """See that what is there is whole; that the next run ends as if nothing had happened."""
        found = self.see()
        outcomes = ("absent", None), ("old", self.old), ("new", self.new)
        outcome = next((name for name, whole in outcomes if found == whole), None)
        assert outcome is not None, "it is half"
        self.outcomes[f"{kind}: {outcome}"] += 1
        left = tree(self.work)
        changed = [path for path, digest in self.inputs.items() if left.get(path) != digest]
        assert not changed, f"{changed} was changed"
        state = frozenset(left.items())
        if state not in self.recovered:  # what follows depends on nothing else
            self.recovered.add(state)
            self.operation.again(self.work)
            assert self.content() == self.end, "the next run ended otherwise"


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


BRIEF = ("any error", "SIGKILL")
FAST = {
    "convert": ("any error", "EIO from then on", "SIGKILL"),
    "convert --overwrite": ("any error", "EIO from then on", "SIGKILL"),
    "training checkpoint": ALL,
    "export": BRIEF,
    "model card": ALL,
    "token shards": BRIEF,
    "token shards anew": BRIEF,
}


@pytest.mark.parametrize("name", FAST)
def test_every_point_fails_and_is_killed_once(name: str, tmp_path: Path) -> None:
    (points,) = in_processes(1, sweep, name, tmp_path, FAST[name], 0, 1)
    assert points > 5


SHARES = {"convert --calibration": 4, "finetune": 16, "run": 4}
SLOW = [
    (name, share, SHARES.get(name, 1))
    for name in OPERATIONS
    for share in range(SHARES.get(name, 1))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share", "shares"), SLOW)
def test_every_point_fails_in_every_way(name: str, share: int, shares: int, tmp_path: Path) -> None:
    in_processes(
        1, sweep, name, tmp_path, BRIEF if name in ("finetune", "run") else ALL, share, shares
    )


def fill(name: str, folder: Path, thresholds: int) -> None:
    """Let the disk be full after so many bytes as are written, and fewer."""
    swept = Sweep(name, folder)
    written = sum(point.nbytes for point in swept.points)
    for part in range(thresholds):
        swept.start()
        swept.fail(lambda: swept.run_with(fill_after(written * part // thresholds)), False)
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
    in_processes(1, fill, name, tmp_path, 50)


def fill_tmpfs(folder: Path, thresholds: int) -> int | None:
    """Convert to disks of growing size; gives how many were too small, None if none can be made."""
    if not own_mounts():
        return None
    prepare_conversion(folder)
    disk = folder / "disk"
    disk.mkdir()
    to_two(folder)
    pages = sum(-(-path.stat().st_size // 4096) for path in (folder / "target").iterdir())
    expected, source = tree(folder / "target"), tree(folder / "source")
    refused = full = 0
    for part in range(thresholds + 1):
        nbytes = max(1, pages * part // thresholds) * 4096
        for is_other_filling in (False, True):
            with small_disk(disk, nbytes), pytest.MonkeyPatch.context() as patch:
                if is_other_filling:  # there was room when that was looked at
                    patch.setattr(
                        "shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2**40)
                    )
                try:
                    convert(folder / "source", disk / "target", 2, max_shard_bytes=100_000)
                    assert tree(disk / "target") == expected
                except CheckpointError as error:
                    refused += " free; make room" in str(error)
                    full += "cannot be written (No space left on device)" in str(error)
                    assert tree(disk) == {}
    assert tree(folder / "source") == source
    note(
        fault="small disk",
        operation="convert",
        points=thresholds,
        outcomes={"refused": refused, "full: absent": full},
    )
    return refused, full


def test_a_small_disk_is_refused_or_left_empty(tmp_path: Path) -> None:
    (found,) = in_processes(1, fill_tmpfs, tmp_path, 50)
    if found is None:
        pytest.skip("this system lets nobody mount a disk")
    refused, full = found
    assert refused + full == 100  # of 102, the two largest being large enough
    assert refused > 40  # all but those that lack the small files, or the rest of a page


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
    in_processes(1, kill_at_random, name, tmp_path, kills)


def race(folder: Path, rounds: int) -> dict[str, int]:
    """Let two conversions begin at once, with one target that one of them may replace."""
    prepare_conversion(folder)
    whole = []
    for method in ("mean", "first"):
        to_two(folder, method=method)
        whole.append(tree(folder / "target"))
        shutil.rmtree(folder / "target")
    before = tree(folder)
    outcomes: Counter[str] = Counter()

    def attempt(method: str, overwrite: bool) -> None:
        try:
            to_two(folder, method=method, overwrite=overwrite)
        except CheckpointError as error:
            polite = ("another process is writing it right now", "exists already")
            print(method, overwrite, error, file=sys.stderr)
            os._exit(3 if any(text in str(error) for text in polite) else 4)

    for number in range(rounds):
        overwrite = number % 2 == 1
        if not overwrite:
            shutil.rmtree(folder / "target", ignore_errors=True)
        children = [
            start_child(lambda method=method: attempt(method, overwrite))
            for method in ("mean", "first")
        ]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert set(codes) <= {0, 3}, codes
        assert 0 in codes
        outcomes[f"{codes.count(0)} won"] += 1
        assert tree(folder / "target") in whole
        assert {path for path in tree(folder) if not path.startswith("target/")} == {
            *before,
            "target",
        }
    note(fault="two at once", operation="convert", points=rounds, outcomes=outcomes)


@pytest.mark.parametrize("rounds", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_of_two_conversions_to_one_target_one_wins_whole(rounds: int, tmp_path: Path) -> None:
    in_processes(1, race, tmp_path, rounds)


def lock_and_die(output: Path) -> None:
    with locked(output):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_releases_its_output(tmp_path: Path) -> None:
    status = in_processes(1, in_child, partial(lock_and_die, tmp_path))
    assert os.waitstatus_to_exitcode(status[0]) == -signal.SIGKILL
    with (
        locked(tmp_path),
        pytest.raises(TrainingError, match="another run is at work"),
        locked(tmp_path),
    ):
        pass


def modes(name: str, folder: Path) -> set[int]:
    """Give the modes of all that an operation makes, under an unusual mask."""
    swept = Sweep(name, folder)
    swept.start()
    os.umask(0o027)
    made_before = {path for path in swept.work.rglob("*")}
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
from test_faults import OPERATIONS, to_two
import os, shutil
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
    note(fault="hash seeds", operation="all", points=processes, outcomes={"same bytes": processes})
