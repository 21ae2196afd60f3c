"""What `run` measures, of which checkpoint, and that it does so once."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_recipe, make_source

from uptrain.errors import CheckpointError, UptrainError
from uptrain.evaluation import bandwidth, decode
from uptrain.run import run
from uptrain.training.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(decode, "_ROUND_SECONDS", 0)
    monkeypatch.setitem(bandwidth._BUFFER_BYTES, "cpu", 2**20)
    original = make_source(tmp_path / "original", num_key_value_heads=4, initializer_range=0.2)
    text = str(tmp_path / "validation.jsonl")
    made = make_recipe(tmp_path, source=str(original), steps=2, validation=text)
    content = made.model_dump(mode="json", exclude_unset=True)
    asked = {"data": text, "copying": True, "decode": True, "decode_batches": [1, 2]}
    content |= {"convert": {"num_key_value_heads": 2}, "evaluate": asked}
    return Recipe.model_validate(content)


def test_decoding_is_measured_once_and_all_else_of_both(recipe: Recipe) -> None:
    found = run(recipe)["evaluations"]
    assert {"copying", "by_position"} <= found["converted"].keys() & found["final"].keys()
    assert "decode" not in found["converted"]
    assert [(row["batch"], row["model"]) for row in found["final"]["decode"]] == [
        (1, "target"), (1, "reference"), (2, "target"), (2, "reference"),
    ]  # fmt: skip
    kept = Path(recipe.output) / "report" / "final.json"
    assert json.loads(kept.read_text())["decode"] == found["final"]["decode"]
    before = kept.stat().st_mtime_ns
    taken = kept.with_name("run.json").read_bytes()
    assert run(recipe)["evaluations"]["final"]["decode"] == found["final"]["decode"]
    assert kept.stat().st_mtime_ns == before
    stages, again = (
        json.loads(each)["stages"] for each in (taken, kept.with_name("run.json").read_bytes())
    )
    assert list(stages) == ["convert", "uptrain", "evaluate converted", "evaluate uptrained"]
    assert all(each["seconds"] > 0 and each["peak_bytes"] > 2**20 for each in stages.values())
    # What was not done again took no time.
    assert [again[name]["seconds"] for name in stages] == [
        each["seconds"] for each in stages.values()
    ]
    other = recipe.evaluate.model_copy(update={"decode_batches": [1]})
    again = run(recipe.model_copy(update={"evaluate": other}))["evaluations"]
    assert [row["batch"] for row in again["final"]["decode"]] == [1, 1]


@pytest.mark.parametrize(
    ("section", "changed", "message"),
    [
        ("data", {"validation": "gone.jsonl"}, "gone.jsonl"),
        ("data", {"train": [{"path": "gone.txt"}]}, "gone.txt"),
        ("train", {"teacher": "gone"}, "gone"),
        ("train", {"batch_tokens": 7}, "train.batch_tokens=7"),
        ("train", {"sequence_length": 10**6}, "train.sequence_length=1000000"),
        ("evaluate", {"data": "gone.jsonl"}, "gone.jsonl"),
        ("evaluate", {"max_tokens": 1}, "max_tokens=1"),
        ("evaluate", {"sequence_length": 10**6}, "sequence_length=1000000"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_first(
    section: str, changed: dict[str, Any], message: str, recipe: Recipe
) -> None:
    content = recipe.model_dump(mode="json", exclude_unset=True)
    wrong = Recipe.model_validate(content | {section: content[section] | changed})
    with pytest.raises(UptrainError, match=message):
        run(wrong)
    assert not Path(recipe.output).exists()


def test_a_report_folder_that_cannot_be_made(recipe: Recipe) -> None:
    Path(recipe.output).mkdir()
    folder = Path(recipe.output) / "report"
    folder.write_text("a file")
    with pytest.raises(CheckpointError) as error:
        run(recipe)
    assert str(error.value) == f"{folder}: cannot be created (File exists); choose another output"
