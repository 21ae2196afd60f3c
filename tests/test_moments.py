"""Second moments of an attention block's input, judged by torch on what its norm gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save, tiny_config, tiny_model

from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.attention import AttentionNames
from uptrain.conversion.fit import Run
from uptrain.conversion.moments import balanced_signs, input_moments
from uptrain.conversion.plan import plan_conversion
from uptrain.conversion.stacks import find_stacks
from uptrain.conversion.stream import LayerStream

# Products are summed in float32.
FLOAT32 = 1e-5


def first_layer(model_type: str, folder: Path) -> tuple[Any, AttentionNames, Run]:
    """The layer, the names of its attention, and a function that runs it."""
    checkpoint = open_checkpoint(save(tiny_model(tiny_config(model_type)).float(), folder))
    plan = plan_conversion(checkpoint, 2)
    ((stack, blocks),) = find_stacks(checkpoint, plan.head_tensors, None).items()
    stream = LayerStream(checkpoint, checkpoint.config, stack, torch.device("cpu"))
    layer = stream.layer(0)
    (names,) = blocks[0]
    return layer, names, lambda hidden, rows: stream.run(layer, 0, hidden)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "starcoder2"])
def test_the_moments_are_those_of_what_the_norm_gives(model_type: str, tmp_path: Path) -> None:
    layer, names, run = first_layer(model_type, tmp_path)
    assert names.has_bias == (model_type != "llama")
    hidden = torch.randn(4, 20, 64, generator=torch.Generator().manual_seed(0)) + 1
    batches = [(hidden[rows], rows) for rows in (slice(0, 2), slice(2, 4))]
    moment, covariance, of_queries = input_moments(layer, names, run, batches)
    assert of_queries is None  # they are made of the same
    with torch.no_grad():
        entering = layer.input_layernorm(hidden).flatten(0, 1).double()
    if names.has_bias:
        entering = torch.cat([entering, torch.ones(80, 1)], dim=1)
        assert torch.equal(covariance[-1], torch.zeros(65).double())
    expected = entering.T @ entering / len(entering)
    torch.testing.assert_close(moment, expected, rtol=FLOAT32, atol=FLOAT32)
    expected = torch.cov(entering.T, correction=0)
    torch.testing.assert_close(covariance, expected, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("model_type", ["llama", "starcoder2"])
def test_balanced_signs_show_the_gain_of_a_norm(model_type: str, tmp_path: Path) -> None:
    layer, names, run = first_layer(model_type, tmp_path)
    signs = balanced_signs(64)
    assert torch.equal(signs.sum(-1), torch.zeros(4, 16))
    assert torch.equal(signs.sum((0, 1)), torch.zeros(64))
    _, covariance, _ = input_moments(layer, names, run, [(signs, slice(None))])
    gain = layer.input_layernorm.weight.detach().double()
    found = covariance.diagonal()[:64].sqrt()
    # The norm's epsilon is a millionth or less of what it divides by.
    torch.testing.assert_close(found, gain.abs(), rtol=2e-5, atol=2e-5)
