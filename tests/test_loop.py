"""The loop against its promises: exact accumulation, exact resume, clear stops."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import CONTEXT, make_recipe, make_source, write_text
from transformers import (
    get_cosine_with_min_lr_schedule_with_warmup as transformers_cosine,
)

from uptrain.errors import DataError, Interrupted, RecipeError, TrainingError
from uptrain.evaluation.quality import evaluate
from uptrain.training.batches import TokenShards
from uptrain.training.loop import finetune
from uptrain.training.loss import cross_entropy
from uptrain.training.optimizer import make_optimizer, make_schedule
from uptrain.training.state import find_states

ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "tokens_per_second")


class Killed(BaseException):
    """Stands for a kill: nothing of the run may catch it."""


def at_call(number: int, act: Callable[[], None]) -> Any:
    """Give a loss that acts before it is computed for the `number`th time."""
    calls = 0

    def loss(*batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return cross_entropy(*batch)

    return loss


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def read_rows(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    assert read_rows(one) == read_rows(other)
    for name in ("final/model.safetensors", "final/uptrain.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    state, expected = (find_states(folder / "checkpoints")[-1] for folder in (one, other))
    assert state.step == expected.step
    assert state.manifest["files"] == expected.manifest["files"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only get in each other's way in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[..., Any]:
    def make(name: str = "output", **train: Any) -> Any:
        train.setdefault("validation", str(tmp_path / "validation.jsonl"))
        return make_recipe(tmp_path, output=str(tmp_path / name), **train)

    return make


def test_a_run_learns_and_leaves_what_it_says(recipe_of, tmp_path):
    result = finetune(recipe_of(evaluate_every_steps=5))
    output = tmp_path / "output"
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints",
        "final",
        "tokens",
        "train.jsonl",
    ]
    rows = read_rows(output)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert set(steps[0]) == {"step", "tokens", "loss", "learning_rate", "gradient_norm"}
    assert steps[-1]["tokens"] == 12 * 4 * CONTEXT == result["tokens"]
    validated = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert list(validated) == [0, 5, 10, 12]
    assert validated[0] == result["initial_validation_loss"]
    assert validated[12] == result["validation_loss"] < validated[0] - 2
    assert json.loads(json.dumps(result)) == result
    record = json.loads((output / "final" / "uptrain.json").read_text())["uptraining"]
    assert (record["steps"], record["alpha"], record["learning_rate"]) == (12, None, 0.01)


def test_validation_is_what_evaluate_measures(recipe_of, tmp_path):
    # In float32, as the model is trained: the export of a 16-bit checkpoint is rounded.
    make_source(tmp_path / "source", torch.float32)
    write_text(tmp_path / "train.jsonl")
    path = write_text(tmp_path / "validation.jsonl", 4, seed=1)
    result = finetune(recipe_of())
    for name, model in (
        ("initial_validation_loss", tmp_path / "source"),
        ("validation_loss", None),
    ):
        measured = evaluate(str(model or result["final"]), path, device="cpu")
        assert measured["loss"] == pytest.approx(result[name], rel=1e-6)


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_gradients_equal_those_of_the_big_batch(recipe_of, monkeypatch, micro):
    """To 1e-5 of the largest gradient: float32 sums in another order."""
    seen: list[list[torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def remember(self: Any, *arguments: Any) -> Any:
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", remember)
    for name, sequences in (("parts", micro), ("whole", 4)):
        finetune(recipe_of(name, steps=1, micro_batch_tokens=sequences * CONTEXT))
    for part, whole in zip(*seen, strict=True):
        assert (part - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_clipping_bounds_the_norm_that_is_logged_before_it(recipe_of, monkeypatch, tmp_path):
    norms = []
    step = torch.optim.AdamW.step

    def remember(self: Any, *arguments: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", remember)
    finetune(recipe_of(steps=2, gradient_clipping=0.5))
    finetune(recipe_of("free", steps=2, gradient_clipping=None))
    assert norms[:2] == pytest.approx([0.5, 0.5], rel=1e-4)
    logged = [row["gradient_norm"] for row in read_rows(tmp_path / "free") if "loss" in row]
    assert norms[2:] == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_three_chained_resumes_are_exact_to_the_bit(recipe_of, tmp_path, dropout):
    options = {"dropout": dropout, "evaluate_every_steps": 4, "steps": 14}
    finetune(recipe_of("whole", **options))
    chained = recipe_of("chained", **options)
    done = 0
    for steps, stop in (
        (3, terminate),
        (5, interrupt),
        (2, terminate),
    ):  # each ends between two regular checkpoints or on one
        with pytest.raises(Interrupted, match=f"stopped after step {done + steps} of 14, saved in"):
            finetune(chained, resume=True, loss=at_call(steps, stop))
        done += steps
    finetune(chained, resume=True)
    assert_same_run(tmp_path / "chained", tmp_path / "whole")


def test_a_killed_run_goes_on_exactly_from_its_last_checkpoint(recipe_of, tmp_path):
    finetune(recipe_of("whole"))
    killed = recipe_of("killed")
    with pytest.raises(Killed):
        finetune(killed, loss=at_call(9, kill))
    assert [state.step for state in find_states(tmp_path / "killed/checkpoints")] == [5]
    with (tmp_path / "killed" / "train.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')  # what a kill leaves of a line
    calls = 0

    def counted(*batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return cross_entropy(*batch)

    finetune(killed, resume=True, loss=counted)
    assert calls == 7
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_finished_run_is_only_exported_again(recipe_of):
    recipe = recipe_of()
    first = finetune(recipe)
    again = finetune(recipe, resume=True, loss=at_call(1, kill))
    assert again == first


def test_dropout_of_the_config_is_replaced_while_training_only(recipe_of, tmp_path):
    make_source(tmp_path / "source", attention_dropout=0.5)
    write_text(tmp_path / "train.jsonl")
    write_text(tmp_path / "validation.jsonl", 4)
    results = [finetune(recipe_of(f"{rate}", dropout=rate, steps=2)) for rate in (0.0, 0.3)]
    assert results[0]["loss"] != results[1]["loss"]
    assert results[0]["initial_validation_loss"] == results[1]["initial_validation_loss"]
    config = json.loads((Path(results[0]["final"]) / "config.json").read_text())
    assert config["attention_dropout"] == 0.5


def test_checkpointed_gradients_train_the_same(recipe_of):
    results = [
        finetune(recipe_of(str(on), gradient_checkpointing=on, steps=3)) for on in (False, True)
    ]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6)


def test_other_data_or_options_are_refused_on_resume(recipe_of, tmp_path):
    finetune(recipe_of(steps=3))
    with pytest.raises(
        TrainingError, match="holds step 3 of an earlier run; add --resume to go on"
    ):
        finetune(recipe_of(steps=3))
    for change, message in (
        ({"learning_rate": 0.5}, "made with train.learning_rate=0.01, now 0.5; go on with"),
        ({"steps": 4}, "was made with steps=3, now 4"),
    ):
        with pytest.raises(TrainingError, match=message):
            finetune(recipe_of(**{"steps": 3} | change), resume=True)
    finetune(recipe_of(steps=3, micro_batch_tokens=CONTEXT, save_every_steps=1), resume=True)
    write_text(tmp_path / "train.jsonl", 40, seed=5)
    with pytest.raises(TrainingError, match=r"was made with another data\.train; go on"):
        finetune(recipe_of(steps=3), resume=True)


@pytest.mark.parametrize("bad", [1, 2])
def test_a_loss_that_is_not_finite_stops_with_step_and_sequences(recipe_of, tmp_path, bad):
    seen = []

    def loss(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
        value, count, further = cross_entropy(model, inputs, targets)
        seen.append(inputs)
        return (value * float("nan") if len(seen) == 14 + bad else value), count, further

    recipe = recipe_of(micro_batch_tokens=2 * CONTEXT, save_every_steps=5)
    with pytest.raises(TrainingError) as caught:
        finetune(recipe, loss=loss)
    text = str(caught.value)
    assert text.startswith("step 8: the loss is nan among sequences ")
    assert "lower train.learning_rate" in text
    numbers = text.partition("sequences ")[2].partition(" of data.train")[0].split(", ")
    shards = TokenShards.open(tmp_path / "output" / "tokens")
    for row, number in zip(seen[13 + bad], map(int, numbers), strict=True):
        assert row.tolist() == shards.read(number * CONTEXT, (number + 1) * CONTEXT).tolist()
    assert [state.step for state in find_states(tmp_path / "output/checkpoints")] == [5]
    assert not (tmp_path / "output" / "final").exists()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sequence_length": 64}, RecipeError, "=64: source was made for 32 tokens; choose 32 or"),
        ({"batch_tokens": 100}, RecipeError, "=100 is no multiple of train.sequence_length=32;"),
        ({"micro_batch_tokens": 96}, RecipeError, "sequences of 32; choose one of 32, 64, 128"),
        ({"precision": "bfloat16"}, TrainingError, "cpu does not compute in it here; choose auto"),
        ({"trackers": ["wandb"]}, TrainingError, "wandb is not installed; pip install it, or"),
        ({"steps": 1000}, DataError, "but 1000 steps of 128 need 128001; .* data.repeat: true"),
        ({"batch_tokens": 64000}, DataError, "tokens, fewer than one batch of 64,000"),
        ({"validation": "/nowhere"}, DataError, "/nowhere: does not exist; expected a .jsonl or"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_it_starts(
    recipe_of, tmp_path, monkeypatch, options, kind, message
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        kind, match=message.replace("1000 steps", "1,000 steps").replace("8001", "8,001")
    ):
        finetune(recipe_of(**options))
    output = tmp_path / "output"
    assert not output.exists() or [path.name for path in output.iterdir()] == ["tokens"]


def test_repeated_text_is_trained_on_again(recipe_of):
    assert finetune(recipe_of(steps=60, repeat=True, save_every_steps=60))["steps"] == 60


def test_two_runs_on_one_output_are_refused(recipe_of):
    recipe = recipe_of()

    def second() -> None:
        with pytest.raises(TrainingError, match="another run is at work in it; wait for it or"):
            finetune(recipe)

    finetune(recipe, loss=at_call(2, second))


def test_an_output_that_cannot_be_made_is_named(recipe_of, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TrainingError, match=r"cannot be created \(Not a directory\); choose another"
    ):
        finetune(recipe_of("file/output"))


def test_schedules_learn_from_the_first_step_to_the_last(tmp_path):
    def rates(**options: Any) -> list[float]:
        train = make_recipe(tmp_path, steps=20, learning_rate=1.0, **options).train
        return [make_schedule(train)(step) for step in range(20)]

    cosine = rates()
    assert cosine[:2] == [0.5, 1.0]
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    assert cosine[-1] == pytest.approx(0.1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    factor = transformers_cosine(optimizer, 2, 20, min_lr_rate=0.1).lr_lambdas[0]
    assert cosine == [factor(step) for step in range(1, 21)]
    wsd = rates(schedule="wsd")
    assert wsd[1:16] == [1.0] * 15
    assert wsd[-1] == pytest.approx(0.1)
    assert rates(schedule="constant", warmup=0.25) == [0.2, 0.4, 0.6, 0.8] + [1.0] * 16
    assert rates(schedule="constant", warmup=0.0) == [1.0] * 20


def test_only_matrices_are_decayed(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    decayed, free = make_optimizer(model, make_recipe(tmp_path).train).param_groups
    assert (decayed["weight_decay"], [p.ndim for p in decayed["params"]]) == (0.1, [2])
    assert (free["weight_decay"], [p.ndim for p in free["params"]]) == (0.0, [1, 1, 1])


SCRIPT = """
import sys
from pathlib import Path
from tiny_run import make_recipe
from uptrain.errors import Interrupted
from uptrain.training.loop import finetune
folder = Path(sys.argv[1])
recipe = make_recipe(folder, output=str(folder / sys.argv[2]), steps=int(sys.argv[3]), repeat=True,
                     save_every_steps=10_000, validation=str(folder / "validation.jsonl"))
