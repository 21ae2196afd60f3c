"""Which lists of layers hold KV heads, and where each layer's attention blocks are."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.attention import AttentionNames, find_attention
from uptrain.errors import UnsupportedFamilyError
from uptrain.families import meta, registry
from uptrain.families.schema import HeadTensor, Layout

ENCODER, DECODER = "encoder", "decoder"

Blocks = dict[int, tuple[AttentionNames, ...]]
"""The attention blocks of each layer that has any."""


def find_stacks(
    checkpoint: Checkpoint, head_tensors: Mapping[str, HeadTensor], code: Path | None
) -> dict[str, Blocks]:
    """Find the attention blocks with KV heads, layer by layer.

    Args:
        checkpoint: The source.
        head_tensors: Its tensors that follow the number of KV heads, by name in the files.
        code: The checkpoint's folder if its own Python code may be executed.

    Returns:
        By the name of the list of layers, such as `model.layers`: one list, or those of an
        encoder-decoder's two halves, the encoder's first.

    Raises:
        UnsupportedFamilyError: If plain text does not make what the layers are given, if the blocks are
            in no list of layers, in several of one half, shared by layers, or as `find_attention`.
    """
    name = f"{checkpoint.name}: {checkpoint.config['model_type']}"
    if unread := registry.family_of(checkpoint.config, code).unread:
        raise UnsupportedFamilyError(
            f"{name} {unread}, so its layers cannot be run one by one on text; use --method mean without --calibration"
        )
    model = meta.build_on_meta(checkpoint.config, code)
    in_memory = meta.names_in_memory(model, checkpoint.tensors)
    otherwise = meta.stored_otherwise(model, head_tensors)
    found: dict[str, dict[int, dict[str, HeadTensor]]] = {}
    for disk, stored in head_tensors.items():
        members = tuple(in_memory.get(member, "") for member in stored.members)
        computed = {in_memory.get(disk, ""): replace(stored, members=members)}
        if disk in otherwise:
            computed = _separate(name, model, stored)
        for full, tensor in computed.items():
            match = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", full)
            if match is None:
                raise UnsupportedFamilyError(
                    f"{name}: tensor {disk} is in no list of layers; use --method mean without "
                    "--calibration"
                )
            prefix = f"{match[1]}.{match[2]}."
            members = tuple(member.removeprefix(prefix) for member in tensor.members)
            tensors = found.setdefault(match[1], {}).setdefault(int(match[2]), {})
            tensors[match[3]] = replace(tensor, members=members)
    if len(found) > 1 and not found.keys() <= set(halves(model).values()):
        raise UnsupportedFamilyError(
            f"{name}: KV heads are in {len(found)} stacks of layers ({', '.join(sorted(found))}), "
            "which calibration does not cover yet; use --method mean without --calibration"
        )
    reads_tokens = not halves(model) or any(
        isinstance(each, nn.Embedding) for each in model.get_decoder().children()
    )
    if not reads_tokens:
        raise UnsupportedFamilyError(
            f"{name}: its decoder reads something else than a row of tokens, which is not covered yet; "
            "use --method mean without --calibration"
        )
    order = [*halves(model).values(), *found]
    stacks: dict[str, Blocks] = {}
    for stack in sorted(found, key=order.index):
        stacks[stack] = {}
        for index, layer in sorted(found[stack].items()):
            state = model.get_submodule(f"{stack}.{index}").state_dict()
            try:
                stacks[stack][index] = find_attention({n: t.shape for n, t in state.items()}, layer)
            except UnsupportedFamilyError as error:
                raise UnsupportedFamilyError(f"{name}: layer {index}: {error}") from error
        _check_keys(name, model.get_submodule(stack), stacks[stack])
    return stacks


def _separate(name: str, model: Any, stored: HeadTensor) -> dict[str, HeadTensor]:
    """Say which keys and values a tensor becomes that loading splits into queries, keys and values."""
    disk, heads = stored.name, stored.heads
    blank = torch.empty(stored.source_shape, device="meta")
    loaded = meta.load_into_memory(model, {disk: blank})
    size = len(blank) // (heads.num_attention_heads + 2 * heads.num_key_value_heads)
    counts = [heads.num_attention_heads, *[heads.num_key_value_heads] * 2]
    is_split = stored.layout is Layout.CONCATENATED
    is_split = is_split and [len(part) for part in loaded.values()] == [size * n for n in counts]
    if not is_split or meta.bring_to_files(model, loaded).keys() != {disk}:
        raise UnsupportedFamilyError(
            f"{name}: tensor {disk} is stored in another form than it is computed with; use --method mean "
            "without --calibration"
        )
    rest, count = stored.source_shape[1:], stored.num_key_value_heads
    return {
        part: replace(
            stored,
            name=part,
            layout=Layout.SEPARATE,
            source_shape=tuple(loaded[part].shape),
            target_shape=(size * count, *rest),
            members=(part,),
        )
        for part in list(loaded)[1:]
    }


def _check_keys(name: str, layers: nn.ModuleList, blocks: Blocks) -> None:
    """Refuse layers that have queries and no keys of their own."""
    known = {(n.module, n.query, n.key) for several in blocks.values() for n in several}
    for index, layer in enumerate(layers):
        parts = {path for path, _ in layer.named_modules()}
        for module, query, key in known:
            if f"{module}.{query}" in parts and f"{module}.{key}" not in parts:
                raise UnsupportedFamilyError(
                    f"{name}: layer {index} reads the keys and values of an earlier layer, which cannot be "
                    "merged for several layers at once; use --method mean without --calibration"
                )


def halves(model: Any) -> dict[str, str]:
    """Name the lists of layers of an encoder-decoder's two halves; none if they cannot be told."""
    if not model.config.is_encoder_decoder:
        return {}
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, str] = {}
    for half, module in ((ENCODER, model.get_encoder()), (DECODER, model.get_decoder())):
        # An encoder that sees as well holds its text model one level further down.
        inner = [part for child in module.children() for part in child.children()]
        for parts in (module.children(), inner):
            lists = [each for each in parts if isinstance(each, nn.ModuleList)]
            if len(lists) == 1:
                found.setdefault(half, names[lists[0]])
    return found if len(found) == 2 else {}
