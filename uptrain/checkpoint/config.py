"""`config.json`: what it must be before anything in it is believed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uptrain.checkpoint.files import CONFIG, check_link, read_json
from uptrain.checkpoint.tensors import TensorEntry
from uptrain.errors import CheckpointError, one_line

# Keys of a config by which transformers builds so many parts, one by one, and the most that is
# believed of them where the weights do not have as many tensors or rows.
_PARTS = re.compile("layer|expert|label|block|depth|stage|codebook")
_MAX_PARTS = 4096
_SIZES = re.compile(
    "(^|_)(hidden_size|intermediate_size|vocab_size|head_dim|heads|hidden_layers|n_layer|n_head"
    "|n_embd|n_positions|d_model|d_kv|d_ff|max_position_embeddings)$"
)
_MODEL_TYPE = re.compile(r"[\w.+-]{1,100}", re.ASCII)


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` as plain JSON.

    Raises:
        CheckpointError: If it is missing, is not a JSON object, names no `model_type`, has values that
            no model has, or says that the weights are quantised.
    """
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: is an adapter (it has adapter_config.json); merge it into its base model first"
        )
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no config.json; expected a checkpoint folder as save_pretrained writes it"
        )
    check_link(path, folder)
    config = read_json(path)
    for key, expected in _wrong_values(config):
        raise CheckpointError(
            f"{path}: {key} is {json.dumps(config.get(key))[:80]}, expected {expected}; "
            "take config.json from the original checkpoint"
        )
    for key, number in _numbers(config):
        if number != number:
            wrong = "NaN, expected a number"
        elif abs(number) >= 2**63 and isinstance(number, int):
            wrong = "an integer of more than 64 bits"
        elif number < 0 and _SIZES.search(key):
            wrong = f"{number}, expected a positive integer"
        else:
            continue
        raise CheckpointError(
            f"{path}: {one_line(key)} is {wrong}; take config.json from the original checkpoint"
        )
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            method = config[key].get("quant_method") if isinstance(config[key], dict) else None
            raise CheckpointError(
                f"{path}: the weights are quantised ({one_line(method or key)}), packed rows are not heads; "
                "dequantize the checkpoint and remove the key, or take the unquantised original"
            )
    return config


def _wrong_values(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the keys that are read before transformers checks the types, and are of a wrong one."""
    model_type = config.get("model_type")
    if not (isinstance(model_type, str) and _MODEL_TYPE.fullmatch(model_type)):
        yield "model_type", 'a name such as "llama"'
    names = config.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        yield "architectures", "names of model classes"
    for key in ("auto_map", "text_config"):
        if not isinstance(config.get(key) or {}, dict):
            yield key, "an object"
    for key, part in config.items():
        if isinstance(part, dict) and not isinstance(part.get("model_type", ""), str | None):
            yield key, "a model_type that is a name"


def check_parts(path: Path, config: dict[str, Any], tensors: dict[str, TensorEntry]) -> None:
    """Refuse a config that would have a model built of more parts than there can be."""
    rows = max((n for entry in tensors.values() for n in entry.shape), default=0)
    most = max(len(tensors), rows, _MAX_PARTS)
    for key, number in _numbers(config):
        if number > most and _PARTS.search(key) and not key.endswith("theta"):
            raise CheckpointError(
                f"{path}: {one_line(key)} is {number}, the checkpoint has {len(tensors)} tensors of at most "
                f"{rows} rows; config and weights do not belong together, fetch both again"
            )


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield every number of a config, however deep, under its key."""
    pending: list[tuple[str, Any]] = [("", config)]
    while pending:
        key, content = pending.pop()
        if isinstance(content, dict):
            pending += content.items()
        elif isinstance(content, list):
            pending += ((key, each) for each in content)
        elif isinstance(content, int | float):
            yield key, content
