"""Which family a config is, and how many heads its parts have."""

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig

from uptrain.errors import CheckpointError, UnsupportedFamilyError, one_line
from uptrain.families.rules import FAMILIES
from uptrain.families.schema import Family, Heads, KVSetting

_KERNELS = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}

# Other keys that some runtimes read instead; where a config has them they must say the same.
_KV_KEY_ALIASES = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")

_LAYERS = "per_layer_config"
ABSENT = object()


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


def family_of(
    config: Mapping[str, Any], code: Path | None = None, *, encoder: bool = False
) -> Family:
    """Say how a config's family states its numbers of key/value heads.

    Args:
        config: The content of `config.json`.
        code: The checkpoint's folder if its own Python code may be executed.
        encoder: Whether the keys of an encoder count, too.

    Raises:
        UnsupportedFamilyError: If the family has no such setting, or cannot be converted.
    """
    model_type, parsed = config["model_type"], parse_config(config, code)
    family = _rules(parsed)
    text = getattr(parsed, "text_config", None)
    key = family.kv_keys[0]
    if model_type not in FAMILIES and look_up(parsed, key) is ABSENT and text is not None:
        within = _rules(text)
        keys = tuple(f"text_config.{key}" for key in within.kv_keys)
        family = replace(within, kv_keys=keys)
    if family.refusal:
        raise UnsupportedFamilyError(f"{model_type}: cannot be converted: {family.refusal}")
    if look_up(parsed, family.kv_keys[0]) is ABSENT:
        raise UnsupportedFamilyError(
            f"{model_type}: cannot be converted yet: transformers has no number of KV heads for this "
            "family; it needs a rewrite into another one"
        )
    return replace(family, kv_keys=family.kv_keys + family.encoder_kv_keys) if encoder else family


def kv_settings(
    config: Mapping[str, Any], code: Path | None = None, *, encoder: bool = False
) -> list[KVSetting]:
    """Read the head counts of all parts of a config, defaults filled in as transformers fills them.

    Args:
        config: The content of `config.json`.
        code: The checkpoint's folder if its own Python code may be executed.
        encoder: Whether an encoder counts, too.

    Returns:
        Keys by the counts that they stand for, those of the most KV heads first.

    Raises:
        UnsupportedFamilyError: If the family cannot be converted.
        CheckpointError: If a count is no positive integer, or KV heads do not divide query heads.
    """
    family, parsed = family_of(config, code, encoder=encoder), parse_config(config, code)
    keys: dict[Heads, list[str]] = {}
    for path in _paths(config, family):
        value = _read(config, parsed, path)
        if value is ABSENT or (value is None and path != family.kv_keys[0]):
            continue  # not a part of this checkpoint
        query_key, num_attention_heads = _query_heads(config, parsed, path, family.query_key)
        count = num_attention_heads if value is None else value
        if family.is_flag:
            count = 1 if value else num_attention_heads
        for key, number in ((query_key, num_attention_heads), (path, count)):
            if type(number) is not int or not 0 < number < 2**20:
                raise CheckpointError(
                    f"config.json: {key} is {json.dumps(number, default=str)}, expected a positive integer; "
                    "take config.json from the original checkpoint"
                )
        if num_attention_heads % count:
            raise CheckpointError(
                f"config.json: {count} KV heads do not divide {num_attention_heads} query heads; "
                "take config.json from the original checkpoint"
            )
        keys.setdefault(Heads(num_attention_heads, count), []).append(path)
    settings = [KVSetting(tuple(paths), heads) for heads, paths in keys.items()]
    _check_layers(config, parsed, family, settings)
    return sorted(settings, key=lambda setting: -setting.heads.num_key_value_heads)


def read_heads(
    config: Mapping[str, Any], code: Path | None = None, *, encoder: bool = False
) -> Heads:
    """Read the head counts of a config, of the part with the most KV heads if they differ.

    Raises:
        UnsupportedFamilyError: As `kv_settings`.
        CheckpointError: As `kv_settings`.
    """
    return kv_settings(config, code, encoder=encoder)[0].heads


def with_key_value_heads(
    config: Mapping[str, Any], count: int, code: Path | None = None, *, encoder: bool = False
) -> dict[str, Any]:
    """Return a copy of a config in which only the numbers of key/value heads differ.

    No part gets more than it has: one with fewer than `count` keeps its own number.
    """
    changed = copy.deepcopy(dict(config))
    for setting in kv_settings(config, code, encoder=encoder):
        if setting.heads.num_key_value_heads > count:
            changed = with_setting(changed, setting, count, code)
    return changed


