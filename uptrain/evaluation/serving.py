"""What a checkpoint needs and who accepts it where it is served, by number of KV heads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from uptrain.checkpoint.reader import Checkpoint
from uptrain.families.registry import parse_config
from uptrain.loading import context_length

BATCHES = (1, 16)
GPUS = (1, 2, 4, 8, 16)

# Families for whose `…ForCausalLM` a runtime has a class of its own, of those that convert: llama.cpp's converter, at
# 00bdaa1; vLLM's registry, at 0002bff.
_LLAMA_CPP_CLASSES = (
    "Afmoe Apertus Arcee Bamba Cohere Cohere2 Cohere2Moe Dbrx Dots1 Ernie4_5 Ernie4_5_Moe "
    "Exaone4 Falcon FalconH1 Gemma Gemma2 Gemma3 Gemma3n Gemma4 Glm Glm4 Glm4Moe GPTBigCode "
    "GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared HunYuanDenseV1 HunYuanMoEV1 "
    "Jais2 Jamba Lfm2 Lfm2Moe Llama Llama4 Mellum MiMoV2Flash MiniMaxM2 Ministral3 Mistral "
    "Mixtral Nemotron NemotronH Olmo Olmo2 Olmo3 Olmoe Phi Phi3 PhiMoE Qwen2 Qwen2Moe Qwen3 "
    "Qwen3Moe Qwen3Next Qwen3_5 Qwen3_5Moe SeedOss SmolLM3 SolarOpen StableLm Starcoder2"
)
_VLLM_CLASSES = (
    "Afmoe Apertus Arcee Bamba Cohere Cohere2 Cwm Dbrx Dots1 Ernie4_5 Ernie4_5_Moe Exaone4 "
    "Falcon FalconH1 FlexOlmo Gemma Gemma2 Gemma3 Gemma3n Glm Glm4 Glm4Moe GPTBigCode GptOss "
    "Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared HunYuanDenseV1 HunYuanMoEV1 Jais2 "
    "Jamba Lfm2 Lfm2Moe Llama Llama4 MiMoV2Flash MiniMax MiniMaxM2 Mistral Mixtral Nemotron "
    "NemotronH Olmo Olmo2 Olmo3 Olmoe Phi Phi3 PhiMoE Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next "
    "SeedOss StableLm Starcoder2 Zamba2"
)
_UNKNOWN_CLASS = {
    "llama.cpp": (_LLAMA_CPP_CLASSES, False, "its converter has no {}"),
    "vLLM": (
        _VLLM_CLASSES,
        None,
        "has no {} of its own; its Transformers backend may run it (not run)",
    ),
}
# Whether a runtime splits KV heads over GPUs, may copy them, or splits otherwise; from a run of
# transformers 5.23 on 2 and 4 processes, from the sources of the others.
_SPLITTING = {"transformers": "even", "TGI": "even", "vLLM": "copy", "llama.cpp": "layers"}
_FROM_SOURCE = "from its source, not run"
_TGI = {
    "runtime": "TGI",
    "accepts": None,
    "note": f"for the families that it knows; {_FROM_SOURCE}",
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
        none), and for each target `kv_cache_bytes` of a full context by batch, and its `runtimes`
        with what classes they have, and `tensor_parallel`: the numbers of GPUs up to 16 that they
        can split it over, None for any; `copied` are those of them on which a KV head lies more than
        once, so that the cache of each GPU gets no smaller.
    """
    config = parse_config(checkpoint.config, code)
    text = config.get_text_config()
    heads = inspected["num_attention_heads"]
    own = (checkpoint.config.get("architectures") or [None])[0]
    context = context_length(config)
    targets = []
    for target in inspected["targets"]:
        model_type = target["model_type"]
        named = own if model_type == inspected["model_type"] else None
        architecture = named or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        cached = target["kv_cache_bytes_per_token"] * (context or 0)
        targets.append(
            {
                **target,
                "kv_cache_bytes": {str(n): n * cached for n in BATCHES} if context else None,
                "runtimes": [
                    _judge_class(runtime, architecture)
                    | split_over(
                        runtime["runtime"], model_type, heads, target["num_key_value_heads"]
                    )
                    for runtime in [*target["runtimes"], _TGI]
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


def _judge_class(runtime: Mapping[str, Any], architecture: str | None) -> dict[str, Any]:
    """Correct what is said of a runtime that accepts the heads if it has no such class."""
    name = runtime["runtime"]
    if name not in _UNKNOWN_CLASS or not runtime["accepts"] or architecture is None:
        return dict(runtime)
    classes, accepts, note = _UNKNOWN_CLASS[name]
    if architecture.removesuffix("ForCausalLM") in classes.split():
        return {**runtime, "note": _FROM_SOURCE}
    return {**runtime, "accepts": accepts, "note": note.format(architecture)}
