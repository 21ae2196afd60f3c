"""Which parameters train when; those that do not stay as they are."""

from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model

from uptrain.errors import UnsupportedFamilyError
from uptrain.training.options import TrainOptions
from uptrain.training.trainable import (
    attention_names,
    choose_trainable,
    set_trained,
    shrink_frozen,
)


def model_of(model_type: str, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    config = tiny_config(model_type, **overrides)
    model = tiny_model(config)
    return model, config.to_dict() | {"model_type": model_type}


def options_of(**options: Any) -> TrainOptions:
    return TrainOptions(learning_rate=1e-3, steps=10, batch_tokens=1, **options)


# What stock transformers calls the attention block of a family, and a parameter of it that does not
# follow the number of KV heads.
BLOCKS = [
    ("llama", {}, ".self_attn.", "o_proj.weight"),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True}, ".self_attn.", "q_proj.bias"),
    ("qwen3", {}, ".self_attn.", "q_norm.weight"),
    ("olmo2", {}, ".self_attn.", "q_norm.weight"),
    ("moshi", {}, ".self_attn.", "o_proj.linear.weight"),
    ("phi3", {}, ".self_attn.", "o_proj.weight"),
    ("starcoder2", {"use_bias": True}, ".self_attn.", "o_proj.bias"),
    ("mixtral", {}, ".self_attn.", "o_proj.weight"),
    ("gpt_bigcode", {"multi_query": True}, ".attn.", "c_proj.bias"),
    ("gpt_bigcode", {"multi_query": False}, ".attn.", "c_proj.bias"),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4}, ".self_attention.", "dense.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "overrides", "block", "sibling"), BLOCKS)
def test_attention_is_the_whole_block_and_nothing_else(model_type, overrides, block, sibling):
    model, config = model_of(model_type, **overrides)
    names = {name for name, _ in model.named_parameters()}
    expected = {name for name in names if block in name}
    assert attention_names(model, config) == expected
    assert any(name.endswith(f"{block}{sibling}") for name in expected)
    assert expected < names


def test_layers_without_kv_heads_have_no_attention():
    from family_list import HYBRID

    model, config = model_of("qwen3_5_text", **HYBRID)
    blocks = {name.split(".self_attn.")[0] for name in attention_names(model, config)}
    assert blocks == {"model.layers.1"}


def test_a_family_without_a_number_of_kv_heads_cannot_tell():
    model, config = model_of("gpt2")
    with pytest.raises(UnsupportedFamilyError, match="gpt2"):
        attention_names(model, config)


def test_a_model_with_one_head_cannot_tell():
    model, config = model_of("llama", num_attention_heads=1, num_key_value_heads=1, head_dim=64)
    with pytest.raises(UnsupportedFamilyError, match="no other number of KV heads is possible"):
        attention_names(model, config)


def test_what_trains_is_a_pure_function_of_the_step():
    model, config = model_of("llama")
    every = {name for name, _ in model.named_parameters()}
    attention = attention_names(model, config)

    def at_steps(**options: Any) -> list[frozenset[str]]:
        trainable = choose_trainable(model, config, options_of(**options))
        assert trainable.ever == trainable.at(9)
        return [trainable.at(step) for step in range(10)]

    assert at_steps() == [every] * 10
    assert at_steps(trainable="attention") == [attention] * 10
    assert at_steps(trainable="attention-first") == [attention] * 5 + [every] * 5
    late = at_steps(trainable="attention-first", attention_fraction=0.8)
    assert late == [attention] * 8 + [every] * 2


def test_parameters_that_need_no_gradient_are_never_trained():
    model, config = model_of("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    trainable = choose_trainable(model, config, options_of(trainable="attention-first"))
    assert "model.embed_tokens.weight" not in trainable.ever


def test_only_what_is_trained_gets_a_gradient():
    model, config = model_of("llama")
    attention = attention_names(model, config)
    every = {name for name, _ in model.named_parameters()}
    for names in (attention, every, attention):
        set_trained(model, names)
        model.zero_grad()
        model(input_ids=torch.arange(8)[None]).logits.sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_shrinking_what_is_frozen_changes_no_bit(tied, dtype):
    """Of loss, gradients and what an export would write."""
    losses, gradients, weights = [], [], []
    for shrink in (False, True):
        model, config = model_of("llama", tie_word_embeddings=tied)
        model.to(dtype).float()
        attention = attention_names(model, config)
        set_trained(model, attention)
        if shrink:
            shrink_frozen(model, attention)
            mlp = {name for name, _ in model.named_parameters() if ".mlp." in name}
            shrunk = {name for name, each in model.named_parameters() if each.dtype == dtype}
            assert shrunk == (mlp if tied else {*mlp, "lm_head.weight"})
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=torch.arange(32)[None]).logits.float().logsumexp(-1).sum()
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for n, p in model.named_parameters() if n in attention])
        weights.append([p.detach().to(dtype) for p in model.parameters()])
    for found in (losses, *zip(*gradients, strict=True), *zip(*weights, strict=True)):
        assert torch.equal(*found)


def test_what_16_bits_do_not_hold_is_not_shrunk():
    model, config = model_of("llama")
    model.float()
    shrink_frozen(model, attention_names(model, config))
    assert {each.dtype for each in model.parameters()} == {torch.float32}
