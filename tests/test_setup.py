"""What is refused before a run starts: the message, and that nothing was left behind."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import tiny_config
from tiny_run import VOCABULARY, make_recipe, make_source, write_text

from uptrain.errors import CheckpointError, DataError, RecipeError, TrainingError, UptrainError
from uptrain.training.loop import finetune


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Give the message that a recipe is refused with."""

    def start(kind: type[UptrainError], **train: Any) -> str:
        train = {"validation": str(tmp_path / "validation.jsonl")} | train
        recipe = make_recipe(tmp_path, **train)
        with pytest.raises(kind) as caught:
            finetune(recipe)
        output = tmp_path / "output"
        assert not output.exists() or [path.name for path in output.iterdir()] == ["tokens"]
        assert type(caught.value) is kind
        text = str(caught.value)
        assert "\n" not in text
        return text

    return start


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sequence_length": 64}, RecipeError, "=64: source was made for 32 tokens; choose 32 or"),
        ({"batch_tokens": 100}, RecipeError, "=100 is no multiple of train.sequence_length=32;"),
        ({"micro_batch_tokens": 96}, RecipeError, "sequences of 32; choose one of 32, 64, 128"),
        ({"precision": "bfloat16"}, TrainingError, "cpu does not compute in it here; choose auto"),
        ({"trackers": ["wandb"]}, TrainingError, "wandb is not installed; pip install it, or"),
        ({"optimizer": "adamw8bit"}, TrainingError, "torchao is not installed; pip install 'upt"),
        ({"steps": 1000}, DataError, "but 1,000 steps of 128 need 128,001; add text, lower the bu"),
        ({"steps": 1000}, DataError, "or set data.repeat: true to go over the text 29.2 times"),
        ({"batch_tokens": 64000}, DataError, "tokens, fewer than one batch of 64,000"),
        ({"validation": "/nowhere"}, DataError, "/nowhere: does not exist; expected a .jsonl, .parquet"),
        ({"validation": None, "keep_best": True}, RecipeError, "train.keep_best: there is no data.validation"),
        ({"teacher": "/nowhere"}, CheckpointError, "/nowhere: does not exist; expected a checkpoint"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_it_starts(refused, monkeypatch, options, kind, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name in ("wandb", "torchao") else find(name, *rest),
    )
    assert message in refused(kind, **options)


def test_a_teacher_of_another_vocabulary_is_refused(refused, tmp_path):
    teacher = make_source(tmp_path / "teacher", vocab_size=VOCABULARY + 1)
    message = refused(CheckpointError, teacher=str(teacher))
    assert message == (
        f"{teacher}: the teacher has a vocabulary of 2049 tokens, source one of 2048; "
        "only models with one tokenizer can be compared token by token"
    )


def test_a_teacher_of_other_tokens_is_refused(refused, tmp_path):
    teacher = make_source(tmp_path / "teacher")
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(CheckpointError, teacher=str(teacher))
    assert message.startswith(f"{teacher}: the teacher has other tokens than source; only models")


def test_sequences_longer_than_the_teacher_knows_are_refused(refused, tmp_path):
    teacher = make_source(tmp_path / "teacher", max_position_embeddings=16)
    message = refused(RecipeError, teacher=str(teacher))
    assert message == (
        "train.sequence_length=32: the teacher, teacher, was made for 16 tokens; choose 16 or less"
    )


def test_models_that_see_beyond_their_document_are_refused(refused, tmp_path):
    config = tiny_config("bloom", vocab_size=VOCABULARY)
    config.dtype = "float32"
    bloom = tmp_path / "bloom"
    transformers.BloomForCausalLM(config).save_pretrained(bloom)
    message = refused(TrainingError, attention_within_documents=True, teacher=str(bloom))
    assert message == (
        "data.attention_within_documents: BloomForCausalLM does not keep documents apart by their "
        "positions; leave it out"
    )


@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl"])
def test_a_text_with_tokens_that_the_model_lacks_is_refused(refused, tmp_path, name):
    make_source(tmp_path / "source", vocab_size=300)
    for each in ("train.jsonl", "validation.jsonl"):
        write_text(tmp_path / each)
        if each != name:  # bytes alone are among the first tokens
            (tmp_path / each).write_text(json.dumps({"text": "~7" * 2000}))
    message = refused(DataError)
    assert "its tokenizer gives token " in message
    assert message.endswith(
        "its model has 300; take the tokenizer files of the original checkpoint"
    )
