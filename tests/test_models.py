"""The models of a run: what is loaded, in what, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_config
from tiny_run import CONTEXT, VOCABULARY, make_source

from uptrain.checkpoint.reader import open_checkpoint
from uptrain.errors import DataError, TrainingError
from uptrain.loading import load_config, load_model
from uptrain.training.models import Place, Source, load_objective
from uptrain.training.options import TrainOptions

ON_CPU = Place(torch.device("cpu"), None, is_bfloat16=False)


def source_of(folder: Path) -> Source:
    checkpoint = open_checkpoint(folder)
    return Source(checkpoint, load_config(checkpoint))


def make_bloom(folder: Path) -> Path:
    """Save a model that cannot tell documents apart by their positions."""
    config = tiny_config("bloom", vocab_size=VOCABULARY)
    config.dtype = "float32"
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    return folder


def load(student: Path, teacher: Path | None = None, place: Place = ON_CPU, **given: Any) -> Any:
    asked = {key: given.pop(key) for key in ("max_token", "within_documents") if key in given}
    options = TrainOptions(**{"steps": 1, "learning_rate": 1.0, "batch_tokens": 1} | given)
    of_teacher = None if teacher is None else source_of(teacher)
    return load_objective(source_of(student), of_teacher, options, place, **asked)


def test_both_models_are_those_of_their_checkpoints(tmp_path):
    student = make_source(tmp_path / "student")
    teacher = make_source(tmp_path / "teacher", num_key_value_heads=4)
    objective, trainable = load(student, teacher)
    expected = load_model(open_checkpoint(student), ON_CPU.device, dtype=torch.float32)
    for name, parameter in objective.model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
        assert parameter.requires_grad
    assert trainable.ever == {name for name, _ in expected.named_parameters()}
    inputs = torch.randint(VOCABULARY, (2, CONTEXT))
    sums = objective(inputs, inputs)
    referee = load_model(open_checkpoint(teacher), ON_CPU.device, dtype=torch.float32)
    with torch.no_grad():
        student_logs, teacher_logs = (
            model(input_ids=inputs).logits.log_softmax(-1) for model in (expected, referee)
        )
    divergence = torch.nn.functional.kl_div(
        student_logs, teacher_logs, reduction="sum", log_target=True
    )
    # Models this alike (their logits are small) differ by not much more than float32 can tell.
    assert sums[2].item() == pytest.approx(divergence.item(), rel=1e-3)


def test_on_a_device_of_bfloat16_what_is_not_trained_is_small(tmp_path, monkeypatch):
    student = make_source(tmp_path / "student")
    teacher = make_source(tmp_path / "teacher", torch.float32, num_key_value_heads=4)
    place = Place(torch.device("cpu"), None, is_bfloat16=True)
    spread: list[Any] = []
    monkeypatch.setattr("uptrain.training.models._spread", lambda root, *_: spread.append(root))
    objective, trainable = load(student, teacher, place, trainable="attention")
    assert all("self_attn" in name for name in trainable.ever)
    for name, parameter in objective.model.named_parameters():
        expected = torch.bfloat16 if "mlp" in name else torch.float32
        assert parameter.dtype == expected, name
    assert {each.dtype for each in spread[0].parameters()} == {torch.bfloat16}  # the teacher's


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_cannot_keep_documents_apart_is_refused(tmp_path, role):
    llama, bloom = make_source(tmp_path / "llama"), make_bloom(tmp_path / "bloom")
    student, teacher = (bloom, llama) if role == "student" else (llama, bloom)
    load(student, teacher)
    with pytest.raises(TrainingError, match="BloomForCausalLM does not keep documents apart"):
        load(student, teacher, within_documents=True)
    load(llama, llama, within_documents=True)


def test_a_token_without_an_embedding_is_refused(tmp_path):
    source = make_source(tmp_path / "source")
    load(source, max_token=VOCABULARY - 1)
    with pytest.raises(
        DataError, match=r"gives token 2048, its model has 2048; take the tokenizer files of"
    ):
        load(source, max_token=VOCABULARY)


def test_checkpointing_is_refused_where_the_model_cannot(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(
        TrainingError, match=r"gradient_checkpointing: LlamaForCausalLM cannot do it; leave it out"
    ):
        load(source, gradient_checkpointing=True)
