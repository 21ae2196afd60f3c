"""Tiny random checkpoints of every family, built in memory by stock transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

H, D, LAYERS, VOCAB = 4, 16, 2, 128

# Keys that several config classes share; each class gets those that it has.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": H * D,
    "n_embd": H * D,
    "d_model": H * D,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_inner": 48,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_attention_heads": H,
    "n_head": H,
    "n_heads": H,
    "num_key_value_heads": H,
    "head_dim": D,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "sliding_window": 32,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A config of `model_type` with 4 query and 4 KV heads of 16, in float64."""
    cls = CONFIG_MAPPING[model_type]
    attribute_map = getattr(cls, "attribute_map", {})
    known = set(cls().to_dict()) | set(attribute_map)
    # Under the name that the class stores, not under an alias of it as well.
    small = {k: v for k, v in _SMALL.items() if k in known and attribute_map.get(k) not in _SMALL}
    config = cls(**{**small, **overrides})
    config.dtype = "float64"
    return config


def tiny_model(config: Any, seed: int = 0) -> Any:
    """A float64 model whose every parameter matters: norms and biases are not left at 1 and 0."""
    torch.manual_seed(seed)
    name = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    names = name[config.model_type]
    cls = getattr(transformers, names if isinstance(names, str) else names[0])
    config.architectures = [cls.__name__]
    config._experts_implementation = "eager"
    model = cls._from_config(config, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save(model: Any, folder: Path) -> Path:
    """Save as a user would have it."""
    model.save_pretrained(folder)
    return folder
