"""Which runtimes accept a checkpoint, as far as its config and its number of KV heads decide."""

from collections.abc import Mapping
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_FROM_SOURCE = "from its source, not run"
_SUFFIX = "ForCausalLM"

# Families for whose `…ForCausalLM` a runtime has a class of its own, of those that convert: vLLM's registry at
# 0002bff, llama.cpp's converter as llama-cpp-python 0.3.36 brings it along, the loaders of CTranslate2 4.8.5 that
# read a number of KV heads.
_CLASSES = {
    "vLLM": (
        "Afmoe Apertus Arcee Bamba Cohere Cohere2 Cwm Dbrx Dots1 Ernie4_5 Ernie4_5_Moe Exaone4 "
        "Falcon FalconH1 FlexOlmo Gemma Gemma2 Gemma3 Gemma3n Glm Glm4 Glm4Moe GPTBigCode GptOss "
        "Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared HunYuanDenseV1 HunYuanMoEV1 Jais2 "
        "Jamba Lfm2 Lfm2Moe Llama Llama4 MiMoV2Flash MiniMax MiniMaxM2 Mistral Mixtral Nemotron "
        "NemotronH Olmo Olmo2 Olmo3 Olmoe Phi Phi3 PhiMoE Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next "
        "SeedOss StableLm Starcoder2 Zamba2"
    ),
    "llama.cpp": (
        "Afmoe Apertus Arcee Bamba BitNet Cohere Cohere2 Cohere2Moe Dbrx Dots1 Ernie4_5 "
        "Ernie4_5_Moe Exaone4 ExaoneMoe Falcon FalconH1 Gemma Gemma2 Gemma3 Gemma3n Gemma4 Glm "
        "Glm4 Glm4Moe GPTBigCode GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeSWA "
        "GraniteMoeShared GraniteSWA HYV3 HunYuanDenseV1 HunYuanMoEV1 Jais2 Jamba Laguna Lfm2 "
        "Lfm2Moe Llama Llama4 Mellum MiMoV2Flash MiniMaxM2 Ministral3 Mistral Mixtral Nemotron "
        "NemotronH Olmo Olmo2 Olmo3 Olmoe Phi Phi3 PhiMoE Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next "
        "Qwen3_5 Qwen3_5Moe Qwen4Exp SeedOss SmolLM3 SolarOpen StableLm Starcoder2"
    ),
    "CTranslate2": "Falcon GPTBigCode Gemma Gemma2 Gemma3 Gemma4 Llama Mistral Phi3 Qwen2 Qwen3",
}
_UNKNOWN_CLASS: dict[str, tuple[bool | None, str]] = {
    "vLLM": (None, "has no {} of its own; its Transformers backend may run it (not run)"),
    "llama.cpp": (False, "its converter has no {}"),
    "CTranslate2": (False, "its converter has no {} with a number of KV heads"),
}
RAN = {
    "llama.cpp": (
        "falcon", "gpt_bigcode", "llama", "mistral", "olmo2", "qwen2", "stablelm", "starcoder2",
    ),
    "CTranslate2": ("llama", "qwen2", "qwen3"),
}  # fmt: skip
"""Families of which a converted checkpoint gave the logits that it gives in transformers."""
_VERSIONS = {"llama.cpp": "llama-cpp-python 0.3.36", "CTranslate2": "version 4.8.5"}
_TGI = {"runtime": "TGI", "accepts": None, "note": f"for the families it knows; {_FROM_SOURCE}"}


def runtimes(config: Mapping[str, Any], num_key_value_heads: int) -> list[dict[str, Any]]:
    """Say which runtimes will accept a checkpoint with that many KV heads.

    Args:
        config: The content of `config.json`.
        num_key_value_heads: Of the checkpoint to be served.

    Returns:
        For each runtime its name, whether it accepts the checkpoint (None if that is not known), and
        a note: whether that was run, or why not.
    """
    model_type = config["model_type"]
    if model_type.startswith("gqa_"):
        note = "does not know this architecture, which only transformers has, with the checkpoint's own file"
        return [
            _row("transformers", True, "trust_remote_code=True, or `import uptrain` first"),
            *(_row(name, False, note) for name in (*_CLASSES, "TGI")),
        ]
    return [
        _row("transformers", True, "stock class, no remote code"),
        *(_judge(name, config, num_key_value_heads) for name in _CLASSES),
        dict(_TGI),
    ]


def refusals(config: Mapping[str, Any], num_key_value_heads: int) -> list[str]:
    """Say which runtimes will not accept a checkpoint, and why: a sentence for each reason."""
    reasons: dict[str, list[str]] = {}
    for found in runtimes(config, num_key_value_heads):
        if found["accepts"] is False:
            reasons.setdefault(found["note"], []).append(found["runtime"])
    return [f"{', '.join(names)}: {note}" for note, names in reasons.items()]