def with_setting(
    config: Mapping[str, Any], setting: KVSetting, count: int, code: Path | None = None
) -> dict[str, Any]:
    """Return a copy of a config in which one setting has another number of key/value heads."""
    family = family_of(config, code)
    changed = copy.deepcopy(dict(config))
    value = count == 1 if family.is_flag else count
    for path in setting.keys:
        *parts, key = path.split(".")
        if parts and parts[0] not in changed:
            # Older wrappers keep the keys of their text model at the top.
            flat = {**changed, key: value}
            if look_up(parse_config(flat, code), path) == value:
                parts, changed = [], flat
        owner = changed
        for part in parts:
            owner = owner.setdefault(part, {})
        owner |= {key: value, **family.sets}
        for level in (changed, owner):
            for alias in _KV_KEY_ALIASES:
                if level.get(alias) == setting.heads.num_key_value_heads:
                    level[alias] = count
    return changed


def part_of(config: Mapping[str, Any], key: str, code: Path | None = None) -> Any:
    """Give the innermost part around a key that states a hidden size, as transformers reads it."""
    parsed = parse_config(config, code)
    owner = key.split(f"{_LAYERS}.")[0].rpartition(".")[0]
    while owner and look_up(parsed, f"{owner}.hidden_size") is ABSENT:
        owner = owner.rpartition(".")[0]
    return look_up(parsed, owner) if owner else parsed


def head_sizes(part: Any, num_attention_heads: int) -> set[int]:
    """List the sizes of a head that a part of a config states."""
    stated = part.to_dict()
    levels = [stated, *(stated.get(_LAYERS) or {}).values()]
    sizes = {v for level in levels for k, v in level.items() if k.endswith("head_dim")}
    sizes |= {part.hidden_size // num_attention_heads}
    sizes |= {look_up(part, "head_dim")}  # t5's has another name in its JSON
    return {size for size in sizes if isinstance(size, int)}


def look_up(config: Any, path: str) -> Any:
    """Read a dotted path from a config or from its JSON; `ABSENT` if it leads nowhere."""
    for part in path.split("."):
        if isinstance(config, Mapping):
            config = config.get(part, ABSENT)
            continue
        try:
            config = getattr(config, part, ABSENT)
        except RuntimeError:  # transformers does not say what single layers override
            config = vars(config).get(part, ABSENT)
    return config


def checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Read the dtype that a config states for its weights; float32 where it states none."""
    levels = [config, config.get("text_config") or {}]
    stated = [level.get(key) for level in levels for key in ("dtype", "torch_dtype")]
    name = next(filter(None, stated), "float32")
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _rules(parsed: Any) -> Family:
    """Find the first form of a family that a config has."""
    found = FAMILIES.get(parsed.model_type, ())
    for family in found if isinstance(found, tuple) else (found,):
        if all(look_up(parsed, key) == value for key, value in family.when.items()):
            return family
    return Family()


def _paths(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    """List a family's keys, and those of single layers that have a number of their own."""
    for key in family.kv_keys:
        yield key
        owner, _, leaf = key.rpartition(".")
        layers = look_up(config, f"{owner}.{_LAYERS}".lstrip("."))
        for index in layers if isinstance(layers, dict) else ():
            if isinstance(layers[index], dict) and leaf in layers[index]:
                yield f"{owner}.{_LAYERS}.{index}.{leaf}".lstrip(".")


def _read(config: Mapping[str, Any], parsed: Any, path: str) -> Any:
    """Read what transformers makes of a key, or the key itself if it keeps it under another name."""
    value = look_up(parsed, path)
    return look_up(config, path) if value is ABSENT else value


def _query_heads(
    config: Mapping[str, Any], parsed: Any, path: str, query_key: str | None
) -> tuple[str, Any]:
    """Find the number of query heads that goes with a key: beside it, or in the part around it."""
    owner, _, leaf = path.rpartition(".")
    own = leaf.replace("num_key_value_heads", "num_attention_heads")
    candidates = [query_key] if query_key else []
    candidates += [f"{owner}.{own}"] if own != leaf else []
    while owner:
        candidates.append(f"{owner}.num_attention_heads")
        owner = owner.rpartition(".")[0]
    candidates.append("num_attention_heads")
    for candidate in candidates:
        value = _read(config, parsed, candidate.lstrip("."))
        if value is not ABSENT:
            return candidate.lstrip("."), value
    return candidates[-1], None


def _check_layers(
    config: Mapping[str, Any], parsed: Any, family: Family, settings: list[KVSetting]
) -> None:
    """Refuse layers with a number of KV heads that none of the keys states."""
    owner = family.kv_keys[0].rpartition(".")[0]
    part = look_up(parsed, owner) if owner else parsed
    overrides = part.to_dict().get(_LAYERS) if hasattr(part, "to_dict") else None
    counts = {setting.heads.num_key_value_heads for setting in settings}
    for index, layer in (overrides or {}).items():
        count = layer.get("num_key_value_heads") if isinstance(layer, dict) else None
        if count is not None and count not in counts:
            raise UnsupportedFamilyError(
                f"{config['model_type']}: cannot be converted: layer {index} has {count} KV heads, which no "
                "key of its config.json says; use it as it is"
            )


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
