"""Baichuan of 7B into llama."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from uptrain.errors import UnsupportedFamilyError
from uptrain.families.rewrites.recipe import Recipe, Rewrite, copied, fused, rounding_loss
from uptrain.families.rewrites.stated import (
    GATED_MLP,
    LOST,
    NORMS,
    class_name,
    count,
    llama_keys,
    rope_keys,
)
from uptrain.families.schema import Heads, Layout

_ALIBI_HEADS = 40
"""Of all models of 13B, and of no other."""
_ROWS = 4096


def to_llama(config: Mapping[str, Any]) -> Rewrite:
    """Rewrite Baichuan-7B or Baichuan2-7B: queries, keys and values lie in one `W_pack`.

    Baichuan2 divides each row of its head by its length when it is run, which is done here once. The
    two are told by the spelling of their class, BaiChuan and Baichuan.

    Raises:
        UnsupportedFamilyError: If it is of 13B, whose positions are linear biases.
        CheckpointError: If the config lacks a key.

    Source: modeling_baichuan.py of Baichuan-7B and Baichuan2-13B-Chat; vLLM pull requests 1022 and
    1876, which tell the models from each other by the vocabulary.
    """
    is_normed = class_name(config, "BaiChuanForCausalLM", "BaichuanForCausalLM") == (
        "BaichuanForCausalLM"
    )
    H = count(config, "num_attention_heads")
    if "max_position_embeddings" not in config or H == _ALIBI_HEADS:
        raise UnsupportedFamilyError(
            "its positions are linear biases (ALiBi), as in all Baichuan models of 13B, which llama does "
            "not have"
        )
    heads, tensors = Heads(H, H), copied("model.embed_tokens", "model.embed_tokens", "weight")
    for index in range(count(config, "num_hidden_layers")):
        layer = f"model.layers.{index}"
        attention = f"{layer}.self_attn"
        tensors |= fused(attention, f"{attention}.W_pack", Layout.CONCATENATED, heads)
        tensors |= copied(attention, attention, "o_proj.weight")
        tensors |= copied(layer, layer, *GATED_MLP, *NORMS)
    tensors |= copied("model.norm", "model.norm", "weight")
    tensors["lm_head.weight"] = Recipe(("lm_head.weight",), _unit_rows if is_normed else None)
    lost = LOST
    if is_normed:
        lost += rounding_loss(
            config, "the rows of the head are divided by their lengths, as Baichuan2 does, and"
        )
    return Rewrite(llama_keys(config, heads, **rope_keys(10000)), tensors, lost)


def _unit_rows(weight: Tensor) -> Tensor:
    """Divide rows [rows, n] by their lengths, some at a time: in float64 they take much memory."""
    return torch.cat([normalize(rows.double()).to(weight.dtype) for rows in weight.split(_ROWS)])
