"""Which tensors follow the number of key/value heads, and which numbers a checkpoint can go to.

The tensors are not listed by hand: transformers builds the class on the meta device with the old and
the new value of the key, and the shapes that differ are the answer. A tensor that differs without a
rule is refused by name.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uptrain.errors import CheckpointError, HeadCountError, UnsupportedFamilyError
from uptrain.families.meta import tensor_shapes
from uptrain.families.registry import (
    checkpoint_dtype,
    family_of,
    parse_config,
    read_heads,
    with_key_value_heads,
)
from uptrain.families.schema import Family, Heads, HeadTensor, Layout

_INERT = (
    "no tensor follows its number of KV heads (latent attention, or no attention layer at all), "
    "so there is nothing to merge"
)


def possible_head_counts(config: Mapping[str, Any], code: Path | None = None) -> list[int]:
    """List the numbers of KV heads that a checkpoint can be converted to, itself included.

    Counts that transformers refuses for the family (an odd one for diffllama, say) are left out.
    """
    K = read_heads(config, code).num_key_value_heads
    return [n for n in range(1, K + 1) if can_have_heads(config, n, code)]


def can_have_heads(config: Mapping[str, Any], count: int, code: Path | None = None) -> bool:
    """Say whether a checkpoint can be converted to `count` KV heads."""
    K = read_heads(config, code).num_key_value_heads
    if not 0 < count <= K or K % count:
        return False
    if family_of(config, code).kv_key_is_flag and count not in (1, K):
        return False
    return count == K or _builds(with_key_value_heads(config, count, code), code)


def head_tensors(
    config: Mapping[str, Any],
    count: int,
    shapes: Mapping[str, tuple[int, ...]],
    code: Path | None = None,
) -> list[HeadTensor]:
    """Find the tensors of a checkpoint whose shape follows the number of key/value heads.

    Args:
        config: The content of `config.json`.
        count: The wanted number of KV heads.
        shapes: Shape of every tensor of the checkpoint, by its name in the file.
        code: The checkpoint's folder if its own Python code may be executed.

    Returns:
        The tensors in the order of `shapes`, each with its layout, old and new shape.

    Raises:
        UnsupportedFamilyError: If none depends on it, or one that does has no rule.
        CheckpointError: If the checkpoint lacks one of them, or its shape contradicts the config.
        HeadCountError: If transformers cannot build the family with `count` KV heads.
    """
    model_type, family = config["model_type"], family_of(config, code)
    heads = read_heads(config, code)
    old = tensor_shapes(config, code)
    try:
        new = tensor_shapes(with_key_value_heads(config, count, code), code)
    except CheckpointError as error:
        raise HeadCountError(
            f"num_key_value_heads={count}: transformers cannot build {model_type} with it ({error}); "
            f"choose one of {_or_list(possible_head_counts(config, code))}"
        ) from error
    changed = [name for name in old if old[name] != new.get(name)]
    changed += [name for name in new if name not in old]
    if not changed and count != heads.num_key_value_heads:
        raise UnsupportedFamilyError(f"{model_type}: cannot be converted: {_INERT}")
    found = _names_on_disk(changed, old, shapes)
    tensors = []
    for name in changed:
        layout = _layout(name, old.get(name), new.get(name), heads, count, family)
        if layout is None:
            raise UnsupportedFamilyError(
                f"{model_type}: cannot be converted yet: tensor {name} follows the number of KV heads "
                f"({_shape(old.get(name))} → {_shape(new.get(name))}) and has no rule"
            )
        tensor = HeadTensor(found[name], layout, old[name], new[name])
        _check_head_size(tensor, heads, config, code)
        tensors.append(tensor)
    order = {name: position for position, name in enumerate(shapes)}
    return sorted(tensors, key=lambda tensor: order[tensor.name])


def check_shapes(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], code: Path | None = None
) -> None:
    """Refuse tensors that contradict the config, before a model of its size is built.

    Raises:
        CheckpointError: If there are fewer tensors than layers, a tensor has another shape than the
            config asks for, or layers that the config does not know have KV heads.
    """
    layers = getattr(parse_config(config, code), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(shapes):
        raise CheckpointError(
            f"config.json: num_hidden_layers is {layers}, the checkpoint has {len(shapes)} tensors; "
            "config and weights do not belong together, fetch both again"
        )
    expected = tensor_shapes(config, code)
    patterns = {re.sub(r"\d+", "0", name) for name in expected}
    for name, shape in shapes.items():
        if name in expected and shape != expected[name]:
            raise CheckpointError(
                f"tensor {name} has shape {_shape(shape)}, config.json asks for {_shape(expected[name])}; "
                "config and weights do not belong together, fetch both again"
            )
        if name not in expected and re.sub(r"\d+", "0", name) in patterns:
            raise CheckpointError(
                f"tensor {name} belongs to a layer that config.json does not have; "
                "config and weights do not belong together, fetch both again"
            )


def kv_cache_bytes_per_token(config: Mapping[str, Any], code: Path | None = None) -> int:
    """Count the bytes that one token takes in the KV cache, in the checkpoint's own dtype.

    Counted from the rows of the key and value projections; for a family without a number of KV
    heads, from the hidden sizes that the config states.
    """
    try:
        heads = read_heads(config, code)
        other = _another_count(config, heads, code)
        changed = head_tensors(config, other, tensor_shapes(config, code), code)
        rows = sum(_cached_rows(tensor, heads) for tensor in changed if tensor.is_projection)
    except UnsupportedFamilyError:
        parsed = parse_config(config, code)
        text = parsed.get_text_config(decoder=True)
        if not getattr(text, "num_attention_heads", None):
            return 0  # no attention, as in a state-space model
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        count = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        rows = 2 * text.num_hidden_layers * count * size
    return rows * checkpoint_dtype(config).itemsize


def _names_on_disk(
    changed: list[str], old: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Match tensors by name, else by what follows the stack of layers (`layers.3.self_attn…`)."""
    by_tail: dict[str, list[str]] = {}
    for name in shapes:
        by_tail.setdefault(_tail(name), []).append(name)
    found = {}
    for name in changed:
        candidates = [name] if name in shapes else by_tail.get(_tail(name), [])
        if len(candidates) != 1:
            finding = f"has {len(candidates)} that could be" if candidates else "lacks"
            raise CheckpointError(
                f"the checkpoint {finding} tensor {name}, which its config.json asks for; "
                "config and weights do not belong together"
            )
        found[name] = candidates[0]
        if name in old and shapes[candidates[0]] != old[name]:
            raise CheckpointError(
                f"tensor {candidates[0]} has shape {_shape(shapes[candidates[0]])}, config.json asks for "
                f"{_shape(old[name])}; config and weights do not belong together"
            )
    return found