try:
    finetune(recipe)
except Interrupted as error:
    print(error)
    sys.exit(130)
"""


def script(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    make_recipe(tmp_path)  # makes the source and the text
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return path, os.environ | {
        "PYTHONPATH": paths,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


def test_sigterm_finishes_the_step_saves_and_leaves(tmp_path):
    path, environment = script(tmp_path)
    command = [sys.executable, str(path), str(tmp_path), "output", "1000000"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        log = tmp_path / "output" / "train.jsonl"
        while process.poll() is None and not (log.exists() and '"step": 3,' in log.read_text()):
            pass
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    (state,) = find_states(tmp_path / "output" / "checkpoints")
    assert (
        f"stopped after step {state.step} of 1000000, saved in {state.folder}; add --resum" in out
    )
    assert read_rows(tmp_path / "output")[-1]["step"] == state.step


def test_two_processes_train_like_one(tmp_path):
    path, environment = script(tmp_path)
    finetune(
        make_recipe(
            tmp_path, output=str(tmp_path / "one"), validation=str(tmp_path / "validation.jsonl")
        )
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    with subprocess.Popen([*launch, path, tmp_path, "two", "12"], env=environment) as process:
        try:
            assert process.wait(timeout=120) == 0
        finally:
            process.terminate()
    for one, two in zip(read_rows(tmp_path / "one"), read_rows(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    one, two = (load_file(tmp_path / name / "final/model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name].float(), one[name].float(), rtol=0.02, atol=1e-3)
