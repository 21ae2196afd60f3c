"""Which family a config is, and how many heads it has."""

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig

from uptrain.errors import CheckpointError, UnsupportedFamilyError, one_line
from uptrain.families.schema import Family, Heads, Layout

_QKV = {"self_attn.qkv_proj": Layout.CONCATENATED}

FAMILIES: dict[str, Family] = {
    "phi3": Family(fused=_QKV),
    "dbrx": Family(
        kv_key="attn_config.kv_n_heads", fused={"norm_attn_norm.attn.Wqkv": Layout.CONCATENATED}
    ),
    "falcon": Family(
        kv_key="num_kv_heads",
        fused={"self_attention.query_key_value": Layout.GROUPED},
        requires={"new_decoder_architecture": True},
        refusal="only falcon's new decoder architecture has a number of KV heads, and rewriting the "
        "older one into it is not available yet",
    ),
    "inkling_text": Family(other_kv_keys=("swa_num_key_value_heads",)),
    "gpt_bigcode": Family(
        kv_key="multi_query", kv_key_is_flag=True, fused={"attn.c_attn": Layout.GROUPED}
    ),
    "moonshine": Family(
        refusal="transformers reshapes its queries by the number of KV heads, so that only as many "
        "KV heads as query heads can run"
    ),
    "jetmoe": Family(
        refusal="its attention is a mixture of experts whose query heads are tied to the KV heads"
    ),
    "zaya": Family(
        refusal="it convolves queries and keys together and keeps a scale for each KV head"
    ),
}

_KERNELS = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}

# Other keys that some runtimes read instead; where a config has them they must say the same.
_KV_KEY_ALIASES = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")


def parse_config(
    config: Mapping[str, Any], code: Path | None = None
) -> transformers.PretrainedConfig:
    """Let transformers read a config.

    Args:
        config: The content of `config.json`.
        code: The checkpoint's folder if its own Python code may be executed, else None.

    Raises:
        UnsupportedFamilyError: If transformers does not know the `model_type`.
        CheckpointError: If transformers does not accept a value.
    """
    return _parse_config(json.dumps(config), code)


@lru_cache(maxsize=64)
def _parse_config(config_json: str, code: Path | None) -> transformers.PretrainedConfig:
    config = json.loads(config_json)
    model_type = config["model_type"]
    try:
        with quiet():
            if code is not None and "auto_map" in config:
                cls = type(AutoConfig.from_pretrained(code, trust_remote_code=True))
            elif model_type in CONFIG_MAPPING:
                cls = CONFIG_MAPPING[model_type]
            else:
                hint = (
                    "it brings its own code: read it, then pass --trust-remote-code"
                    if "auto_map" in config
                    else "check the model_type, or upgrade transformers"
                )
                raise UnsupportedFamilyError(
                    f"{model_type}: is not a model type of transformers {transformers.__version__}; {hint}"
                )
            # transformers 5 writes infinities as {"__float__": "Infinity"}.
            decode = getattr(cls, "_decode_special_floats", dict)
            # Of no consequence for shapes, and a way to have code fetched from the hub.
            for key in _KERNELS & config.keys():
                del config[key]
            parsed = cls.from_dict(decode(config))
            if code is not None:
                parsed._name_or_path = str(code)
            return parsed
    except UnsupportedFamilyError:
        raise
    except Exception as error:  # each config class validates in its own way
        raise CheckpointError(
            f"config.json: transformers {transformers.__version__} rejects it as {model_type} "
            f"({one_line(error)}); take config.json from the original checkpoint"
        ) from error


def family_of(config: Mapping[str, Any], code: Path | None = None) -> Family:
    """Say how a config's family states its number of key/value heads.

    Raises:
        UnsupportedFamilyError: If the family has no such setting, or cannot be converted.
    """
    model_type = config["model_type"]
    family = FAMILIES.get(model_type, Family())
    if family.refusal and not (
        family.requires and all(config.get(key) == value for key, value in family.requires.items())
    ):
        raise UnsupportedFamilyError(f"{model_type}: cannot be converted: {family.refusal}")
    overrides = config.get("per_layer_config")
    layers = overrides.values() if isinstance(overrides, dict) else ()
    if any(isinstance(layer, dict) and "num_key_value_heads" in layer for layer in layers):
        raise UnsupportedFamilyError(
            f"{model_type}: cannot be converted yet: its layers have different numbers of KV heads"
        )
    if _lookup(parse_config(config, code), family.kv_key) is None:
        part = _part_with_heads(parse_config(config, code))
        raise UnsupportedFamilyError(
            f"{model_type}: cannot be converted yet: its KV heads are set in {part}, and models of several "
            "parts are not covered"
            if part
            else f"{model_type}: cannot be converted yet: transformers has no number of KV heads for "
            "this family; it needs a rewrite into another one"
        )
    return family


def read_heads(config: Mapping[str, Any], code: Path | None = None) -> Heads:
    """Read the head counts of a config, defaults filled in as transformers fills them.

    Raises:
        UnsupportedFamilyError: If the family cannot be converted.
        CheckpointError: If a count is no positive integer, or KV heads do not divide query heads.
    """
    family = family_of(config, code)
    parsed = parse_config(config, code)
    num_attention_heads = getattr(parsed, "num_attention_heads", None)
    value = _lookup(parsed, family.kv_key)
    count = (1 if value else num_attention_heads) if family.kv_key_is_flag else value
    for key, number in (("num_attention_heads", num_attention_heads), (family.kv_key, count)):
        if type(number) is not int or not 0 < number < 2**20:
            raise CheckpointError(
                f"config.json: {key} is {json.dumps(number, default=str)}, expected a positive integer; "
                "take config.json from the original checkpoint"
            )
    assert isinstance(num_attention_heads, int)
    assert isinstance(count, int)
    for key in family.other_kv_keys:
        if _lookup(parsed, key) != count:
            raise UnsupportedFamilyError(
                f"{config['model_type']}: cannot be converted yet: {key} is {_lookup(parsed, key)}, "
                f"{family.kv_key} {count}; layers with different numbers of KV heads are not covered"
            )
    if num_attention_heads % count:
        raise CheckpointError(
            f"config.json: {count} KV heads do not divide {num_attention_heads} query heads; "
            "take config.json from the original checkpoint"
        )
    return Heads(num_attention_heads, count)


def with_key_value_heads(
    config: Mapping[str, Any], count: int, code: Path | None = None
) -> dict[str, Any]:
    """Return a copy of a config in which only the number of key/value heads differs."""
    family = family_of(config, code)
    changed = copy.deepcopy(dict(config))
    *path, key = family.kv_key.split(".")
    owner = changed
    for part in path:
        owner = owner.setdefault(part, {})
    if family.kv_key_is_flag:
        owner[key] = count == 1
    else:
        owner[key] = count
    for other in family.other_kv_keys:
        changed[other] = count
    for level in (changed, owner):
        for alias in _KV_KEY_ALIASES:
            if isinstance(level.get(alias), int):
                level[alias] = count
    return changed


def checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Read the dtype that a config states for its weights; float32 where it states none."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _lookup(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = getattr(config, part, None)
    return config


def _part_with_heads(config: Any) -> str | None:
    for part in getattr(type(config), "sub_configs", {}):
        if getattr(getattr(config, part, None), "num_key_value_heads", None) is not None:
            return f"{part}.num_key_value_heads"
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks on configs away: what matters of them is raised here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
