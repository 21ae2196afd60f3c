"""What a checkpoint needs and who accepts it where it is served, by number of KV heads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.rewritten import known_config
from uptrain.families.registry import parse_config
from uptrain.loading import context_length

BATCHES = (1, 16)
GPUS = (1, 2, 4, 8, 16)

# Whether a runtime splits KV heads over GPUs, may copy them, or splits otherwise; from a run of
# transformers 5.23 on 2 and 4 processes, from the sources of the others.
_SPLITTING = {
    "transformers": "even",
    "vLLM": "copy",
    "llama.cpp": "layers",
    "CTranslate2": "even",
    "TGI": "even",
}


def describe_serving(
    inspected: Mapping[str, Any], checkpoint: Checkpoint, code: Path | None = None
) -> dict[str, Any]:
    """Add to what `inspect` found what serving asks for.

    Args:
        inspected: From `uptrain.conversion.plan.inspect`.
        checkpoint: What it was about.
        code: The checkpoint's folder if its own Python code may be executed.

    Returns:
        A copy with `architecture`, `head_dim` and `context` (tokens; None where the config says
        none), and for each target `kv_cache_bytes` of a full context by batch, and with each of its
        `runtimes` the `tensor_parallel` sizes: the numbers of GPUs up to 16 that it can split the
        target over, None for any; `copied` are those of them on which a KV head lies more than once,
        so that the cache of each GPU gets no smaller.
    """
    config = parse_config(known_config(checkpoint), code)
    text = config.get_text_config()
    heads = inspected["num_attention_heads"]
    own = (checkpoint.config.get("architectures") or [None])[0]
    context = context_length(config)
    targets = []
    for target in inspected["targets"]:
        model_type = target["model_type"]
        cached = target["kv_cache_bytes_per_token"] * (context or 0)
        targets.append(
            {
                **target,
                "kv_cache_bytes": {str(n): n * cached for n in BATCHES} if context else None,
                "runtimes": [
                    runtime
                    | split_over(
                        runtime["runtime"], model_type, heads, target["num_key_value_heads"]
                    )
                    for runtime in target["runtimes"]
                ],
            }
        )
    return {
        **inspected,
        "architecture": own,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "context": context,
        "targets": targets,
    }


def split_over(
    runtime: str, model_type: str, num_attention_heads: int, num_key_value_heads: int
) -> dict[str, list[int] | None]:
    """Say over how many GPUs a runtime can split the heads of a model.

    Query heads are always split evenly. KV heads are, too, or there are more GPUs than KV heads and
    each KV head is copied to several.

    Returns:
        `tensor_parallel`, the numbers of GPUs (None for any), and `copied`, those with copies.
    """
    H, K = num_attention_heads, num_key_value_heads
    how = _SPLITTING[runtime]
    if how == "layers":
        return {"tensor_parallel": None, "copied": []}
    sizes = [n for n in GPUS if H % n == 0 and K % n == 0]
    if runtime == "transformers" and not has_tensor_parallel_plan(model_type):
        sizes = [1]
    copied = [n for n in GPUS if how == "copy" and H % n == 0 and n > K and n % K == 0]
    return {"tensor_parallel": sizes + copied, "copied": copied}


def has_tensor_parallel_plan(model_type: str) -> bool:
    """Say whether transformers knows how to split a family over GPUs."""
    known = model_type in CONFIG_MAPPING
    return known and bool(getattr(CONFIG_MAPPING[model_type], "base_model_tp_plan", None))
