"""gpt_neox into phi (parallel residual), starcoder2 or nemotron (sequential residual)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from uptrain.errors import UnsupportedFamilyError
from uptrain.families.registry import parse_config
from uptrain.families.rewrites.recipe import (
    Recipe,
    Rewrite,
    Rows,
    common_keys,
    copied,
    folded_linear,
    folded_norm,
    folding_loss,
    fused_rows,
    linear,
    norm,
    rotary_keys,
    zero_bias,
)
from uptrain.families.schema import Heads, Layout


def to_phi(config: Mapping[str, Any]) -> Rewrite:
    """Rewrite one with parallel residuals: phi has one norm for attention and MLP, so both are folded.

    Raises:
        UnsupportedFamilyError: If the residuals are sequential.
    """
    parsed = parse_config(config)
    if not parsed.use_parallel_residual:
        raise UnsupportedFamilyError("phi has parallel residuals, this checkpoint sequential ones")
    tensors = copied("model.embed_tokens", "gpt_neox.embed_in", "weight")
    for index in range(parsed.num_hidden_layers):
        new, old = f"model.layers.{index}", f"gpt_neox.layers.{index}"
        tensors |= _folded_layer(parsed, new, old, "dense", "fc1", "fc2")
        tensors |= folded_norm(f"{new}.input_layernorm", f"{old}.input_layernorm", gain=1.0)
    tensors |= norm("model.final_layernorm", "gpt_neox.final_layer_norm")
    tensors |= copied("lm_head", "lm_head", "weight")
    tensors["lm_head.bias"] = zero_bias("gpt_neox.embed_in.weight")
    keys = {
        "layer_norm_eps": parsed.layer_norm_eps,
        "resid_pdrop": parsed.hidden_dropout,
        "embd_pdrop": parsed.hidden_dropout,
    }
    return Rewrite(_config(config, "phi", keys), tensors, folding_loss(config))


def to_starcoder2(config: Mapping[str, Any]) -> Rewrite:
    """Rewrite one with sequential residuals whose heads are rotated whole.

    Raises:
        UnsupportedFamilyError: If the residuals are parallel, or heads are rotated in part.
    """
    parsed = _sequential(config, "starcoder2")
    if (factor := parsed.rope_parameters["partial_rotary_factor"]) != 1:
        raise UnsupportedFamilyError(
            f"starcoder2 rotates whole heads, this checkpoint {factor:g} of each"
        )
    tensors = copied("model.embed_tokens", "gpt_neox.embed_in", "weight")
    for index in range(parsed.num_hidden_layers):
        new, old = f"model.layers.{index}", f"gpt_neox.layers.{index}"
        for part, rows in _parts(parsed).items():
            tensors |= linear(
                f"{new}.self_attn.{part}",
                f"{old}.attention.query_key_value",
                rows,
                has_bias=parsed.attention_bias,
            )
        tensors |= _outputs(parsed, new, old, "o_proj", "c_proj")
        tensors |= linear(f"{new}.mlp.c_fc", f"{old}.mlp.dense_h_to_4h")
        for each in ("input_layernorm", "post_attention_layernorm"):
            tensors |= norm(f"{new}.{each}", f"{old}.{each}")
    tensors |= norm("model.norm", "gpt_neox.final_layer_norm")
    tensors |= copied("lm_head", "lm_head", "weight")
    keys = {
        "norm_epsilon": parsed.layer_norm_eps,
        "use_bias": True,
        "sliding_window": None,
        "residual_dropout": parsed.hidden_dropout,
        "embedding_dropout": parsed.hidden_dropout,
    }
    return Rewrite(_config(config, "starcoder2", keys), tensors)


def to_nemotron(config: Mapping[str, Any]) -> Rewrite:
    """Rewrite one with sequential residuals, whatever part of its heads is rotated.

    nemotron stores a norm's gain minus one. In 16 bits that would lose small gains, so those inside
    the layers are folded; the last one, which nothing with a bias follows, is not.

    Raises:
        UnsupportedFamilyError: If the residuals are parallel.
    """
    parsed = _sequential(config, "nemotron")
    tensors = copied("model.embed_tokens", "gpt_neox.embed_in", "weight")
    for index in range(parsed.num_hidden_layers):
        new, old = f"model.layers.{index}", f"gpt_neox.layers.{index}"
        tensors |= _folded_layer(parsed, new, old, "o_proj", "up_proj", "down_proj")
        for each in ("input_layernorm", "post_attention_layernorm"):
            tensors |= folded_norm(f"{new}.{each}", f"{old}.{each}", gain=0.0)
    tensors |= norm("model.norm", "gpt_neox.final_layer_norm")
    tensors["model.norm.weight"] = Recipe(("gpt_neox.final_layer_norm.weight",), _minus_one)
    tensors |= copied("lm_head", "lm_head", "weight")
    keys = {
        "norm_eps": parsed.layer_norm_eps,
        "head_dim": parsed.hidden_size // parsed.num_attention_heads,
        "attention_bias": True,
        "mlp_bias": True,
    }
    lost = folding_loss(config)
    if parsed.rope_parameters["rope_type"] != "default":
        lost += ("transformers 4 does not scale nemotron's rotary positions; use transformers 5",)
    return Rewrite(_config(config, "nemotron", keys), tensors, lost)


def _sequential(config: Mapping[str, Any], target: str) -> Any:
    parsed = parse_config(config)
    if parsed.use_parallel_residual:
        raise UnsupportedFamilyError(
            f"{target} has sequential residuals, this checkpoint parallel ones"
        )
    return parsed


def _config(config: Mapping[str, Any], model_type: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    parsed = parse_config(config)
    return {
        **common_keys(config, model_type),
        "hidden_size": parsed.hidden_size,
        "intermediate_size": parsed.intermediate_size,
        "num_hidden_layers": parsed.num_hidden_layers,
        "num_attention_heads": parsed.num_attention_heads,
        "num_key_value_heads": parsed.num_attention_heads,
        "hidden_act": parsed.hidden_act,
        "max_position_embeddings": parsed.max_position_embeddings,
        "initializer_range": parsed.initializer_range,
        "attention_dropout": parsed.attention_dropout,
        **rotary_keys(parsed.rope_parameters),
        **keys,
    }


def _folded_layer(
    parsed: Any, new: str, old: str, output: str, up: str, down: str
) -> dict[str, Recipe]:
    tensors: dict[str, Recipe] = {}
    for part, rows in _parts(parsed).items():
        tensors |= folded_linear(
            f"{new}.self_attn.{part}",
            f"{old}.attention.query_key_value",
            f"{old}.input_layernorm",
            rows,
            has_bias=parsed.attention_bias,
        )
    tensors |= _outputs(parsed, new, old, output, down)
    return tensors | folded_linear(
        f"{new}.mlp.{up}", f"{old}.mlp.dense_h_to_4h", f"{old}.post_attention_layernorm"
    )


def _outputs(parsed: Any, new: str, old: str, output: str, down: str) -> dict[str, Recipe]:
    return {
        **linear(
            f"{new}.self_attn.{output}", f"{old}.attention.dense", has_bias=parsed.attention_bias
        ),
        **linear(f"{new}.mlp.{down}", f"{old}.mlp.dense_4h_to_h"),
    }


def _parts(parsed: Any) -> dict[str, Rows]:
    """Rows of queries, keys and values in [H, 3, d]."""
    return fused_rows(Layout.GROUPED, Heads(parsed.num_attention_heads, parsed.num_attention_heads))


def _minus_one(gain: Tensor) -> Tensor:
    return (gain.double() - 1).to(gain.dtype)
