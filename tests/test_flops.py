"""The work of training, as torch counts it while it is done."""

from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from uptrain.loading import decoder_layers
from uptrain.training.flops import Work
from uptrain.training.trainable import attention_names, set_trained

TOKENS, LAYERS = 32, 3


def made(model_type: str, **overrides: Any) -> tuple[Any, dict[str, Any]]:
    config = tiny_config(model_type, num_hidden_layers=LAYERS, **overrides)
    return tiny_model(config), config.to_dict() | {"model_type": model_type}


def counted(model: Any) -> float:
    """Run a model forward, and backward if it is trained; returns the work of a token."""
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.arange(TOKENS)[None], use_cache=False).logits
        if logits.requires_grad:
            logits.sum().backward()
    return counter.get_total_flops() / TOKENS


# Eager attention works on whole squares, of which a half is masked.
HALF_SQUARES = 2 * TOKENS * 64 * LAYERS


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("llama", {"num_key_value_heads": 2}), ("gpt_bigcode", {"multi_query": True}), ("phi3", {})],
)
def test_a_forward(model_type, overrides):
    model, config = made(model_type, **overrides)
    model.requires_grad_(False)
    assert Work(model, config, TOKENS).forward + HALF_SQUARES == counted(model)


@pytest.mark.parametrize("only_attention", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training(only_attention, checkpointing):
    model, config = made("llama", num_key_value_heads=2)
    names = frozenset(name for name, _ in model.named_parameters())
    if only_attention:
        names = attention_names(model, config)
        # Embeddings too: they are no work, but what is passed on to them is.
        set_trained(model, names | {"model.embed_tokens.weight"})
    model.train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    found = counted(model)
    if checkpointing:
        # A layer is done again up to its last matrix, whose output nobody needs.
        found += 2 * 48 * 64 * LAYERS
    squares = HALF_SQUARES * (4 if checkpointing else 3)
    assert Work(model, config, TOKENS).training(names, checkpointing) + squares == found


def test_a_token_meets_some_of_the_experts():
    matrices = 64 * 48 * 3
    found, numbers = [], []
    for experts in (1, 2, 3):
        model, config = made("mixtral", num_experts_per_tok=experts)
        work = Work(model, config, TOKENS)
        found.append(work.forward)
        numbers.append(work.numbers_at_matrices(decoder_layers(model)[0]))
    assert found[2] - found[1] == found[1] - found[0] == 2 * matrices * LAYERS
    # Gate and up are one matrix: in, both out; then down.
    assert numbers[2] - numbers[1] == numbers[1] - numbers[0] == (64 + 2 * 48) + (48 + 64)
