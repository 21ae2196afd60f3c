"""gptj and codegen into phi.

Both share one norm between attention and MLP as phi does, and rotate neighbouring channels where phi
rotates the first half of the rotary ones with the second.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from uptrain.errors import UnsupportedFamilyError
from uptrain.families.registry import parse_config
from uptrain.families.rewrites.recipe import (
    Recipe,
    Rewrite,
    Rows,
    common_keys,
    copied,
    linear,
    norm,
    rotary_keys,
)

_BLOCKS = 4
"""codegen's weights are cut for as many processors, whatever runs them."""


def to_phi(config: Mapping[str, Any]) -> Rewrite:
    """Rewrite gptj or codegen.

    Both compute attention in float32 whatever their dtype, so a float64 comparison ends there.

    Raises:
        UnsupportedFamilyError: If the config has no `rotary_dim` within the heads.
    """
    parsed = parse_config(config)
    head_dim = parsed.n_embd // parsed.n_head
    if not isinstance(parsed.rotary_dim, int) or not 0 < parsed.rotary_dim <= head_dim:
        raise UnsupportedFamilyError(
            f"rotary_dim is {parsed.rotary_dim}, expected 1 to {head_dim} channels of a head"
        )
    tensors = copied("model.embed_tokens", "transformer.wte", "weight")
    for index in range(parsed.n_layer):
        new, old = f"model.layers.{index}", f"transformer.h.{index}"
        tensors |= _attention(parsed, f"{new}.self_attn", f"{old}.attn")
        tensors |= linear(f"{new}.mlp.fc1", f"{old}.mlp.fc_in")
        tensors |= linear(f"{new}.mlp.fc2", f"{old}.mlp.fc_out")
        tensors |= norm(f"{new}.input_layernorm", f"{old}.ln_1")
    tensors |= norm("model.final_layernorm", "transformer.ln_f")
    tensors |= copied("lm_head", "lm_head", "weight", "bias")
    rotary = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": _factor(parsed.rotary_dim, head_dim),
    }
    return Rewrite(
        {
            **common_keys(config, "phi"),
            "hidden_size": parsed.n_embd,
            "intermediate_size": parsed.n_inner or 4 * parsed.n_embd,
            "num_hidden_layers": parsed.n_layer,
            "num_attention_heads": parsed.n_head,
            "num_key_value_heads": parsed.n_head,
            "hidden_act": parsed.activation_function,
            "max_position_embeddings": parsed.n_positions,
            "initializer_range": parsed.initializer_range,
            "layer_norm_eps": parsed.layer_norm_epsilon,
            "resid_pdrop": parsed.resid_pdrop,
            "embd_pdrop": parsed.embd_pdrop,
            "attention_dropout": parsed.attn_pdrop,
            **rotary_keys(rotary),
        },
        tensors,
    )


def _attention(parsed: Any, new: str, old: str) -> dict[str, Recipe]:
    halves = partial(_halves, heads=parsed.n_head, rotary_dim=parsed.rotary_dim)
    tensors = linear(f"{new}.dense", f"{old}.out_proj", has_bias=False)
    if parsed.model_type == "gptj":
        rows: dict[str, Rows | None] = {"q_proj": halves, "k_proj": halves, "v_proj": None}
        for part, chosen in rows.items():
            tensors |= linear(f"{new}.{part}", f"{old}.{part}", chosen, has_bias=False)
        return tensors
    for place, (part, in_halves) in enumerate(
        {"q_proj": True, "v_proj": False, "k_proj": True}.items()
    ):

        def fused(weight: Tensor, place: int = place, in_halves: bool = in_halves) -> Tensor:
            part = weight.unflatten(0, (_BLOCKS, 3, -1))[:, place].flatten(0, 1)
            return halves(part) if in_halves else part

        tensors |= linear(f"{new}.{part}", f"{old}.qkv_proj", fused, has_bias=False)
    return tensors


def _halves(rows: Tensor, heads: int, rotary_dim: int) -> Tensor:
    """Order each head's rotary rows: those with even number first, then those with odd number."""
    by_head = rows.unflatten(0, (heads, -1))
    rotary, rest = by_head[:, :rotary_dim], by_head[:, rotary_dim:]
    return torch.cat([rotary[:, 0::2], rotary[:, 1::2], rest], dim=1).flatten(0, 1)


def _factor(rotary_dim: int, head_dim: int) -> float:
    """Give the factor that phi multiplies with `head_dim` and cuts to `rotary_dim`."""
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, 1)
