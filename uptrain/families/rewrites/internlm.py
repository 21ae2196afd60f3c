"""InternLM, the first and the second, into llama."""

import json
from collections.abc import Mapping
from typing import Any

from uptrain.errors import UnsupportedFamilyError
from uptrain.families.rewrites.recipe import Rewrite, copied, fused, renamed
from uptrain.families.rewrites.stated import (
    GATED_MLP,
    LOST,
    NORMS,
    class_name,
    count,
    flag,
    llama_keys,
    number,
    part,
    rope_keys,
)
from uptrain.families.schema import Heads, Layout

_INTERNLM2_LAYER = {
    **dict(zip(GATED_MLP, (f"feed_forward.w{n}.weight" for n in (1, 3, 2)), strict=True)),
    **dict(zip(NORMS, ("attention_norm.weight", "ffn_norm.weight"), strict=True)),
}


def to_llama(config: Mapping[str, Any]) -> Rewrite:
    """Rewrite the first InternLM, which is llama with biases in attention where `bias` says so.

    Raises:
        UnsupportedFamilyError: If its rotary positions are of another kind.
        CheckpointError: If the config lacks a key.

    Source: tools/transformers/internlm_model/modeling_internlm.py in InternLM/InternLM; transformers
    pull request 26302 and vLLM pull request 2860, which run it as llama.
    """
    class_name(config, "InternLMForCausalLM")
    H = count(config, "num_attention_heads")
    ignored = {"rope_theta": 10000, "rope_scaling": None, "num_key_value_heads": H}
    for key, value in ignored.items():
        if config.get(key, value) != value:
            raise UnsupportedFamilyError(
                f"its {key} is {json.dumps(config[key])}, which its own code does not read"
            )
    rotary, lost = part(config, "rotary", {"type": "origin", "base": 10000}), LOST
    if rotary.get("type") == "dynamic":
        factor = number({"scaling_factor": 1.0, **rotary}, "scaling_factor")
        rope = rope_keys(number(rotary, "base"), "dynamic", factor)
        lost += (
            f"beyond {count(config, 'max_position_embeddings')} tokens, keys in the cache keep the rotary "
            "base that they were made with, where InternLM turns them anew",
        )
    elif rotary.get("type") == "origin":
        rope = rope_keys(number(rotary, "base"))
    else:
        raise UnsupportedFamilyError(f"its rotary positions are {json.dumps(rotary)}")
    has_bias = flag(config, "bias")
    leaves = ("weight", "bias") if has_bias else ("weight",)
    tensors = copied("model.embed_tokens", "model.embed_tokens", "weight")
    for index in range(count(config, "num_hidden_layers")):
        layer = f"model.layers.{index}"
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = f"{layer}.self_attn.{leaf}"
            tensors |= copied(name, name, *leaves)
        tensors |= copied(layer, layer, *GATED_MLP, *NORMS)
    tensors |= copied("model.norm", "model.norm", "weight")
    tensors |= copied("lm_head", "lm_head", "weight")
    made = llama_keys(config, Heads(H, H), attention_bias=has_bias, **rope)
    return Rewrite(made, tensors, lost)


def internlm2_to_llama(config: Mapping[str, Any]) -> Rewrite:
    """Rewrite InternLM2, whose `wqkv` is [K, H/K + 2, d], with any number of KV heads.

    Raises:
        UnsupportedFamilyError: If its rotary positions are of another kind.
        CheckpointError: If the config lacks a key.

    Source: modeling_internlm2.py of InternLM2; tools/convert2llama.py in InternLM/InternLM.
    """
    class_name(config, "InternLM2ForCausalLM")
    heads = Heads(count(config, "num_attention_heads"), count(config, "num_key_value_heads"))
    scaling = part(config, "rope_scaling", {"type": "default"})
    if scaling.get("type") not in ("default", "linear", "dynamic"):
        raise UnsupportedFamilyError(f"its rotary positions are scaled by {json.dumps(scaling)}")
    has_bias = flag(config, "bias")
    leaves = ("weight", "bias") if has_bias else ("weight",)
    tensors = copied("model.embed_tokens", "model.tok_embeddings", "weight")
    for index in range(count(config, "num_hidden_layers")):
        layer = f"model.layers.{index}"
        new, old = f"{layer}.self_attn", f"{layer}.attention"
        tensors |= fused(new, f"{old}.wqkv", Layout.GROUPED, heads, has_bias=has_bias)
        tensors |= copied(f"{new}.o_proj", f"{old}.wo", *leaves)
        tensors |= renamed(layer, layer, _INTERNLM2_LAYER)
    tensors |= copied("model.norm", "model.norm", "weight")
    tensors |= copied("lm_head", "output", "weight")
    factor = None if scaling["type"] == "default" else number(scaling, "factor")
    rope = rope_keys(number(config, "rope_theta"), scaling["type"], factor)
    return Rewrite(llama_keys(config, heads, attention_bias=has_bias, **rope), tensors, LOST)
