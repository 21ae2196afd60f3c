"""Which runtimes accept a checkpoint."""

from collections.abc import Mapping
from typing import Any

# From the runtimes' own model code; docs/families.md names the versions that were read.
_VLLM_IGNORES_KEY = {"phi", "olmo"}
_LLAMA_CPP_FIXED = {
    "phi": "its converter writes as many KV heads as query heads",
    "gpt_bigcode": "its converter knows one KV head only",
}
_LLAMA_CPP_ACTIVATIONS = {"gpt_bigcode": "gelu", "nemotron": "relu2", "starcoder2": "gelu"}
"""What it computes for a family whatever the config says, by the first letters of the name."""


def runtimes(config: Mapping[str, Any], num_key_value_heads: int) -> list[dict[str, Any]]:
    """Say which runtimes will accept a checkpoint with that many KV heads.

    Args:
        config: The content of `config.json`.
        num_key_value_heads: Of the checkpoint to be served.

    Returns:
        For each runtime its name, whether it accepts the checkpoint, and a note.
    """
    model_type = config["model_type"]
    if model_type.startswith("gqa_"):
        note = "does not know this architecture, which only transformers has, with the checkpoint's own file"
        return [
            {
                "runtime": "transformers",
                "accepts": True,
                "note": "trust_remote_code=True, or `import uptrain` first",
            },
            *({"runtime": name, "accepts": False, "note": note} for name in ("vLLM", "llama.cpp")),
        ]
    is_mha = num_key_value_heads == config.get("num_attention_heads")
    vllm = is_mha or model_type not in _VLLM_IGNORES_KEY
    llama_cpp = is_mha or model_type not in _LLAMA_CPP_FIXED
    if model_type == "gpt_bigcode":
        llama_cpp = num_key_value_heads == 1
    llama_cpp_note = _LLAMA_CPP_FIXED.get(model_type, "")
    activation = config.get("hidden_act") or config.get("activation_function") or ""
    fixed = _LLAMA_CPP_ACTIVATIONS.get(model_type, activation)
    if not activation.startswith(fixed):
        llama_cpp = False
        llama_cpp_note = f"it computes {fixed} where this family has {activation}"
    vllm_note = (
        "its own class ignores the number of KV heads; use --model-impl transformers (not run)"
    )
    return [
        {"runtime": "transformers", "accepts": True, "note": "stock class, no remote code"},
        {
            "runtime": "vLLM",
            "accepts": vllm,
            "note": "from its source, not run" if vllm else vllm_note,
        },
        {
            "runtime": "llama.cpp",
            "accepts": llama_cpp,
            "note": "if it knows the family; from its source, not run"
            if llama_cpp
            else llama_cpp_note,
        },
    ]
