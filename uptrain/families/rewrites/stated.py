"""Configs of families that transformers knows only by code of their checkpoints' own, read as they are.

Such families are told by the names in `config.json` and rewritten by the layout of their tensors; none
of their code is run. A config that does not state what that code reads, or states what the target cannot
do, is refused.
"""

import json
from collections.abc import Mapping
from typing import Any

from uptrain.errors import CheckpointError, UnsupportedFamilyError
from uptrain.families.rewrites.recipe import rotary_keys, stated_keys
from uptrain.families.schema import Heads

LOST: tuple[str, ...] = (
    "methods of the original's own code, such as chat(), stay behind with it",
    "transformers cannot load the original without its code: for a reference or a teacher, convert it "
    "with all of its KV heads, too",
)
GATED_MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def class_name(config: Mapping[str, Any], *known: str) -> str:
    """Find the class that a config names, of those whose layout is known.

    Raises:
        UnsupportedFamilyError: If it names another one.
    """
    mapped = (config.get("auto_map") or {}).values()
    named = config.get("architectures") or [str(path).rpartition(".")[2] for path in mapped]
    found = next((name for name in named if name in known), None)
    if found is None:
        raise UnsupportedFamilyError(
            f"its config.json names {', '.join(named) or 'no class'}, known are {', '.join(known)}"
        )
    return str(found)


def check(config: Mapping[str, Any], needs: Mapping[str, tuple[Any, str]], target: str) -> None:
    """Refuse what the target cannot express; what a config does not state is as it needs to be.

    Args:
        config: The content of `config.json`.
        needs: By key the value that it needs to have, and what another one means.
        target: The family to be rewritten into.

    Raises:
        UnsupportedFamilyError: If a key has another value.
    """
    for key, (needed, finding) in needs.items():
        if config.get(key, needed) != needed:
            raise UnsupportedFamilyError(
                f"{target} cannot express {key}={json.dumps(config[key])}: {finding}"
            )


def count(config: Mapping[str, Any], *names: str) -> int:
    """Read a size, by the first of its names that is there.

    Raises:
        CheckpointError: If it is not there, or is no positive integer.
    """
    return int(_stated(config, names, (int,), "a positive integer"))


def number(config: Mapping[str, Any], name: str) -> float:
    """Read a number.

    Raises:
        CheckpointError: If it is not there, or is no positive number.
    """
    return float(_stated(config, (name,), (int, float), "a positive number"))


def flag(config: Mapping[str, Any], name: str) -> bool:
    """Read a boolean.

    Raises:
        CheckpointError: If it is not there, or is no boolean.
    """
    return bool(_stated(config, (name,), (bool,), "true or false"))


def part(config: Mapping[str, Any], name: str, default: Mapping[str, Any]) -> dict[str, Any]:
    """Read an object; where it is not there, or null, it is the default.

    Raises:
        CheckpointError: If it is something else.
    """
    present = config if config.get(name) is not None else {name: dict(default)}
    return dict(_stated(present, (name,), (dict,), "an object"))


def llama_keys(config: Mapping[str, Any], heads: Heads, **others: Any) -> dict[str, Any]:
    """State for llama, under the same names, what a config of its kind states."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return {
        **stated_keys(config, "llama"),
        **{key: count(config, key) for key in sizes},
        "num_attention_heads": heads.num_attention_heads,
        "num_key_value_heads": heads.num_key_value_heads,
        "hidden_act": config.get("hidden_act", "silu"),
        "max_position_embeddings": count(config, "max_position_embeddings"),
        "initializer_range": config.get("initializer_range", 0.02),
        "rms_norm_eps": number(config, "rms_norm_eps"),
        **others,
    }


def rope_keys(
    rope_theta: float, rope_type: str = "default", factor: float | None = None
) -> dict[str, Any]:
    """State rotary positions of whole heads as `rotary_keys`."""
    scaling = {} if factor is None else {"factor": float(factor)}
    return rotary_keys({"rope_type": rope_type, "rope_theta": float(rope_theta), **scaling})


def _stated(
    config: Mapping[str, Any], names: tuple[str, ...], kinds: tuple[type, ...], expected: str
) -> Any:
    name = next((name for name in names if name in config), names[0])
    value: Any = config.get(name)
    if type(value) not in kinds or (type(value) in (int, float) and value <= 0):
        raise CheckpointError(
            f"config.json: {name} is {json.dumps(value)}, expected {expected}; take config.json from the "
            "original checkpoint"
        )
    return value
