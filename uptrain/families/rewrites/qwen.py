"""The first Qwen into qwen2."""

from collections.abc import Mapping
from typing import Any

from uptrain.errors import UnsupportedFamilyError
from uptrain.families.rewrites.recipe import Rewrite, copied, fused, renamed, stated_keys
from uptrain.families.rewrites.stated import (
    GATED_MLP,
    LOST,
    NORMS,
    check,
    class_name,
    count,
    flag,
    number,
    rope_keys,
)
from uptrain.families.schema import Heads, Layout

_NEEDS = {
    "no_bias": (True, "its output and MLP maps have biases"),
    "rotary_pct": (1, "only a part of each head is rotated"),
    "apply_residual_connection_post_layernorm": (False, "its residuals begin behind the norms"),
    "seq_length_expansion": (1, "its positions are divided"),
    "visual": (None, "it sees images, too"),
    "audio": (None, "it hears, too"),
}
_LAYER = {
    **dict(zip(GATED_MLP, (f"mlp.{part}.weight" for part in ("w2", "w1", "c_proj")), strict=True)),
    **dict(zip(NORMS, ("ln_1.weight", "ln_2.weight"), strict=True)),
}
_BEYOND = {
    "use_dynamic_ntk": "stretches its rotary positions",
    "use_logn_attn": "scales its queries",
}


def to_qwen2(config: Mapping[str, Any]) -> Rewrite:
    """Rewrite it: biases on queries, keys and values only; the gate of its MLP is `w2`, not `w1`.

    Up to `seq_length` tokens the two compute the same. Beyond, Qwen stretches its rotary positions and
    scales its queries if its config says so; then the target ends there.

    Raises:
        UnsupportedFamilyError: If it has biases elsewhere, or another kind of positions.
        CheckpointError: If the config lacks a key.

    Source: modeling_qwen.py of Qwen/Qwen-7B and Qwen-72B; their configs, and that of the first
    Qwen-7B-Chat, which has older names.
    """
    class_name(config, "QWenLMHeadModel")
    check(config, _NEEDS, "qwen2")
    H = count(config, "num_attention_heads", "n_head")
    size = count(config, "hidden_size", "n_embd")
    layers = count(config, "num_hidden_layers", "n_layer")
    if H * count(config, "kv_channels") != size:
        raise UnsupportedFamilyError(
            f"its {H} heads of {config['kv_channels']} channels do not make up its hidden size, {size}"
        )
    layout, heads = Layout.CONCATENATED, Heads(H, H)
    tensors = copied("model.embed_tokens", "transformer.wte", "weight")
    for index in range(layers):
        new, old = f"model.layers.{index}", f"transformer.h.{index}"
        tensors |= fused(f"{new}.self_attn", f"{old}.attn.c_attn", layout, heads, has_bias=True)
        tensors |= copied(f"{new}.self_attn.o_proj", f"{old}.attn.c_proj", "weight")
        tensors |= renamed(new, old, _LAYER)
    tensors |= copied("model.norm", "transformer.ln_f", "weight")
    tensors |= copied("lm_head", "lm_head", "weight")
    context, lost = count(config, "seq_length"), LOST
    beyond = [f"{what} ({key})" for key, what in _BEYOND.items() if flag(config, key)]
    if beyond:
        lost += (
            f"beyond {context} tokens Qwen {' and '.join(beyond)}, which qwen2 cannot: there it computes "
            "something else, and its config.json ends there",
        )
    else:  # rotated alike however far
        context = max(context, count(config, "max_position_embeddings", "n_positions"))
    made = {
        **stated_keys(config, "qwen2"),
        "vocab_size": count(config, "vocab_size"),
        "hidden_size": size,
        "intermediate_size": count(config, "intermediate_size", "ffn_hidden_size") // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": H,
        "num_key_value_heads": H,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "initializer_range": config.get("initializer_range", 0.02),
        "rms_norm_eps": number(config, "layer_norm_epsilon"),
        "use_sliding_window": False,
        **rope_keys(number(config, "rotary_emb_base")),
    }
    return Rewrite(made, tensors, lost)