def _row(name: str, accepts: bool | None, note: str) -> dict[str, Any]:
    return {"runtime": name, "accepts": accepts, "note": note}


def _judge(name: str, config: Mapping[str, Any], num_key_value_heads: int) -> dict[str, Any]:
    model_type = config["model_type"]
    named = (config.get("architectures") or [None])[0]
    architecture = named or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")
    if not architecture.endswith(_SUFFIX):
        return _row(name, None, f"not known for {architecture or model_type}, which was not read")
    if architecture.removesuffix(_SUFFIX) not in _CLASSES[name].split():
        accepts, note = _UNKNOWN_CLASS[name]
        return _row(name, accepts, note.format(architecture))
    reason = _REASONS[name](config, num_key_value_heads)
    if reason is not None:
        return _row(name, False, reason)
    ran = model_type in RAN.get(name, ())
    note = f"run, with {_VERSIONS[name]}" if ran else _FROM_SOURCE
    return _row(name, True, note + (_beyond_window(config) if name == "llama.cpp" else ""))


def _vllm(config: Mapping[str, Any], num_key_value_heads: int) -> str | None:
    """Say why vLLM's own class of a family cannot compute a model; None if it can.

    Source: vLLM's model files at 4652ef5 (phi), 4ae0583 (olmo), 4819ff7 (stablelm), 7477b4f (falcon).
    """
    model_type = config["model_type"]
    grouped = num_key_value_heads != config.get("num_attention_heads")
    if model_type in ("phi", "olmo") and grouped:
        return (
            "its own class ignores the number of KV heads; use --model-impl transformers (not run)"
        )
    if model_type in ("phi", "stablelm") and config.get("qk_layernorm"):
        return "its own class leaves out the norms of queries and keys"
    if model_type == "stablelm" and config.get("use_parallel_residual"):
        return "its own class has no parallel residual"
    if model_type == "falcon":
        return _only_wide(config, "ffn_hidden_size") or _only_activation(config, "gelu")
    return None


def _llama_cpp(config: Mapping[str, Any], num_key_value_heads: int) -> str | None:
    """Say why llama.cpp cannot compute a model of a family that it knows; None if it can.

    Source: conversion/ and src/models/ of llama.cpp in llama-cpp-python 0.3.36.
    """
    model_type = config["model_type"]
    if model_type == "phi" and num_key_value_heads != config.get("num_attention_heads"):
        return "its converter writes as many KV heads as query heads"
    if model_type == "gpt_bigcode" and num_key_value_heads != 1:
        return "its converter knows one KV head only"
    width = {"phi": "intermediate_size", "falcon": "ffn_hidden_size", "gpt_bigcode": "n_inner"}
    activation = {"gpt_bigcode": "gelu", "nemotron": "relu2", "starcoder2": "gelu"}
    if model_type in width and (reason := _only_wide(config, width[model_type])):
        return reason
    if model_type in activation and (reason := _only_activation(config, activation[model_type])):
        return reason
    return None


def _ctranslate2(config: Mapping[str, Any], num_key_value_heads: int) -> str | None:
    """Say why CTranslate2 cannot compute a model of a family that it knows; None if it can.

    Source: ctranslate2/converters/transformers.py of version 4.8.5.
    """
    model_type = config["model_type"]
    if model_type == "gpt_bigcode" and num_key_value_heads != 1:
        return "its converter knows one KV head only"
    one_norm = config.get("num_ln_in_parallel_attn") == 1
    if model_type == "falcon" and one_norm and num_key_value_heads != 1:
        return "its converter expects two norms a layer with more than one KV head"
    return None


def _beyond_window(config: Mapping[str, Any]) -> str:
    """Say up to where llama.cpp is right about the families whose sliding window it ignores."""
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    ignored = config["model_type"] in ("mistral", "mixtral", "starcoder2")
    if not ignored or window is None or (context is not None and window >= context):
        return ""
    return f"; ignores the sliding window, so it is right on up to {window:,} tokens only"


_REASONS = {"vLLM": _vllm, "llama.cpp": _llama_cpp, "CTranslate2": _ctranslate2}


def _only_wide(config: Mapping[str, Any], key: str) -> str | None:
    """Give the reason of a runtime that takes every MLP for four times as wide as the model."""
    hidden = config.get("hidden_size", config.get("n_embd"))
    width = config.get(key)
    if hidden is None or width in (None, 4 * hidden):
        return None
    return f"it takes the MLP for {4 * hidden} wide, where this one has {width}"


def _only_activation(config: Mapping[str, Any], fixed: str) -> str | None:
    """Give the reason of a runtime that computes one activation whatever the config says."""
    keys = ("hidden_act", "activation_function", "activation")
    activation = next((config[key] for key in keys if config.get(key)), fixed)
    if activation.startswith(fixed):  # its variants, gelu_new and the like, are taken for it
        return None
    return f"it computes {fixed} where this family has {activation}"
