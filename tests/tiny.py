"""Tiny random checkpoints of every family, built in memory by stock transformers."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
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
    # Of encoders, and of the towers of models that also see or hear.
    "num_heads": H,
    "depth": LAYERS,
    "embed_dim": H * D,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": H,
    "decoder_attention_heads": H,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "cross_num_attention_heads": H,
    "cross_num_key_value_heads": H,
    "cross_head_dim": D,
    "cross_hidden_size": H * D,
    "out_hidden_size": H * D,
    "output_dim": H * D,
    "vision_output_dim": H * D,
    "projection_dim": H * D,
    "max_source_positions": 32,
    "max_target_positions": 64,
    "num_mel_bins": 16,
    "conv_kernel_size": 3,
    "image_size": 32,
    "patch_size": 8,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


# Where transformers lists the class that a config belongs to, in the order in which it is looked up.
AUTO_CLASSES = tuple(
    getattr(transformers, name)
    for name in (
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForSeq2SeqLM",
        "AutoModelForSpeechSeq2Seq",
        "AutoModelForMultimodalLM",
        "AutoModelForMaskedLM",
        "AutoModel",
    )
    if hasattr(transformers, name)  # transformers 4 has no AutoModelForMultimodalLM
)


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A config of `model_type` with 4 query and 4 KV heads of 16 in all its parts, in float64."""
    config = _small_config(CONFIG_MAPPING[model_type], overrides)
    config.dtype = "float64"
    return config


def _small_config(cls: Any, overrides: dict[str, Any]) -> Any:
    attribute_map = getattr(cls, "attribute_map", {})
    default = cls()
    known = set(default.to_dict()) | set(attribute_map)
    # Under the name that the class stores, not under an alias of it as well.
    small = {k: v for k, v in _SMALL.items() if k in known and attribute_map.get(k) not in _SMALL}
    for part in cls.sub_configs:
        of_default = getattr(default, part, None)
        own = overrides.get(part, {})
        if own is not None and "model_type" in own:
            small[part] = _small_config(CONFIG_MAPPING[own["model_type"]], own)
        elif own is not None and isinstance(of_default, transformers.PretrainedConfig):
            small[part] = _small_config(type(of_default), own)
    flat = {key: value for key, value in overrides.items() if key not in small or key in _SMALL}
    return cls(**{**small, **flat})


def tiny_model(config: Any, seed: int = 0) -> Any:
    """A float64 model whose every parameter matters: norms and biases are not left at 1 and 0."""
    torch.manual_seed(seed)
    cls = model_class(config)
    config.architectures = [cls.__name__]
    config._experts_implementation = "eager"
    model = cls._from_config(config, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def model_class(config: Any) -> Any:
    """The class that `architectures` names, else the first that transformers has for the config."""
    if config.architectures:
        return getattr(transformers, config.architectures[0])
    found = next(auto for auto in AUTO_CLASSES if type(config) in auto._model_mapping)
    cls = found._model_mapping[type(config)]
    return cls[0] if isinstance(cls, tuple) else cls


def save(model: Any, folder: Path) -> Path:
    """Save as a user would have it."""
    model.save_pretrained(folder)
    return folder


def give_tokenizer(folder: Path) -> Path:
    """Put a tokenizer of printable characters beside a checkpoint, none of them a special token."""
    vocabulary = {f"<{index}>": index for index in range(20)}
    vocabulary |= {chr(code): code - 12 for code in range(32, 123)}
    model = models.WordLevel(vocabulary, unk_token="<19>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<19>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
