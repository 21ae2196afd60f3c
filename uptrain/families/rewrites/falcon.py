"""falcon's older architecture with multi-head attention into its newer one."""

from collections.abc import Mapping
from typing import Any

from uptrain.families.registry import parse_config
from uptrain.families.rewrites.recipe import Rewrite, rotary_keys


def to_new_architecture(config: Mapping[str, Any]) -> Rewrite | None:
    """Rewrite one with parallel residuals; its [H, 3, d] is the newer [K, H/K + 2, d] with K = H.

    Returns:
        None for all others: they have a KV key of their own, as far as they can be converted.
    """
    parsed = parse_config(config)
    if parsed.new_decoder_architecture or parsed.multi_query or not parsed.parallel_attn:
        return None
    changed = {
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
        "num_kv_heads": parsed.num_attention_heads,
    }
    # Positions by alibi have no rotary settings.
    rotary = {} if parsed.alibi else rotary_keys(parsed.rope_parameters)
    return Rewrite({**config, **rotary, **changed}, tensors=None)
