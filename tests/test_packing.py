"""Attention inside documents: against the documents alone, on stock models."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from tiny import VOCAB, tiny_config

from uptrain.errors import TrainingError
from uptrain.training.packing import check_packing, positions


def make(model_type: str, **options) -> torch.nn.Module:
    """A model in float32 with SDPA, as training has it; large weights make attention matter."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **options)
    config.dtype = "float32"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_positions_restart_at_each_start():
    assert positions(np.array([], int), 4).tolist() == [0, 1, 2, 3]
    assert positions(np.array([0, 3, 4]), 6).tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "qwen2", "gpt2", "mistral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_what_they_are_alone(model_type, attention):
    options = {"sliding_window": 6} if model_type == "mistral" else {}
    model = make(model_type, **options)
    model.set_attn_implementation(attention)
    check_packing(model)
    assert model.training
    model.eval()
    starts = [[0, 5, 6, 17], [9]]
    tokens = torch.randint(VOCAB, (2, 24))
    ids = torch.from_numpy(np.stack([positions(np.array(each), 24) for each in starts]))
    with torch.no_grad():
        packed = model(input_ids=tokens, position_ids=ids, use_cache=False).logits
        for row, begins in enumerate(starts):
            cuts = sorted({0, *begins, 24})
            for start, stop in pairwise(cuts):
                alone = model(input_ids=tokens[row : row + 1, start:stop], use_cache=False).logits
                # Other shapes, other kernels: float32 rounding through two layers.
                torch.testing.assert_close(packed[row, start:stop], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["bloom", "mamba"])
def test_a_model_that_does_not_heed_positions_is_refused(model_type):
    options = {"state_size": 4, "num_hidden_layers": 2} if model_type == "mamba" else {}
    torch.manual_seed(0)
    config = tiny_config(model_type, **options)
    config.dtype = "float32"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(TrainingError, match="does not keep documents apart by their positions"):
        check_packing(model)
    assert model.training


def test_a_model_that_takes_positions_but_sees_beyond_is_refused():
    model = make("llama")
    whole = model.forward

    def blind(input_ids, position_ids=None, **options):
        # Positions reach the rotation, but a mask of its own lets everything be seen.
        mask = torch.full((input_ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        return whole(input_ids=input_ids, position_ids=position_ids, attention_mask=mask, **options)

    model.forward = blind
    with pytest.raises(TrainingError, match="LlamaForCausalLM does not keep documents apart"):
        check_packing(model)
