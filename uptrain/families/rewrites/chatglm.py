"""ChatGLM2 and ChatGLM3 into glm."""

from collections.abc import Mapping
from typing import Any

from uptrain.errors import UnsupportedFamilyError
from uptrain.families.rewrites.recipe import Rewrite, copied, fused, rotary_keys, stated_keys
from uptrain.families.rewrites.stated import LOST, NORMS, check, class_name, count, flag, number
from uptrain.families.schema import Heads, Layout

_NEEDS = {
    "rmsnorm": (True, "its norms are no RMS norms"),
    "post_layer_norm": (True, "it has no last norm"),
    "apply_residual_connection_post_layernorm": (False, "its residuals begin behind the norms"),
    "add_bias_linear": (False, "all of its maps have biases"),
    "pre_seq_len": (None, "it has a learned prefix"),
    "rope_ratio": (
        1,
        "ChatGLM2's code divides positions by it, ChatGLM3's multiplies the rotary base; of glm-4 take the "
        "-hf version",
    ),
}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def to_glm(config: Mapping[str, Any]) -> Rewrite:
    """Rewrite one with two KV heads, or all: half of each head is rotated, in neighbouring channels.

    Raises:
        UnsupportedFamilyError: If it is the first ChatGLM, or has what glm does not have.
        CheckpointError: If the config lacks a key.

    Source: modeling_chatglm.py of THUDM/chatglm2-6b and chatglm3-6b; issue 374 of ztxz16/fastllm for the
    two meanings of `rope_ratio`.
    """
    class_name(config, "ChatGLMModel", "ChatGLMForConditionalGeneration")
    if "multi_query_attention" not in config:
        raise UnsupportedFamilyError(
            "it is the first ChatGLM, whose positions are two-dimensional and whose prompts see their ends"
        )
    check(config, _NEEDS, "glm")
    H, has_bias = count(config, "num_attention_heads"), flag(config, "add_qkv_bias")
    is_grouped = flag(config, "multi_query_attention")
    heads = Heads(H, count(config, "multi_query_group_num") if is_grouped else H)
    layout = Layout.CONCATENATED if is_grouped else Layout.GROUPED
    layers = count(config, "num_layers")
    tensors = copied("model.embed_tokens", "transformer.embedding.word_embeddings", "weight")
    for index in range(layers):
        new, old = f"model.layers.{index}", f"transformer.encoder.layers.{index}"
        attention = f"{old}.self_attention"
        tensors |= fused(
            f"{new}.self_attn", f"{attention}.query_key_value", layout, heads, has_bias=has_bias
        )
        tensors |= copied(f"{new}.self_attn.o_proj", f"{attention}.dense", "weight")
        tensors |= copied(f"{new}.mlp.gate_up_proj", f"{old}.mlp.dense_h_to_4h", "weight")
        tensors |= copied(f"{new}.mlp.down_proj", f"{old}.mlp.dense_4h_to_h", "weight")
        tensors |= copied(new, old, *NORMS)
    tensors |= copied("model.norm", "transformer.encoder.final_layernorm", "weight")
    tensors |= copied("lm_head", "transformer.output_layer", "weight")
    made = {
        **stated_keys(config, "glm"),
        "vocab_size": count(config, "padded_vocab_size"),
        "hidden_size": count(config, "hidden_size"),
        "intermediate_size": count(config, "ffn_hidden_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": H,
        "num_key_value_heads": heads.num_key_value_heads,
        "head_dim": count(config, "kv_channels"),
        "hidden_act": "silu",
        "attention_bias": has_bias,
        "max_position_embeddings": count(config, "seq_length"),
        "rms_norm_eps": number(config, "layernorm_epsilon"),
        "pad_token_id": config.get("pad_token_id"),  # glm's own lies outside of the vocabulary
        **rotary_keys(_ROTARY),
    }
    return Rewrite(made, tensors, LOST)
