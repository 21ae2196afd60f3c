"""Which tensors follow the number of key/value heads, and which numbers a checkpoint can go to.

The tensors are not listed by hand: transformers builds the class on the meta device with the old and
the new value of the key, and the shapes that differ are the answer. A tensor that differs without a
rule is refused by name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from uptrain.errors import CheckpointError, HeadCountError, UnsupportedFamilyError
from uptrain.families.meta import names_on_disk, tensor_shapes
from uptrain.families.registry import (
    checkpoint_dtype,
    family_of,
    head_sizes,
    kv_settings,
    look_up,
    parse_config,
    part_of,
    read_heads,
    with_key_value_heads,
    with_setting,
)
from uptrain.families.schema import Family, Heads, HeadTensor, KVSetting, Layout

Shapes = Mapping[str, tuple[int, ...]]

_INERT = (
    "no tensor follows its number of KV heads (latent attention, or no attention layer at all), "
    "so there is nothing to merge; use it as it is"
)


def possible_head_counts(
    config: Mapping[str, Any], code: Path | None = None, *, encoder: bool = False
) -> list[int]:
    """List the numbers of KV heads that a checkpoint can be converted to, itself included.

    Counts that transformers refuses for the family (an odd one for diffllama, say) are left out.
    """
    K = read_heads(config, code, encoder=encoder).num_key_value_heads
    return [n for n in range(1, K + 1) if can_have_heads(config, n, code, encoder=encoder)]


def can_have_heads(
    config: Mapping[str, Any], count: int, code: Path | None = None, *, encoder: bool = False
) -> bool:
    """Say whether a checkpoint can be converted to `count` KV heads; parts with fewer keep theirs."""
    settings = kv_settings(config, code, encoder=encoder)
    numbers = [setting.heads.num_key_value_heads for setting in settings]
    if not 0 < count <= numbers[0] or any(K % min(K, count) for K in numbers):
        return False
    if family_of(config, code).is_flag and count not in (1, numbers[0]):
        return False
    changed = with_key_value_heads(config, count, code, encoder=encoder)
    return count == numbers[0] or _builds(changed, code)


def head_tensors(
    config: Mapping[str, Any],
    count: int,
    shapes: Shapes,
    code: Path | None = None,
    *,
    encoder: bool = False,
) -> list[HeadTensor]:
    """Find the tensors of a checkpoint whose shape follows the number of key/value heads.

    Args:
        config: The content of `config.json`.
        count: The wanted number of KV heads.
        shapes: Shape of every tensor of the checkpoint, by its name in the file.
        code: The checkpoint's folder if its own Python code may be executed.
        encoder: Whether those of an encoder count, too.

    Returns:
        The tensors in the order of `shapes`, each with its layout, old and new shape. Those of parts
        that have no more than `count` heads are not among them.

    Raises:
        UnsupportedFamilyError: If none depends on it, or one that does has no rule.
        CheckpointError: If the checkpoint lacks one of them, or its shape contradicts the config.
        HeadCountError: If transformers cannot build the family with `count` KV heads.
    """
    settings = kv_settings(config, code, encoder=encoder)
    K = settings[0].heads.num_key_value_heads
    wanted = [(setting, min(count, setting.heads.num_key_value_heads)) for setting in settings]
    found = _find(config, wanted, shapes, code)
    if not found and count < K:
        raise UnsupportedFamilyError(f"{config['model_type']}: cannot be converted: {_INERT}")
    return found


def all_head_tensors(
    config: Mapping[str, Any], shapes: Shapes, code: Path | None = None
) -> list[HeadTensor]:
    """Find the tensors that would follow any number of key/value heads, as `head_tensors`."""
    settings = kv_settings(config, code)
    wanted = [(setting, _another_count(config, setting, code)) for setting in settings]
    return _find(config, wanted, shapes, code)


def _find(
    config: Mapping[str, Any],
    wanted: Iterable[tuple[KVSetting, int]],
    shapes: Shapes,
    code: Path | None,
) -> list[HeadTensor]:
    """Compare shapes setting by setting, so that each tensor's own number of heads is known."""
    model_type, family = config["model_type"], family_of(config, code)
    old = tensor_shapes(config, code)
    tensors: dict[str, HeadTensor] = {}
    for setting, count in wanted:
        if count == setting.heads.num_key_value_heads:
            continue
        try:
            new = tensor_shapes(with_setting(config, setting, count, code), code)
        except CheckpointError as error:
            raise HeadCountError(
                f"num_key_value_heads={count}: transformers cannot build {model_type} with it ({error}); "
                f"choose one of {_or_list(possible_head_counts(config, code))}"
            ) from error
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        for name in changed:
            layout = _layout(name, old.get(name), new.get(name), setting.heads, count, family)
            if layout is None or name in tensors:
                raise UnsupportedFamilyError(
                    f"{model_type}: cannot be converted: tensor {name} follows the number of KV heads "
                    f"({_shape(old.get(name))} → {_shape(new.get(name))}) and has no rule; use it as it is"
                )
            if layout is Layout.LISTED:
                tensors |= _listed(name, old[name], setting.heads, count)
            else:
                heads = setting.heads
                tensor = HeadTensor(name, layout, old[name], new[name], heads, count, (name,))
                _check_head_size(tensor, setting, config, code)
                tensors[name] = tensor
    return _on_disk(tensors.values(), config, old, shapes, code)


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


