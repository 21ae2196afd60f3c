"""A model in two parts against the whole one."""

import pytest
import torch
from tiny import VOCAB, tiny_config, tiny_model
from torch import nn

from uptrain.errors import UnsupportedFamilyError
from uptrain.loading import decoder_layers
from uptrain.training.head import SplitModel, find_split

# A bias, a scale, a soft cap, a tie; a trunk behind another module; a projection before the head.
FAMILIES = [
    "llama", "phi", "cohere", "gemma2", "granite", "minicpm3", "opt", "gpt2", "gpt_neox", "falcon",
    "mixtral", "qwen3_next", "stablelm", "olmo2", "mpt", "bloom",
]  # fmt: skip


def split(model) -> SplitModel:
    return SplitModel(model, find_split(model))


def split_of(family: str) -> tuple[nn.Module, SplitModel]:
    model = tiny_model(tiny_config(family))
    return model, split(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_parts_together_are_the_model(family):
    model, parts = split_of(family)
    tokens = torch.randint(0, VOCAB, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        found = parts.logits(parts.hidden(input_ids=tokens))
    assert torch.equal(found, expected)
    assert parts.split.vocabulary == expected.shape[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_a_few_tokens_is_that_of_all(family):
    _, parts = split_of(family)
    tokens = torch.randint(0, VOCAB, (2, 9))
    with torch.no_grad():
        hidden = parts.hidden(input_ids=tokens)
        whole = parts.logits(hidden).flatten(0, 1)
        found = [parts.logits(part[None])[0] for part in hidden.flatten(0, 1).split(5)]
    # Another matrix shape may sum in another order: float64 rounding.
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-12, atol=1e-12)


def test_head_parameters_are_those_that_logits_depend_on():
    model, parts = split_of("phi")
    assert {id(p) for p in parts.head_parameters()} == {
        id(model.lm_head.weight),
        id(model.lm_head.bias),
    }
    model.lm_head.weight.requires_grad_(False)
    assert parts.head_parameters() == [model.lm_head.bias]


def test_a_tied_head_is_the_embedding():
    model = tiny_model(tiny_config("llama", tie_word_embeddings=True))
    assert split(model).head_parameters() == [model.model.embed_tokens.weight]


def test_the_model_is_left_as_it_was():
    model, parts = split_of("llama")
    parts.hidden(input_ids=torch.zeros(1, 3, dtype=torch.long))
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_a_head_of_its_own_is_refused():
    model = tiny_model(tiny_config("llama"))
    model.get_output_embeddings = lambda: None
    with pytest.raises(UnsupportedFamilyError) as error:
        split(model)
    assert str(error.value) == (
        "LlamaForCausalLM has no output embeddings; this family cannot be trained"
    )


def test_layers_are_those_that_the_class_names():
    model = tiny_model(tiny_config("llama"))
    assert decoder_layers(model) == list(model.model.layers)
