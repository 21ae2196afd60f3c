"""What writes files, and what must be true of it when it is failed or killed at any point."""

import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from faults import (
    Point,
    in_child,
    kill_at,
    points_of,
    raise_at,
    tree,
    watched,
)
from tiny_run import CONTEXT, EXAMPLE, make_recipe, make_source, write_text
from transformers import AutoTokenizer

from uptrain.checkpoint.card import model_card
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.staging import replace_file
from uptrain.conversion.convert import convert
from uptrain.data.shards import TokenShards
from uptrain.errors import DataError, UptrainError
from uptrain.evaluation.quality import evaluate
from uptrain.loading import load_model
from uptrain.run import run
from uptrain.training.export import export_checkpoint
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


def to_two(folder: Path, target: Path | None = None, **options: Any) -> None:
    target = target or folder / "target"
    convert(folder / "source", target, 2, max_shard_bytes=100_000, **options)


def to_two_again(folder: Path, **options: Any) -> None:
    to_two(folder, overwrite=(folder / "target").exists(), **options)


def prepare_overwrite(folder: Path) -> None:
    prepare_conversion(folder)
    convert(folder / "source", folder / "target", 1)


# Training checkpoints: two are there, a third is saved, the first removed.


def save_states(folder: Path, *steps: int, size: int = 8) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(size, size)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, size)).sum().backward()
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


def export(folder: Path, steps: int = 2, target: Path | None = None) -> None:
    source = open_checkpoint(folder / "source")
    model = load_model(source, torch.device("cpu"))
    with torch.no_grad():
        model.model.norm.weight += steps
    target = target or folder / "final"
    export_checkpoint(model, source, target, {"steps": steps, "tokens": 0})


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


# Results of an evaluation, over those of an earlier one.


def prepare_evaluation(folder: Path) -> None:
    make_source(folder / "source")
    write_text(folder / "text.jsonl", 1)
    (folder / "result").mkdir()
    (folder / "result" / "evaluation.json").write_text("{}")


def measure(folder: Path) -> None:
    evaluate(folder / "source", folder / "text.jsonl", output=folder / "result")


# Whole runs.


def recipe_of(folder: Path, **changes: Any) -> Any:
    validation = str(folder / "validation.jsonl")
    return make_recipe(folder, steps=3, save_every_steps=1, validation=validation, **changes)


def prepare_training(folder: Path) -> None:
    make_source(folder / "source", num_hidden_layers=1)
    recipe_of(folder)


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


def see_all_but_card(final: Path) -> Any:
    """Give the content of an export whose card is old or new, or is just being replaced."""
    names = ("README.md", ".README.md.partial")
    found = {name: digest for name, digest in tree(final).items() if name not in names}
    return found if (final / "README.md").is_file() else None


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
    "evaluation": Operation(
        prepare_evaluation,
        measure,
        measure,
        "result/evaluation.json",
        Path.read_bytes,
        is_swept=lambda point: "result" in point.path,
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
        prepare_training,
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
        see_all_but_card,
        stays=("output",),
        volatile=(
            *("seen.json", "train.jsonl", "run.json"),
            *("report.json", "report.md", "report.html", "loss.svg"),
        ),
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
            broken = threading.Event()
            failing = raise_at(point, number, broken, bool(is_lasting))
            self.fail(lambda: self.run_with(failing), is_lasting)
            assert broken.is_set(), "it was not reached"
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
                path
                for path in tree(self.work).keys() - self.inputs.keys()
                if not any(f"{path}/".startswith(f"{name}/") for name in allowed)
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
