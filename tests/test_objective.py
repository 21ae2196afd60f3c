"""What is minimised, against dense losses of stock models."""

import pytest
import torch
from tiny import VOCAB, tiny_config, tiny_model
from torch.nn import functional

from uptrain.training.head import SplitModel, find_split
from uptrain.training.objective import Objective


def split(model) -> SplitModel:
    return SplitModel(model, find_split(model))


@pytest.fixture
def student():
    return tiny_model(tiny_config("llama", num_key_value_heads=2)).train()


@pytest.fixture
def teacher():
    return tiny_model(tiny_config("llama"), seed=1).requires_grad_(False)


def batch(position_ids=False):
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB, (3, 10))
    restarting = torch.arange(9) % 5
    return tokens[:, :-1], tokens[:, 1:], restarting.repeat(3, 1) if position_ids else None


def dense(student, teacher, inputs, targets, position_ids):
    """Give cross-entropy and KL by torch's own functions, of whole logits, in float64."""
    given = {"input_ids": inputs, "position_ids": position_ids, "use_cache": False}
    log_student, log_teacher = (
        model(**given).logits.log_softmax(-1).flatten(0, 1) for model in (student, teacher)
    )
    return (
        functional.nll_loss(log_student, targets.flatten(), reduction="sum"),
        functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True),
    )


@pytest.mark.parametrize("position_ids", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_sums_and_gradients_are_those_of_dense_losses(student, teacher, weight, position_ids):
    given = batch(position_ids)
    cross_entropy, divergence = dense(student, teacher, *given)
    expected = (1 - weight) * cross_entropy + weight * divergence
    expected.backward()
    gradients = {name: each.grad for name, each in student.named_parameters()}
    student.zero_grad()
    sums = Objective(split(student), split(teacher), weight)(*given)
    sums[0].backward()
    # The losses are made in float32, whatever the model is in.
    whole = torch.stack([expected, cross_entropy, divergence]).tolist()
    assert sums.tolist() == pytest.approx(whole, rel=1e-5)
    for name, each in student.named_parameters():
        largest = gradients[name].abs().max()
        assert (each.grad - gradients[name]).abs().max() <= 1e-5 * largest, name


def test_without_a_teacher_it_is_cross_entropy(student):
    inputs, targets, _ = batch()
    sums = Objective(split(student))(inputs, targets)
    expected = dense(student, student, inputs, targets, None)[0].item()
    assert sums.tolist() == pytest.approx([expected, expected, 0], rel=1e-5)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(teacher):
    student = tiny_model(tiny_config("llama"), seed=1).train()
    sums = Objective(split(student), split(teacher), 1.0)(*batch())
    sums[0].backward()
    assert sums[0] == sums[2] == 0
    assert all(not each.grad.any() for each in student.parameters())


def test_the_teacher_is_neither_trained_nor_saved(student, teacher):
    objective = Objective(split(student), split(teacher), 1.0)
    assert {id(each) for each in objective.parameters()} == {id(p) for p in student.parameters()}
    assert not teacher.training
    objective.train()
    assert not teacher.training
