"""The loop against its promises: exact accumulation, exact resume, clear stops."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.utils import LoggerType
from many import in_processes
from safetensors.torch import load_file
from tiny_run import CONTEXT, make_recipe, make_source, write_text
from transformers import (
    get_cosine_with_min_lr_schedule_with_warmup as transformers_cosine,
)

from uptrain.conversion.convert import convert
from uptrain.errors import Interrupted, TrainingError
from uptrain.evaluation.quality import evaluate
from uptrain.training.batches import TokenShards
from uptrain.training.loop import finetune
from uptrain.training.objective import Objective
from uptrain.training.optimizer import make_optimizer, make_schedule
from uptrain.training.saved import find_states

ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "tokens_per_second")


class Killed(BaseException):
    """Stands for a kill: nothing of the run may catch it."""


@contextmanager
def at_call(number: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Act before a training loss is computed for the `number`th time; yields the calls."""
    forward = Objective.forward
    calls: list[int] = []

    def counted(self: Objective, *batch: Any) -> Any:
        if self.training:
            calls.append(len(calls) + 1)
            if len(calls) == number:
                act()
        return forward(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "forward", counted)
        yield calls


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def read_rows(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


def rates(monkeypatch: pytest.MonkeyPatch, rate: Callable[[int], float]) -> None:
    """Let the learning rate of each step, from 0, be what no schedule would make it."""
    monkeypatch.setattr("uptrain.training.loop.make_schedule", lambda options: rate)


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def assert_same_run(one: Path, other: Path) -> None:
    assert read_rows(one) == read_rows(other)
    for name in ("final/model.safetensors", "final/uptrain.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    state, expected = (find_states(folder / "checkpoints")[-1] for folder in (one, other))
    assert (state.step, state.manifest["run"]) == (expected.step, expected.manifest["run"])
    (part,) = state.parts
    assert not differing(load_file(state.folder / part), load_file(expected.folder / part))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only get in each other's way in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A multi-head model; what is trained is converted from it."""
    # Of such weights that its predictions are far from even.
    folder = make_source(
        tmp_path / "original", torch.float32, num_key_value_heads=4, initializer_range=0.2
    )
    convert(folder, tmp_path / "source", 2)
    return folder


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
    assert set(steps[0]) - {"clipped"} == {
        "step", "tokens", "loss", "learning_rate", "gradient_norm"
    }  # fmt: skip
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
    result = finetune(recipe_of())
    for name, model in (
        ("initial_validation_loss", tmp_path / "source"),
        ("validation_loss", None),
    ):
        text = tmp_path / "validation.jsonl"
        measured = evaluate(str(model or result["final"]), text, device="cpu")
        assert measured["loss"] == pytest.approx(result[name], rel=1e-6)


@pytest.mark.parametrize(("micro", "weight"), [(1, 0.0), (2, 0.0), (1, 0.5)])
def test_accumulated_gradients_equal_those_of_the_big_batch(
    recipe_of, original, monkeypatch, micro, weight
):
    """To 1e-5 of the largest gradient: float32 sums in another order."""
    taught = {"teacher": str(original), "distillation_weight": weight}
    seen: list[list[torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def remember(self: Any, *arguments: Any) -> Any:
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", remember)
    for name, sequences in (("parts", micro), ("whole", 4)):
        finetune(recipe_of(name, steps=1, micro_batch_tokens=sequences * CONTEXT, **taught))
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
        with (
            pytest.raises(Interrupted, match=f"stopped after step {done + steps} of 14, saved in"),
            at_call(steps, stop),
        ):
            finetune(chained, resume=True)
        done += steps
    finetune(chained, resume=True)
    assert_same_run(tmp_path / "chained", tmp_path / "whole")


def test_a_killed_run_goes_on_exactly_from_its_last_checkpoint(recipe_of, tmp_path):
    finetune(recipe_of("whole"))
    killed = recipe_of("killed")
    with pytest.raises(Killed), at_call(9, kill):
        finetune(killed)
    assert [state.step for state in find_states(tmp_path / "killed/checkpoints")] == [5]
    with (tmp_path / "killed" / "train.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')  # what a kill leaves of a line
    with at_call(0, kill) as calls:
        finetune(killed, resume=True)
    assert len(calls) == 7
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_finished_run_is_only_exported_again(recipe_of):
    recipe = recipe_of()
    first = finetune(recipe)
    with at_call(1, kill):
        again = finetune(recipe, resume=True)
    assert again == first


def test_dropout_of_the_config_is_replaced_while_training_only(recipe_of, tmp_path):
    make_source(tmp_path / "source", attention_dropout=0.5)
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
    message = r"made with data\.train\[0\]=train\.jsonl of other content; go on"
    with pytest.raises(TrainingError, match=message):
        finetune(recipe_of(steps=3), resume=True)


@pytest.mark.parametrize("bad", [1, 2])
def test_a_loss_that_is_not_finite_stops_with_step_and_sequences(
    recipe_of, tmp_path, monkeypatch, bad
):
    seen = []

    forward = Objective.forward

    def loss(self: Objective, inputs: torch.Tensor, *rest: Any) -> Any:
        sums = forward(self, inputs, *rest)
        if self.training:
            seen.append(inputs)
        return sums * float("nan") if len(seen) == 14 + bad else sums

    monkeypatch.setattr(Objective, "forward", loss)
    recipe = recipe_of(micro_batch_tokens=2 * CONTEXT, save_every_steps=5)
    with pytest.raises(TrainingError) as caught:
        finetune(recipe)
    text = str(caught.value)
    assert text.startswith("step 8: the loss is nan among sequences ")
    assert "lower train.learning_rate" in text
    numbers = text.partition("sequences ")[2].partition(" of data.train")[0].split(", ")
    shards = TokenShards.open(tmp_path / "output" / "tokens")
    for row, number in zip(seen[13 + bad], map(int, numbers), strict=True):
        assert row.tolist() == shards.read(number * CONTEXT, (number + 1) * CONTEXT).tolist()
    assert [state.step for state in find_states(tmp_path / "output/checkpoints")] == [5]
    assert not (tmp_path / "output" / "final").exists()


def test_text_that_is_trained_on_again_is_said_to_be(recipe_of, tmp_path, capsys):
    finetune(recipe_of("once", steps=2))
    assert "epochs" not in capsys.readouterr().err
    assert finetune(recipe_of(steps=60, repeat=True, save_every_steps=60))["steps"] == 60
    blocks = (TokenShards.open(tmp_path / "output" / "tokens").tokens - 1) // CONTEXT
    said = f"data.train: {60 * 4 / blocks:.2f} epochs, reshuffled each"
    assert said in capsys.readouterr().err.splitlines()


def test_two_runs_on_one_output_are_refused(recipe_of):
    recipe = recipe_of()

    def second() -> None:
        with pytest.raises(TrainingError, match="another run is at work in it; wait for it or"):
            finetune(recipe)

    with at_call(2, second):
        finetune(recipe)


def test_an_output_that_cannot_be_made_is_named(recipe_of, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TrainingError, match=r"cannot be created \(Not a directory\); choose another"
    ):
        finetune(recipe_of("file/output"))


# Learning from a teacher.


def test_a_student_learns_what_its_original_says(recipe_of, original, tmp_path):
    result = finetune(recipe_of(teacher=str(original), distillation_weight=0.7, learning_rate=3e-3))
    rows = read_rows(tmp_path / "output")
    for row in rows:
        if "loss" in row:
            mixture = 0.3 * row["cross_entropy"] + 0.7 * row["kl"]
            assert row["loss"] == pytest.approx(mixture, rel=1e-6)  # sums of 128 tokens in float32
    validated = {row["step"]: row["validation_kl"] for row in rows if "validation_kl" in row}
    assert list(validated) == [0, 12]
    assert [validated[0], validated[12]] == [
        result["initial_validation_kl"],
        result["validation_kl"],
    ]
    assert validated[12] < 0.8 * validated[0]
    for model, kl in ((tmp_path / "source", validated[0]), (result["final"], validated[12])):
        text = tmp_path / "validation.jsonl"
        measured = evaluate(str(model), text, reference=str(original), device="cpu")
        assert measured["kl"] == pytest.approx(kl, rel=1e-5)  # float32, other chunks
    record = json.loads((tmp_path / "output/final/uptrain.json").read_text())["uptraining"]
    assert (record["teacher"], record["distillation_weight"]) == ("original", 0.7)
    assert record["validation_kl"] == result["validation_kl"]


def test_a_student_equal_to_its_teacher_stays_what_it_is(recipe_of, tmp_path):
    source = make_source(tmp_path / "source")
    result = finetune(recipe_of(teacher=str(source), distillation_weight=1.0, weight_decay=0.0))
    assert result["initial_validation_kl"] == result["validation_kl"] == result["loss"] == 0
    assert not differing(weights_of(result["final"]), weights_of(source))
    assert {row["gradient_norm"] for row in read_rows(tmp_path / "output") if "loss" in row} == {0}


@pytest.mark.parametrize(
    "options", [{"teacher": "none"}, {"teacher": "/nowhere", "distillation_weight": 0}]
)
def test_a_teacher_that_says_nothing_is_not_loaded(recipe_of, tmp_path, options):
    finetune(recipe_of("alone", steps=3))
    result = finetune(recipe_of("silent", steps=3, **options))
    assert "validation_kl" not in result
    assert read_rows(tmp_path / "silent") == read_rows(tmp_path / "alone")
    assert not differing(*(weights_of(tmp_path / each / "final") for each in ("silent", "alone")))


def test_another_teacher_is_refused_on_resume(recipe_of, original, tmp_path):
    finetune(recipe_of(steps=2, teacher=str(original)))
    moved = original.rename(tmp_path / "moved")
    finetune(recipe_of(steps=2, teacher=str(moved)), resume=True)
    other = make_source(tmp_path / "other")
    for teacher in (str(other), "none"):
        with pytest.raises(TrainingError, match=f"teacher=original, now {Path(teacher).name}; go"):
            finetune(recipe_of(steps=2, teacher=teacher), resume=True)


@pytest.mark.parametrize(
    "options",
    [
        {"teacher": "original", "distillation_weight": 0.5},
        {"optimizer": "muon"},
        {"optimizer": "adafactor"},
        {"trainable": "attention-first", "attention_fraction": 0.5},
        {"attention_within_documents": True, "micro_batch_tokens": 2 * CONTEXT},
    ],
    ids=["teacher", "muon", "adafactor", "attention-first", "within-documents"],
)
def test_resumes_are_exact_whatever_is_trained_how(recipe_of, original, tmp_path, options):
    if "teacher" in options:
        options = options | {"teacher": str(original)}
    first = finetune(recipe_of("whole", steps=10, **options))
    chained = recipe_of("chained", steps=10, **options)
    for steps in (4, 2):
        calls = steps * (2 if "micro_batch_tokens" in options else 1)
        with pytest.raises(Interrupted), at_call(calls, terminate):
            finetune(chained, resume=True)
    finetune(chained, resume=True)
    assert_same_run(tmp_path / "chained", tmp_path / "whole")
    assert first["validation_loss"] < first["initial_validation_loss"]


# What is trained.


def test_attention_alone_is_trained(recipe_of, tmp_path):
    result = finetune(recipe_of(trainable="attention", steps=3))
    source = weights_of(tmp_path / "source")
    assert differing(weights_of(result["final"]), source) == {n for n in source if "self_attn" in n}


def test_attention_is_trained_first_and_everything_later(recipe_of, tmp_path):
    options = {"trainable": "attention-first", "attention_fraction": 0.5, "save_every_steps": 6}
    result = finetune(recipe_of(**options))
    first, last = find_states(tmp_path / "output" / "checkpoints")
    assert (first.step, last.step) == (6, 12)
    source = weights_of(tmp_path / "source")
    saved = load_file(first.folder / first.parts[0])
    changed = {n for n in source if not torch.equal(saved[f"model.{n}"], source[n].float())}
    assert changed == {n for n in source if "self_attn" in n}
    assert differing(weights_of(result["final"]), source) == set(source)


# What is watched.


class Tracker(ModuleType):
    """Stands for a tracker's library."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.__spec__ = ModuleSpec("trackio", None)
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.finished = 0

    def init(self, project: str) -> "Tracker":
        assert project == "uptrain"
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append({"step": step, **values})

    def finish(self) -> None:
        self.finished += 1


def test_trackers_are_told_what_the_log_is_told(recipe_of, monkeypatch, tmp_path):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TRACKIO])
    recipe = recipe_of(steps=3, trackers=["trackio"])
    with pytest.raises(Interrupted), at_call(2, terminate):
        finetune(recipe)
    assert tracker.finished == 1
    finetune(recipe, resume=True)
    assert tracker.finished == 2
    rows = [json.loads(line) for line in (tmp_path / "output/train.jsonl").read_text().splitlines()]
    assert tracker.rows == rows
    assert tracker.config["train.learning_rate"] == 0.01
    assert tracker.config["output"] == str(tmp_path / "output")


def test_the_best_step_is_exported_whatever_follows(recipe_of, monkeypatch, tmp_path):
    rates(monkeypatch, lambda step: 1e-2 if step < 6 else 3.0)
    options = {"evaluate_every_steps": 2, "save_every_steps": 3, "keep_best": True}
    result = finetune(recipe_of("whole", **options))
    rows = read_rows(tmp_path / "whole")
    validated = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert result["exported_step"] == 6 == min(validated, key=validated.__getitem__)
    assert result["validation_loss"] == validated[6] < validated[12] - 1
    assert [state.step for state in find_states(tmp_path / "whole/checkpoints")] == [6, 9, 12]
    assert result["checkpoint"].endswith("step-00000006")
    until_then = finetune(recipe_of("short", steps=6))
    assert not differing(weights_of(result["final"]), weights_of(until_then["final"]))
    chained = recipe_of("chained", **options)
    for steps in (1, 4, 6):  # behind the first validation; before the best step; behind it
        with pytest.raises(Interrupted), at_call(steps, terminate):
            finetune(chained, resume=True)
    again = finetune(chained, resume=True)
    assert_same_run(tmp_path / "chained", tmp_path / "whole")
    assert again["exported_step"] == 6


def test_a_model_that_only_gets_worse_is_exported_as_it_was(recipe_of, monkeypatch, tmp_path):
    rates(monkeypatch, lambda step: 3.0)
    recipe = recipe_of(keep_best=True, evaluate_every_steps=1, steps=3)
    with pytest.raises(Killed), at_call(1, kill):
        finetune(recipe)
    result = finetune(recipe, resume=True)
    rows = read_rows(tmp_path / "output")
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 1, 2, 3]
    assert result["exported_step"] == 0
    assert not differing(weights_of(result["final"]), weights_of(tmp_path / "source"))


def test_spikes_and_clipped_steps_are_marked(recipe_of, monkeypatch, tmp_path):
    rates(monkeypatch, lambda step: 1e-4 if step < 12 else 3.0)
    finetune(recipe_of(steps=14, gradient_clipping=1.6))
    rows = [row for row in read_rows(tmp_path / "output") if "loss" in row]
    assert [row["step"] for row in rows if row.get("spike")] == [14]
    clipped = [row["gradient_norm"] > 1.6 for row in rows]
    assert [row.get("clipped", False) for row in rows] == clipped
    assert set(clipped) == {False, True}


def test_an_overfit_is_said(recipe_of, monkeypatch, capsys):
    rates(monkeypatch, lambda step: 1e-2 if step < 4 else 3.0 * 2.0 ** (step - 4))
    finetune(recipe_of(steps=8, evaluate_every_steps=1))
    said = [line for line in capsys.readouterr().err.splitlines() if "by heart" in line]
    assert len(said) == 1
    assert said[0].startswith(
        "step 7: the validation loss has risen three times in a row: the model"
    )


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


def test_sigterm_finishes_the_step_saves_and_leaves_with_130(recipe_of, tmp_path):
    recipe = recipe_of(steps=1_000_000, repeat=True, save_every_steps=10_000)
    written = tmp_path / "recipe.yaml"
    written.write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    command = [sys.executable, "-m", "uptrain", "finetune", written]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        log = tmp_path / "output" / "train.jsonl"
        while process.poll() is None and not (log.exists() and '"step": 3,' in log.read_text()):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    (state,) = find_states(tmp_path / "output" / "checkpoints")
    assert err.splitlines()[-1] == (
        f"uptrain: stopped after step {state.step} of 1000000, saved in {state.folder}; "
        "add --resume to go on"
    )
    assert read_rows(tmp_path / "output")[-1]["step"] == state.step


def test_two_processes_train_like_one(recipe_of, original, tmp_path):
    options = {"teacher": str(original), "distillation_weight": 0.5, "evaluate_every_steps": 4}
    finetune(recipe_of("one", **options))
    main, other = in_processes(2, finetune, recipe_of("two", **options))
    assert (main["processes"], other) == (2, {})
    # Sums were added in another order, and AdamW makes more of it in every step.
    for one, two in zip(read_rows(tmp_path / "one"), read_rows(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    one, two = (weights_of(tmp_path / name / "final") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
