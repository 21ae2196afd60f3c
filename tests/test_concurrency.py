"""Runs at once on one target: one wins whole, the others say so; a crash releases every lock."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from faults import in_child, note, start_child, tree
from many import in_processes
from operations import prepare_conversion, to_two
from tiny_run import make_recipe

from uptrain.checkpoint import staging
from uptrain.checkpoint.staging import check_target, side_folders, staged_folder
from uptrain.errors import CheckpointError, TrainingError
from uptrain.training.guard import locked

ROOT = Path(__file__).parents[1]
CONFIG = '{"model_type": "llama"}'


def race(folder: Path, rounds: int) -> None:
    """Let two conversions begin at once, with one target that both may replace every other time."""
    prepare_conversion(folder)
    whole = []
    for method in ("mean", "first"):
        to_two(folder, method=method)
        whole.append(tree(folder / "target"))
        shutil.rmtree(folder / "target")
    before = tree(folder)
    outcomes: Counter[str] = Counter()
    chooser = random.Random(0)

    def attempt(method: str, overwrite: bool, late_seconds: float) -> None:
        time.sleep(late_seconds)
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
            start_child(partial(attempt, method, overwrite, chooser.uniform(0, 0.03)))
            for method in ("mean", "first")
        ]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert set(codes) <= {0, 3}, codes
        assert 0 in codes
        assert overwrite or codes.count(0) == 1
        outcomes["one whole, the other refused" if 3 in codes else "both whole, in turn"] += 1
        assert tree(folder / "target") in whole
        others = {path for path in tree(folder) if not path.startswith("target/")}
        assert others == {*before, "target"}
    note(fault="two at once", operation="convert", points=rounds, outcomes=outcomes)


@pytest.mark.parametrize("rounds", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_of_two_conversions_to_one_target_one_wins_whole(rounds: int, tmp_path: Path) -> None:
    in_processes(1, race, tmp_path, rounds, patience_seconds=3600)


# What two runs can do to each other between two calls of the system, each done on purpose.


def publish(target: Path, content: str) -> None:
    """Do all that a second run does."""
    with staged_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text(CONFIG)
        (folder / "content").write_text(content)


def before(name: str, act: Callable[[], object], module: object = os) -> object:
    """Act once before the first call of a function that the staging module makes."""
    real = getattr(module, name)
    calls: list[None] = []

    def late(*arguments: object, **options: object) -> object:
        calls.append(None)
        if len(calls) == 1:
            act()
        return real(*arguments, **options)

    return mock.patch.object(module, name, late)


def hold(folder: Path) -> int:
    """Make a folder and lock it, as another run does."""
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@pytest.mark.parametrize(("name", "module"), [("open", os), ("flock", fcntl), ("fstat", os)])
def test_a_staging_folder_that_another_run_publishes_is_let_go(
    name: str, module: object, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    staged = side_folders(target)[0]

    def other() -> None:
        (staged / "config.json").write_text(CONFIG)
        staged.rename(target)

    with (
        before(name, other, module),
        pytest.raises(CheckpointError, match="another process is writing it right now; wait"),
        staged_folder(target),
    ):
        pytest.fail("two runs are at work")
    assert tree(tmp_path).keys() == {"target", "target/config.json"}


def test_a_target_that_appears_before_the_lock_is_refused_at_once(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with (
        before("mkdir", lambda: publish(target, "theirs")),
        pytest.raises(CheckpointError, match="target: exists already; choose another target"),
        staged_folder(target),
    ):
        pytest.fail("nothing may be written, only to be refused at the end")
    assert (target / "content").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("is_back", [True, False])
def test_a_target_that_another_run_replaces_meanwhile_is_looked_at_again(
    is_back: bool, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    for folder in (target, tmp_path / "new"):
        folder.mkdir()
        (folder / "config.json").write_text(CONFIG)

    def put_back() -> None:
        if is_back:
            (tmp_path / "new").rename(target)

    # Neither the old one's config nor an empty folder is there when it is looked for.
    with (
        before("read_json", lambda: target.rename(tmp_path / "old"), staging),
        before("iterdir", put_back, Path),
    ):
        check_target(target, overwrite=True)


def test_a_run_that_fails_late_leaves_what_the_next_one_has_staged(tmp_path: Path) -> None:
    target = tmp_path / "target"
    locks = []

    def begin_and_fail(folder: Path) -> None:
        if folder == target.parent:  # published; and the next one begins before this is durable
            locks.append(hold(side_folders(target)[0]))
            (side_folders(target)[0] / "theirs").write_text("")
            raise OSError(5, "Input/output error")

    with (
        mock.patch.object(staging, "sync_folder", begin_and_fail),
        pytest.raises(CheckpointError, match=r"cannot be written \(Input/output error\)"),
        staged_folder(target) as folder,
    ):
        (folder / "config.json").write_text(CONFIG)
    assert "target.uptrain-staging/theirs" in tree(tmp_path)
    os.close(locks[0])


@pytest.mark.parametrize("side", [1, 2])
def test_what_lies_beside_a_target_is_left_to_the_next_run_once_that_is_at_work(
    side: int, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    publish(target, "old")
    theirs = side_folders(target)[side]
    locks = []

    def begin(folder: Path) -> None:
        if folder == target.parent:
            locks.append(hold(side_folders(target)[0]))
            theirs.mkdir(exist_ok=True)
            (theirs / "theirs").write_text("")

    with mock.patch.object(staging, "sync_folder", begin):
        publish(target, "new")
    assert (target / "content").read_text() == "new"
    assert (theirs / "theirs").exists()
    os.close(locks[0])
    publish(target, "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


# Locks.


def test_two_runs_cannot_stage_one_target(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staged_folder(target) as folder:
        (folder / "config.json").write_text(CONFIG)
        with (
            pytest.raises(CheckpointError, match="another process is writing it right now; wait"),
            staged_folder(target),
        ):
            pytest.fail("two runs are at work")
        assert (folder / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def lock_and_die(output: Path) -> None:
    with locked(output):
        os.kill(os.getpid(), signal.SIGKILL)


def stage_and_die(target: Path) -> None:
    with staged_folder(target):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("die", [lock_and_die, stage_and_die])
def test_a_killed_run_releases_its_lock(die: Callable[[Path], None], tmp_path: Path) -> None:
    place = tmp_path / "place"
    (status,) = in_processes(1, in_child, partial(die, place))
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    if die is stage_and_die:
        publish(place, "next")
        assert [path.name for path in tmp_path.iterdir()] == ["place"]
    with (
        locked(place),
        pytest.raises(TrainingError, match="another run is at work"),
        locked(place),
    ):
        pytest.fail("two runs are at work")


@pytest.mark.slow
def test_of_two_trainings_on_one_output_the_second_is_refused_in_one_line(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, steps=100_000, repeat=True, save_every_steps=100_000)
    written = tmp_path / "recipe.yaml"
    written.write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    command = [sys.executable, "-m", "uptrain", "finetune", str(written), "--resume"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as first:
        while not (tmp_path / "output" / "train.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert second.returncode == 1
        (line,) = second.stderr.splitlines()
        assert "output: another run is at work in it; wait for it or choose another" in line
        first.kill()
    with locked(tmp_path / "output"):
        pass
