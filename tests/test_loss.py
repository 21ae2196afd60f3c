"""The loss in chunks against the dense one."""

import pytest
import torch
from tiny import VOCAB, tiny_config, tiny_model
from torch.nn import functional

from uptrain.training import loss as losses
from uptrain.training.head import SplitModel, find_split
from uptrain.training.loss import even_chunk
from uptrain.training.objective import Objective

# Arithmetic is float32 behind the logits; sums over chunks are in another order than dense ones.
RELATIVE = 1e-5


def dense(model, teacher, weight, inputs, targets):
    """The loss as one would write it: from whole logits, in float32."""
    logits = model(input_ids=inputs).logits.flatten(0, 1).float()
    cross_entropy = functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    if teacher is None:
        return cross_entropy, cross_entropy, torch.zeros(())
    with torch.no_grad():
        likely = teacher(input_ids=inputs).logits.flatten(0, 1).float().log_softmax(-1)
    divergence = functional.kl_div(logits.log_softmax(-1), likely, reduction="sum", log_target=True)
    return (1 - weight) * cross_entropy + weight * divergence, cross_entropy, divergence


def objective_of(model, teacher=None, weight=0.0):
    parts = [
        None if each is None else SplitModel(each, find_split(each)) for each in (model, teacher)
    ]
    return Objective(*parts, weight)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def batch(seed=0):
    tokens = torch.randint(0, VOCAB, (3, 8), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


# A tie, a soft cap, a logit scale, a bias, a division.
@pytest.mark.parametrize("elements", [1, 5 * VOCAB, 10**6])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("phi", {}),
        ("granite", {"logits_scaling": 2.5}),
    ],
)
@pytest.mark.parametrize("weight", [None, 1.0, 0.3])
def test_loss_and_gradients_are_the_dense_ones(monkeypatch, family, options, weight, elements):
    monkeypatch.setitem(losses._CHUNK_ELEMENTS, "cpu", elements)
    monkeypatch.setitem(losses._SLICE_ELEMENTS, "cpu", 2 * VOCAB)
    model = tiny_model(tiny_config(family, **options)).float()
    teacher = None if weight is None else tiny_model(tiny_config(family, **options), seed=1).float()
    inputs, targets = batch()
    expected = dense(model, teacher, weight, inputs, targets)
    (expected[0] * 0.5).backward()
    expected_gradients = gradients(model)

    found = objective_of(model, teacher, weight or 0.0)(inputs, targets)
    (found[0] * 0.5).backward()
    torch.testing.assert_close(
        found.detach(), torch.stack(expected).detach(), rtol=RELATIVE, atol=1e-6
    )
    found_gradients = gradients(model)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        error = (found_gradients[name] - gradient).norm() / gradient.norm()
        assert error < RELATIVE, name


def test_a_student_equal_to_its_teacher_diverges_by_nothing():
    model, teacher = (tiny_model(tiny_config("llama")).float() for _ in range(2))
    sums = objective_of(model, teacher, 1.0)(*batch())
    sums[0].backward()
    assert sums[0].item() == sums[2].item() == 0.0
    assert sums[1].item() > 0
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_a_token_that_the_teacher_rules_out_counts_for_nothing():
    logits = torch.randn(4, 7)
    teacher = torch.randn(4, 7)
    teacher[:, 2] = -torch.inf
    sums, gradient = losses._losses_and_gradient(logits, teacher, torch.zeros(4).long(), 1.0)
    kept = [0, 1, 3, 4, 5, 6]
    expected = (
        teacher[:, kept].softmax(-1)
        * (teacher[:, kept].log_softmax(-1) - logits.log_softmax(-1)[:, kept])
    ).sum()
    torch.testing.assert_close(sums[2], expected, rtol=1e-6, atol=1e-6)
    assert gradient.isfinite().all()


def test_frozen_parameters_get_no_gradient():
    model = tiny_model(tiny_config("llama")).float()
    model.requires_grad_(False)
    trained = model.model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    objective_of(model)(*batch())[0].backward()
    assert list(gradients(model)) == ["model.layers.0.self_attn.v_proj.weight"]
    assert trained.requires_grad


def test_without_gradients_none_is_computed():
    model = tiny_model(tiny_config("llama")).float()
    inputs, targets = batch()
    with torch.no_grad():
        sums = objective_of(model)(inputs, targets)
    assert not sums.requires_grad
    torch.testing.assert_close(sums[0], dense(model, None, 0, inputs, targets)[0])


def test_bfloat16_arithmetic_sums_in_float32():
    model = tiny_model(tiny_config("llama")).float()
    inputs, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        sums = objective_of(model)(inputs, targets)
        logits = model(input_ids=inputs).logits
    assert logits.dtype == torch.bfloat16
    expected = functional.cross_entropy(
        logits.flatten(0, 1).double(), targets.flatten(), reduction="sum"
    )
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums[1].double(), expected, rtol=1e-5, atol=0)


def test_the_logits_are_never_whole():
    model = tiny_model(tiny_config("llama")).float()
    inputs, targets = batch()
    sizes = []
    model.lm_head.register_forward_hook(lambda module, _, output: sizes.append(output.shape))
    objective = objective_of(model)
    sizes.clear()
    losses._CHUNK_ELEMENTS["cpu"], before = 4 * VOCAB, losses._CHUNK_ELEMENTS["cpu"]
    try:
        objective(inputs, targets)
    finally:
        losses._CHUNK_ELEMENTS["cpu"] = before
    assert [size for size in sizes if size[2] > 1] == [(1, 4, VOCAB)] * 5 + [(1, 1, VOCAB)]


def test_chunks_are_even():
    device = torch.device("cuda")
    assert even_chunk(16384, 32000, device) == 4096
    assert even_chunk(100, 32000, device) == 100
    assert even_chunk(7, 2**40, device) == 1