def kv_cache_bytes_per_token(
    config: Mapping[str, Any], code: Path | None = None, count: int | None = None
) -> int:
    """Count the bytes that one token takes in the KV cache, in the checkpoint's own dtype.

    Counted from the rows of the key and value projections; for a family without a number of KV
    heads, from the hidden sizes that the config states.

    Args:
        config: The content of `config.json`.
        code: The checkpoint's folder if its own Python code may be executed.
        count: The number of KV heads to count for, by default the config's own.
    """
    try:
        count = count or read_heads(config, code).num_key_value_heads
        shapes = tensor_shapes(config, code)
        found = [t for t in all_head_tensors(config, shapes, code) if t.is_projection]
        rows = sum(_cached_rows(tensor, count, shapes) for tensor in found)
    except UnsupportedFamilyError:
        text = parse_config(config, code).get_text_config(decoder=True)
        H = look_up(text, "num_attention_heads")
        if not isinstance(H, int):
            return 0  # no attention, as in a state-space model
        size, K = look_up(text, "head_dim"), look_up(text, "num_key_value_heads")
        size = size if isinstance(size, int) else text.hidden_size // H
        rows = 2 * text.num_hidden_layers * (K if isinstance(K, int) else H) * size
    return rows * checkpoint_dtype(config).itemsize


def _on_disk(
    tensors: Iterable[HeadTensor],
    config: Mapping[str, Any],
    old: Shapes,
    shapes: Shapes,
    code: Path | None,
) -> list[HeadTensor]:
    """Put the names of the files in the place of those that transformers would save under."""
    tensors = list(tensors)
    needed = list(dict.fromkeys(name for t in tensors for name in (t.name, *t.members)))
    found = names_on_disk(needed, config, shapes, code)
    for name, disk in found.items():
        if shapes[disk] != old[name]:
            raise CheckpointError(
                f"tensor {disk} has shape {_shape(shapes[disk])}, config.json asks for "
                f"{_shape(old[name])}; config and weights do not belong together"
            )
    there = [
        replace(t, name=found[t.name], members=tuple(found[name] for name in t.members))
        for t in tensors
        if t.name in found
    ]
    order = {name: position for position, name in enumerate(shapes)}
    return sorted(there, key=lambda tensor: order[tensor.name])


def _layout(
    name: str,
    old: tuple[int, ...] | None,
    new: tuple[int, ...] | None,
    heads: Heads,
    count: int,
    family: Family,
) -> Layout | None:
    """Find a changed tensor's layout: the family's rule, or rows of heads; None if neither fits."""
    K = heads.num_key_value_heads
    for module, layout in family.layouts.items():
        if f".{module}." in name:
            return layout if old is not None else None
    if old is None or new is None or len(old) != len(new) or old[1:] != new[1:]:
        return None
    is_rows_of_heads = old[0] % K == 0 and old[0] // K * count == new[0]
    return Layout.SEPARATE if is_rows_of_heads else None


def _listed(name: str, shape: tuple[int, ...], heads: Heads, count: int) -> dict[str, HeadTensor]:
    """Give the tensors that are left of a list of one for each head, of which `name` is left out."""
    before, after = re.split(r"\.\d+(?=\.\w+$)", name)
    size = heads.num_key_value_heads // count
    tensors = {}
    for index in range(count):
        members = tuple(f"{before}.{index * size + i}{after}" for i in range(size))
        rows = (size * shape[0], *shape[1:])
        left = f"{before}.{index}{after}"
        # The members, one behind the other, are heads of which one is made.
        group = replace(heads, num_key_value_heads=size)
        tensors[left] = HeadTensor(left, Layout.LISTED, rows, shape, group, 1, members)
    return tensors


def _check_head_size(
    tensor: HeadTensor, setting: KVSetting, config: Mapping[str, Any], code: Path | None
) -> None:
    """Refuse layers whose number of KV heads is a multiple of the config's, as in mimo_v2_flash."""
    if tensor.layout is not Layout.SEPARATE or not tensor.is_projection:
        return
    sizes = {
        size
        for key in setting.keys
        for size in head_sizes(part_of(config, key, code), tensor.heads.num_attention_heads)
    }
    rows = tensor.source_shape[0] // tensor.heads.num_key_value_heads
    if rows not in sizes:
        raise UnsupportedFamilyError(
            f"{config['model_type']}: cannot be converted yet: tensor {tensor.name} has {rows} rows for each "
            "KV head, which is no head size of the config; layers with different numbers of KV heads are "
            "not covered"
        )


def _another_count(config: Mapping[str, Any], setting: KVSetting, code: Path | None) -> int:
    """Find a number of KV heads, other than its own, that a part can be built with."""
    H, K = setting.heads.num_attention_heads, setting.heads.num_key_value_heads
    for count in (1, H, *(n for n in range(2, H) if H % n == 0)):
        if count != K and _builds(with_setting(config, setting, count, code), code):
            return count
    raise UnsupportedFamilyError(
        f"{config['model_type']}: no other number of KV heads is possible, so that its attention cannot be told"
    )


def _cached_rows(tensor: HeadTensor, count: int, shapes: Shapes) -> int:
    """Count what a projection puts into the cache for one token, with at most `count` KV heads."""
    H, K = tensor.heads.num_attention_heads, tensor.heads.num_key_value_heads
    rows = tensor.source_shape[-1 if tensor.layout is Layout.COLUMNS else 0]
    if tensor.layout is not Layout.SEPARATE:
        rows = rows // (H + 2 * K) * 2 * K
    elif tensor.name.replace("k_proj", "v_proj") not in shapes:
        rows *= 2  # its keys are the values, too
    return rows // K * min(K, count)


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
