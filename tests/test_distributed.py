"""Whole runs in several processes: they train like one, and go on whatever happens."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from many import Started, in_processes
from safetensors.torch import load_file
from tiny_run import CONTEXT, make_recipe

from uptrain.errors import Interrupted
from uptrain.training.loop import finetune
from uptrain.training.saved import find_states

ROOT = Path(__file__).parents[1]
STEPS = 24


def recipe_of(folder: Path, output: str, **train: Any) -> Any:
    options = {"steps": STEPS, "repeat": True, "save_every_steps": 2, "evaluate_every_steps": 10}
    validation = str(folder / "validation.jsonl")
    return make_recipe(
        folder, output=str(folder / output), validation=validation, **options | train
    )


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    times = ("seconds", "tokens_per_second")
    return [{key: row[key] for key in row if key not in times} for row in rows]


def run(folder: Path, output: str, stopped: int | None = None, rank: int = 0) -> str:
    """Go on with a run; one process gets SIGTERM once a step was done."""
    recipe = recipe_of(folder, output)
    if stopped is not None and int(os.environ.get("RANK", 0)) == rank:
        threading.Thread(
            target=terminate_after, args=(Path(recipe.output), stopped), daemon=True
        ).start()
    try:
        finetune(recipe, resume=True)
    except Interrupted as error:
        return str(error)
    return "done"


def terminate_after(output: Path, step: int) -> None:
    log = output / "train.jsonl"
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


def assert_alike(one: Path, other: Path) -> None:
    """Compare runs whose sums were added in another order, which AdamW makes more of each step."""
    for ours, theirs in zip(rows_of(one), rows_of(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    ours, theirs = (load_file(each / "final" / "model.safetensors") for each in (one, other))
    for name in theirs:  # of bfloat16, where a rounding step is 2**-8
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=0.02, atol=1e-3)


def test_two_processes_train_like_one_and_stop_as_one(tmp_path):
    recipe_of(tmp_path, "one")
    assert run(tmp_path, "one") == "done"
    texts = in_processes(2, run, tmp_path, "two", 5, 1)  # the second process is asked to stop
    (state,) = find_states(tmp_path / "two" / "checkpoints")[-1:]
    assert 5 <= state.step < STEPS
    assert all(f"stopped after step {state.step} of {STEPS}, saved in" in text for text in texts)
    assert in_processes(2, run, tmp_path, "two") == ["done"] * 2
    assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_one_two_four_and_one_process_go_on_from_each_other(tmp_path):
    recipe_of(tmp_path, "straight")
    assert in_processes(1, run, tmp_path, "straight") == ["done"]
    for count, stopped, rank in ((1, 5, 0), (2, 10, 1), (4, 16, 2)):
        texts = in_processes(count, run, tmp_path, "chained", stopped, rank)
        assert all("add --resume to go on" in text for text in texts)
    assert in_processes(1, run, tmp_path, "chained") == ["done"]
    assert_alike(tmp_path / "chained", tmp_path / "straight")


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_runs_that_are_killed_at_any_point_end_to_the_bit_like_one_that_was_not(tmp_path, count):
    recipe_of(tmp_path, "straight")
    in_processes(count, run, tmp_path, "straight")
    chooser = random.Random(count)
    log = tmp_path / "killed" / "train.jsonl"
    for step in range(2, STEPS, 3):
        started = Started(count, run, tmp_path, "killed")
        while not (log.exists() and f'"step": {step},' in log.read_text()):
            assert all(each.is_alive() for each in started.processes)
            time.sleep(0.001)
        time.sleep(chooser.uniform(0, 0.05))  # into the next steps, or a checkpoint
        started.kill()
    assert in_processes(count, run, tmp_path, "killed") == ["done"] * count
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "straight")
    for name in ("model.safetensors", "uptrain.json"):
        ours, theirs = (tmp_path / each / "final" / name for each in ("killed", "straight"))
        assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (
        find_states(tmp_path / each / "checkpoints")[-1].manifest for each in ("killed", "straight")
    )
    assert ours == theirs


def launch(
    recipe: Any, folder: Path, count: int, *options: str, **environment: str
) -> "subprocess.Popen[str]":
    """Start `uptrain finetune` as a user does, by torchrun if there are several processes."""
    written = folder / "recipe.yaml"
    written.write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    return subprocess.Popen(
        [sys.executable, *(torchrun if count > 1 else []), "-m", "uptrain", "finetune",
         str(written), *options],
        env=os.environ | {"PYTHONPATH": path} | environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_step(output: Path, step: int, process: "subprocess.Popen[str]") -> None:
    log = output / "train.jsonl"
    while process.poll() is None and not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_a_wish_to_stop_on(tmp_path, number):
    recipe = recipe_of(tmp_path, "output", steps=100_000, save_every_steps=100_000)
    output = tmp_path / "output"
    with launch(recipe, tmp_path, 2) as process:
        wait_for_step(output, 3, process)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does it: everyone hears of it
        else:
            process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    (state,) = find_states(output / "checkpoints")
    assert f"stopped after step {state.step} of 100000, saved in" in out
    assert rows_of(output)[-1]["step"] == state.step


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compiled", [False, True])
def test_two_gpus_train_like_one_which_goes_on_from_them(tmp_path, compiled):
    """In bfloat16, whose rounding steps of 2**-8 average out over a batch's tokens."""
    options = {"compile": compiled, "micro_batch_tokens": CONTEXT}
    for name, counts in (("one", [1]), ("two", [2]), ("chained", [2, 1])):
        recipe = recipe_of(tmp_path, name, **options)
        for count in counts:
            with launch(recipe, tmp_path, count, "--resume") as process:
                if [count] != counts[-1:]:
                    wait_for_step(tmp_path / name, STEPS // 2, process)
                    process.send_signal(signal.SIGTERM)
                out, _ = process.communicate(timeout=300)
            assert process.returncode == 0 or [count] != counts[-1:], out
    for name in ("two", "chained"):
        for ours, theirs in zip(rows_of(tmp_path / name), rows_of(tmp_path / "one"), strict=True):
            compared = theirs.keys() & {"loss", "validation_loss"}
            assert compared
            for key in compared:
                assert ours[key] == pytest.approx(theirs[key], rel=0.01)
