"""The loss in chunks against the dense one."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from uptrain.training import loss as losses
from uptrain.training.loss import cross_entropy, sum_cross_entropy


@pytest.mark.parametrize("elements", [1, 64, 10**6])
def test_loss_and_gradient_equal_the_dense_ones(monkeypatch, elements):
    monkeypatch.setitem(losses._CHUNK_ELEMENTS, "cpu", elements)
    torch.manual_seed(0)
    logits = (torch.randn(13, 17) * 4).requires_grad_()
    targets = torch.randint(0, 17, (13,))
    dense = functional.cross_entropy(logits, targets, reduction="sum")
    (expected,) = torch.autograd.grad(dense * 0.5, logits)
    value = sum_cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(value * 0.5, logits)
    torch.testing.assert_close(value, dense, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_bfloat16_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits = torch.randn(500, 64, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 64, (500,))
    value = sum_cross_entropy(logits, targets)
    value.backward()
    dense = functional.cross_entropy(logits.detach().float(), targets, reduction="sum")
    assert value.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value.detach(), dense, rtol=1e-6, atol=0)


def test_without_gradients_none_is_computed():
    with torch.no_grad():
        value = sum_cross_entropy(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))
    assert value.item() == pytest.approx(3 * torch.tensor(4.0).log().item())


def test_cross_entropy_is_what_transformers_computes():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokens = torch.randint(0, 50, (3, 9))
    value, count, further = cross_entropy(model, tokens[:, :-1], tokens[:, 1:])
    # transformers shifts the labels itself and takes the mean.
    mean = model(input_ids=tokens, labels=tokens).loss
    assert (count, further) == (24, {})
    torch.testing.assert_close(value / count, mean, rtol=1e-5, atol=0)
