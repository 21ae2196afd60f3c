"""Which lists of layers hold KV heads, and where each layer's attention blocks are."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.attention import AttentionNames, find_attention
from uptrain.errors import UnsupportedFamilyError
from uptrain.families import meta
from uptrain.families.schema import HeadTensor

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
        UnsupportedFamilyError: If the blocks are in no list of layers, in several of one half, or as
            `find_attention`.
    """
    model = meta.build_on_meta(checkpoint.config, code)
    in_memory, expected = meta.names_in_memory(model, checkpoint.tensors), model.state_dict()
    found: dict[str, dict[int, dict[str, HeadTensor]]] = {}
    for disk, tensor in head_tensors.items():
        match = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", in_memory.get(disk, ""))
        if match is None:
            raise UnsupportedFamilyError(
                f"{checkpoint.name}: tensor {disk} is in no list of layers; use --method mean without --calibration"
            )
        parts = [expected[in_memory[member]].shape for member in tensor.members]
        if (sum(part[0] for part in parts), *parts[0][1:]) != tensor.source_shape:
            raise UnsupportedFamilyError(
                f"{checkpoint.name}: tensor {disk} is stored in another form than it is computed with; use "
                "--method mean without --calibration"
            )
        prefix = f"{match[1]}.{match[2]}."
        members = tuple(in_memory[member].removeprefix(prefix) for member in tensor.members)
        tensors = found.setdefault(match[1], {}).setdefault(int(match[2]), {})
        tensors[match[3]] = replace(tensor, members=members)
    if len(found) > 1 and not found.keys() <= set(halves(model).values()):
        raise UnsupportedFamilyError(
            f"{checkpoint.name}: KV heads are in {len(found)} stacks of layers ({', '.join(sorted(found))}), "
            "which calibration does not cover yet; use --method mean without --calibration"
        )
    reads_tokens = not halves(model) or any(
        isinstance(each, nn.Embedding) for each in model.get_decoder().children()
    )
    if not reads_tokens:
        raise UnsupportedFamilyError(
            f"{checkpoint.name}: its decoder reads something else than a row of tokens, which is not covered yet; "
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
                raise UnsupportedFamilyError(
                    f"{checkpoint.name}: layer {index}: {error}"
                ) from error
    return stacks


def halves(model: Any) -> dict[str, str]:
    """Name the lists of layers of an encoder-decoder's two halves; none if they cannot be told."""
    if not model.config.is_encoder_decoder:
        return {}
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for half, module in ((ENCODER, model.get_encoder()), (DECODER, model.get_decoder())):
        lists = [each for each in module.children() if isinstance(each, nn.ModuleList)]
        if len(lists) == 1:
            found[half] = names[lists[0]]
    return found if len(found) == 2 else {}
