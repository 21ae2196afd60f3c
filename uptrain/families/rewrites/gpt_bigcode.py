"""gpt2 and opt into gpt_bigcode, the one family with learned positions that can have a single KV head."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from uptrain.errors import UnsupportedFamilyError
from uptrain.families.layouts import join_heads, split_heads
from uptrain.families.registry import parse_config
from uptrain.families.rewrites.recipe import (
    Recipe,
    Rewrite,
    Rows,
    common_keys,
    copied,
    linear,
    norm,
)
from uptrain.families.schema import Heads, Layout

_OPT_NEEDS = {
    "do_layer_norm_before": (True, "its norms stand behind attention and MLP"),
    "_remove_final_layer_norm": (False, "it has no last norm"),
    "layer_norm_elementwise_affine": (True, "its norms have no gains"),
}


def gpt2_to_gpt_bigcode(config: Mapping[str, Any]) -> Rewrite:
    """Rewrite gpt2: its weights lie [inputs, outputs], and [q; k; v] where gpt_bigcode has [H, 3, d].

    Raises:
        UnsupportedFamilyError: If the model scales attention by layer or attends to an encoder.
    """
    parsed = parse_config(config)
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(parsed, key):
            raise UnsupportedFamilyError(f"gpt_bigcode has nothing like {key}, which is set")
    heads = Heads(parsed.n_head, parsed.n_head)

    def by_head(rows: Tensor) -> Tensor:
        return join_heads(*split_heads(rows, Layout.CONCATENATED, heads), Layout.GROUPED)

    tensors = copied("transformer.wte", "transformer.wte", "weight")
    tensors |= copied("transformer.wpe", "transformer.wpe", "weight")
    for index in range(parsed.n_layer):
        layer = f"transformer.h.{index}"
        tensors |= norm(f"{layer}.ln_1", f"{layer}.ln_1")
        tensors |= _transposed(f"{layer}.attn.c_attn", by_head)
        tensors |= _transposed(f"{layer}.attn.c_proj")
        tensors |= norm(f"{layer}.ln_2", f"{layer}.ln_2")
        tensors |= _transposed(f"{layer}.mlp.c_fc")
        tensors |= _transposed(f"{layer}.mlp.c_proj")
    tensors |= norm("transformer.ln_f", "transformer.ln_f")
    tensors |= copied("lm_head", "lm_head", "weight")
    keys = {
        "n_inner": parsed.n_inner,
        "n_positions": parsed.n_positions,
        "layer_norm_epsilon": parsed.layer_norm_epsilon,
        "scale_attn_weights": parsed.scale_attn_weights,
        "initializer_range": parsed.initializer_range,
        "resid_pdrop": parsed.resid_pdrop,
        "embd_pdrop": parsed.embd_pdrop,
        "attn_pdrop": parsed.attn_pdrop,
    }
    return Rewrite(_config(config, keys), tensors)


def opt_to_gpt_bigcode(config: Mapping[str, Any]) -> Rewrite:
    """Rewrite opt: its table of positions begins with two rows that no token has.

    Raises:
        UnsupportedFamilyError: If embeddings are projected or norms lie otherwise, as in opt-350m.
    """
    parsed = parse_config(config)
    for key, (needed, finding) in _OPT_NEEDS.items():
        if getattr(parsed, key) != needed:
            raise UnsupportedFamilyError(f"gpt_bigcode cannot express {key}: {finding}")
    if parsed.word_embed_proj_dim != parsed.hidden_size:
        raise UnsupportedFamilyError(
            f"gpt_bigcode cannot project embeddings from {parsed.word_embed_proj_dim} to "
            f"{parsed.hidden_size} dimensions"
        )
    has_bias = parsed.enable_bias
    tensors = copied("transformer.wte", "model.decoder.embed_tokens", "weight")
    tensors["transformer.wpe.weight"] = Recipe(
        ("model.decoder.embed_positions.weight",), lambda table: table[2:]
    )
    for index in range(parsed.num_hidden_layers):
        new, old = f"transformer.h.{index}", f"model.decoder.layers.{index}"
        tensors |= norm(f"{new}.ln_1", f"{old}.self_attn_layer_norm")
        tensors |= _joined(parsed, f"{new}.attn.c_attn", f"{old}.self_attn")
        tensors |= linear(f"{new}.attn.c_proj", f"{old}.self_attn.out_proj", has_bias=has_bias)
        tensors |= norm(f"{new}.ln_2", f"{old}.final_layer_norm")
        tensors |= linear(f"{new}.mlp.c_fc", f"{old}.fc1", has_bias=has_bias)
        tensors |= linear(f"{new}.mlp.c_proj", f"{old}.fc2", has_bias=has_bias)
    tensors |= norm("transformer.ln_f", "model.decoder.final_layer_norm")
    tensors |= copied("lm_head", "lm_head", "weight")
    keys = {
        "n_inner": parsed.ffn_dim,
        "n_positions": parsed.max_position_embeddings,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "initializer_range": parsed.init_std,
        "resid_pdrop": parsed.dropout,
        "embd_pdrop": parsed.dropout,
        "attn_pdrop": parsed.attention_dropout,
    }
    lost = (
        "positions are counted from the first token, padding or not: outside of generate(), give "
        "position_ids with batches padded on the left",
    )
    return Rewrite(_config(config, keys), tensors, lost)


def _config(config: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    parsed = parse_config(config)
    return {
        **common_keys(config, "gpt_bigcode"),
        "n_embd": parsed.hidden_size,
        "n_layer": parsed.num_hidden_layers,
        "n_head": parsed.num_attention_heads,
        "activation_function": parsed.activation_function,
        "multi_query": False,
        **keys,
    }


def _transposed(name: str, rows: Rows = lambda tensor: tensor) -> dict[str, Recipe]:
    return {
        f"{name}.weight": Recipe((f"{name}.weight",), lambda weight: rows(weight.mT)),
        f"{name}.bias": Recipe((f"{name}.bias",), rows),
    }


def _joined(parsed: Any, new: str, old: str) -> dict[str, Recipe]:
    """Join separate queries, keys and values to [H, 3, d]."""

    def join(*parts: Tensor) -> Tensor:
        query, *others = (part.unflatten(0, (parsed.num_attention_heads, -1)) for part in parts)
        return join_heads(query, others, Layout.GROUPED)

    weights, biases = (
        tuple(f"{old}.{part}_proj.{leaf}" for part in "qkv") for leaf in ("weight", "bias")
    )
    bias = Recipe(biases, join)
    if not parsed.enable_bias:
        bias = Recipe(weights, lambda *parts: torch.cat(parts)[:, 0], constant=0.0)
    return {f"{new}.weight": Recipe(weights, join), f"{new}.bias": bias}