def _tail(name: str) -> str:
    match = re.search(r"[^.]+\.\d+\..*", name)
    return match.group() if match else name


def _layout(
    name: str,
    old: tuple[int, ...] | None,
    new: tuple[int, ...] | None,
    heads: Heads,
    count: int,
    family: Family,
) -> Layout | None:
    if old is None or new is None or len(old) != len(new) or old[1:] != new[1:]:
        return None
    for module, layout in family.fused.items():
        if f".{module}." in name:
            return layout
    K = heads.num_key_value_heads
    is_rows_of_heads = old[0] % K == 0 and old[0] // K * count == new[0]
    return Layout.SEPARATE if is_rows_of_heads else None


def _check_head_size(
    tensor: HeadTensor, heads: Heads, config: Mapping[str, Any], code: Path | None
) -> None:
    """Refuse layers whose number of KV heads is a multiple of the config's, as in mimo_v2_flash."""
    if tensor.layout is not Layout.SEPARATE or not tensor.is_projection:
        return
    parsed = parse_config(config, code)
    sizes = {
        getattr(parsed, key, None)
        for key in ("head_dim", "v_head_dim", "swa_head_dim", "global_head_dim")
    }
    sizes.add(parsed.hidden_size // heads.num_attention_heads)
    rows = tensor.source_shape[0] // heads.num_key_value_heads
    if rows not in sizes:
        raise UnsupportedFamilyError(
            f"{config['model_type']}: cannot be converted yet: tensor {tensor.name} has {rows} rows for each "
            "KV head, which is no head size of the config; layers with different numbers of KV heads are "
            "not covered"
        )


def _another_count(config: Mapping[str, Any], heads: Heads, code: Path | None) -> int:
    """Find a number of KV heads, other than its own, that the family can be built with."""
    H, K = heads.num_attention_heads, heads.num_key_value_heads
    for count in (1, H, *(n for n in range(2, H) if H % n == 0)):
        if count != K and _builds(with_key_value_heads(config, count, code), code):
            return count
    raise UnsupportedFamilyError(
        f"{config['model_type']}: has a single possible number of KV heads"
    )


def _cached_rows(tensor: HeadTensor, heads: Heads) -> int:
    H, K = heads.num_attention_heads, heads.num_key_value_heads
    rows = tensor.source_shape[0]
    return rows if tensor.layout is Layout.SEPARATE else rows // (H + 2 * K) * 2 * K


def _builds(config: Mapping[str, Any], code: Path | None) -> bool:
    try:
        tensor_shapes(config, code)
    except CheckpointError:
        return False
    return True


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " × ".join(map(str, shape))


def _or_list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
