"""A model's weights, straight from the files into modules that were built without any."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from uptrain.checkpoint.reader import Checkpoint
from uptrain.errors import CheckpointError, UnsupportedFamilyError
from uptrain.families import meta

_WAY_OUT = "so its layers cannot be run one by one; use --method mean without --calibration"


def read(checkpoint: Checkpoint, model: Any, disk_names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Read tensors in the form that a model has in memory.

    Args:
        checkpoint: Where they are.
        model: As `meta.build_on_meta` gives it.
        disk_names: Their names in the files.

    Returns:
        By name in memory.

    Raises:
        CheckpointError: If one has NaN or infinite values.
    """
    tensors = {disk: checkpoint.read(disk) for disk in disk_names}
    for disk, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {disk} has NaN or infinite values; the checkpoint is "
                "damaged, fetch it again"
            )
    return meta.load_into_memory(model, tensors)


def fill(module: nn.Module, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put float32 tensors in the place of a module's empty ones; those it does not have are left out."""
    converted = {
        name: tensor.to(device, torch.float32) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in state.items()
    }
    module.load_state_dict(converted, strict=False, assign=True)


def check_filled(
    module: nn.Module, name: str, prefix: str = "", unused: tuple[str, ...] = ()
) -> None:
    """Refuse a module that cannot be run as it is.

    Args:
        module: A layer, or the model, of which parameters may be missing.
        name: Of the checkpoint.
        prefix: Name of the layer in the model, and a dot.
        unused: What names of parts begin with that are not run.

    Raises:
        UnsupportedFamilyError: If a layer's parameter is not filled, or a buffer not computed.
    """
    if prefix and (missing := [n for n, p in module.named_parameters() if p.is_meta]):
        raise UnsupportedFamilyError(
            f"{name}: tensor {prefix}{missing[0]} is not in the files under its own name, {_WAY_OUT}"
        )
    for buffer, values in module.named_buffers():
        if not (unused and buffer.startswith(unused)) and bool(values.isnan().any()):
            raise UnsupportedFamilyError(
                f"{name}: buffer {prefix}{buffer} is neither in the files nor computed by transformers, {_WAY_OUT}"
            )


def fill_buffers(model: Any, device: torch.device) -> None:
    """Let transformers compute what no file holds: rotary frequencies, scales, tables of sines.

    Before weights are loaded: initialising a module may draw its weights too.
    """
    unsaved = {
        name
        for name in getattr(model, "_keys_to_ignore_on_save", None) or ()
        if name in model.state_dict()
    }
    for path, module in model.named_modules():
        for name, buffer in [*module.named_buffers(recurse=False)]:
            if buffer.is_meta:
                unset = float("nan") if buffer.is_floating_point() else 0
                setattr(module, name, torch.full_like(buffer, unset, device=device))
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if f"{path}.{name}" in unsaved:
                empty = torch.empty_like(parameter, dtype=torch.float32, device=device)
                setattr(module, name, nn.Parameter(empty))
    _initialise(model, model, unsaved)
    for module in model.modules():
        for name, buffer in [*module.named_buffers(recurse=False)]:
            if buffer.dtype == torch.float64:  # all else is in float32
                setattr(module, name, buffer.float())


def _initialise(owner: Any, module: nn.Module, unsaved: set[str], path: str = "") -> None:
    """Let the innermost model around each module initialise it, as transformers does."""
    if isinstance(module, PreTrainedModel):
        owner = module
    for name, child in module.named_children():
        _initialise(owner, child, unsaved, f"{path}{name}.")
    own = {f"{path}{name}" for name, _ in module.named_parameters(recurse=False)}
    if any(True for _ in module.buffers(recurse=False)) or module is owner or own & unsaved:
        owner._init_weights(module)
