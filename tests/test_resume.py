"""Runs that go on: the same batches, parameters and optimizer state, however often they were stopped."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from many import in_processes
from tiny_run import CONTEXT, make_recipe

import uptrain
from uptrain.errors import Interrupted, TrainingError
from uptrain.training import loop
from uptrain.training.loop import finetune
from uptrain.training.saved import find_states

STEPS = 20
Tokens = list[list[int]]


@contextmanager
def recorded(stop_after: int | None = None) -> Iterator[dict[int, Tokens]]:
    """Give the sequences, with their targets, that this process trains on, by step."""
    seen: dict[int, Tokens] = {}
    real = loop.train_step

    def step(run: Any, optimizer: Any, done: int, parts: Any, *rest: Any) -> Any:
        assert done not in seen, "a step is done twice"
        seen[done] = [
            row for part in parts for row in torch.cat([part.inputs, part.targets], 1).tolist()
        ]
        if done == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, optimizer, done, parts, *rest)

    with mock.patch.object(loop, "train_step", step):
        yield seen


def recipe_of(folder: Path, output: str, **train: Any) -> Any:
    options = {"steps": STEPS, "repeat": True, "batch_tokens": 4 * CONTEXT}
    return make_recipe(folder, output=str(folder / output), **options | train)


def test_twenty_steps_and_three_resumes_have_the_same_batches_and_state(tmp_path: Path) -> None:
    with recorded() as expected:
        finetune(recipe_of(tmp_path, "straight"))
    assert [*expected] == [*range(STEPS)]
    found: dict[int, Tokens] = {}
    for stop_after in (3, 9, 15):  # between regular checkpoints, on one, between them
        with recorded(stop_after) as seen, pytest.raises(Interrupted):
            finetune(recipe_of(tmp_path, "chained"), resume=True)
        assert not seen.keys() & found.keys()
        found |= seen
    with recorded() as seen:
        finetune(recipe_of(tmp_path, "chained"), resume=True)
    assert found | seen == expected
    ours, theirs = (
        find_states(tmp_path / name / "checkpoints") for name in ("chained", "straight")
    )
    # A manifest has the SHA-256 of the file with all parameters and all that the optimizer remembers.
    assert ours[-1].step == STEPS
    assert ours[-1].manifest == theirs[-1].manifest
    for name in ("model.safetensors", "uptrain.json"):
        ours, theirs = (tmp_path / each / "final" / name for each in ("chained", "straight"))
        assert ours.read_bytes() == theirs.read_bytes()


def train_and_record(folder: Path, output: str, steps: int) -> dict[int, Tokens]:
    with recorded() as seen:
        finetune(recipe_of(folder, output, steps=steps))
    return seen


def test_one_two_and_four_processes_train_on_the_same_tokens_in_the_same_order(
    tmp_path: Path,
) -> None:
    recipe_of(tmp_path, "one")
    (expected,) = in_processes(1, train_and_record, tmp_path, "one", 3)
    assert [len(rows) for rows in expected.values()] == [4, 4, 4]
    assert len({tuple(row) for rows in expected.values() for row in rows}) == 12
    for count in (2, 4):
        parts = in_processes(count, train_and_record, tmp_path, f"{count}", 3)
        whole = {step: [row for part in parts for row in part[step]] for step in expected}
        assert whole == expected
        assert all(len(part[0]) == 4 // count for part in parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("code", "was made with uptrain version=0.0.1, now "),
        ("data", r"was made with data\.train\[0\]=train\.jsonl of other content"),
        ("order", r"was made with data\.seed=0, now 1"),
        ("source", "was made with source=source of other content"),
        ("recipe", r"was made with train\.learning_rate=0\.01, now 0\.02"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_and_kept(
    change: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(uptrain, "__version__", "0.0.1" if change == "code" else uptrain.__version__)
        finetune(recipe_of(tmp_path, "output", steps=1))
    recipe = recipe_of(tmp_path, "output", steps=1)
    if change == "data":
        lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "train.jsonl").write_text("".join(reversed(lines)))
    elif change == "order":
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"seed": 1})})
    elif change == "source":
        weights = tmp_path / "source" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif change == "recipe":
        recipe = recipe_of(tmp_path, "output", steps=1, learning_rate=0.02)
    with pytest.raises(TrainingError, match=message) as caught:
        finetune(recipe, resume=True)
    assert str(caught.value).endswith("or choose another output")
    assert [state.step for state in find_states(tmp_path / "output" / "checkpoints")] == [1]
