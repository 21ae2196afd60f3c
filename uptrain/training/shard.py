"""How a model is spread over the processes of a run: FSDP2, in units of a few decoder layers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.tensors import DTYPES
from uptrain.loading import empty_model, load_model
from uptrain.training import processes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_UNIT_PARAMETERS = 2**27  # that a unit has at least, if there are so many


def make_mesh(device: torch.device, count: int) -> DeviceMesh | None:
    """Give all processes of a run as one row of devices; None if there is only one.

    Args:
        device: Of this process; its type is that of all.
        count: Of processes; their process group exists already.
    """
    return init_device_mesh(device.type, (count,)) if count > 1 else None


def load_on_main(
    source: Checkpoint, config: "PretrainedConfig", dtype: torch.dtype | None
) -> tuple["PreTrainedModel", "PreTrainedModel | None"]:
    """Load a checkpoint into the memory of the main process only.

    Args:
        source: The checkpoint.
        config: From `load_config`.
        dtype: Of the parameters; the checkpoint's own if not given.

    Returns:
        The model, its parameters on the meta device, to be sharded and then filled; and in the main
        process what to `fill` it with: the model on the CPU, in the dtype of the files.

    Raises:
        CheckpointError, UnsupportedFamilyError: As `load_model`.
    """
    loaded: Any = None

    def load() -> dict[str, torch.dtype]:
        nonlocal loaded
        stored = {DTYPES[entry.dtype] for entry in source.tensors.values()}
        # Weights of a lower precision take less memory, and become exactly the same later.
        is_one = len(stored) == 1 and all(each.is_floating_point for each in stored)
        held = stored.pop() if dtype is not None and is_one else dtype
        loaded = load_model(source, torch.device("cpu"), config, held)
        return {name: dtype or each.dtype for name, each in loaded.named_parameters()}

    dtypes = processes.in_main(load)
    model: Any = empty_model(source, config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    if loaded is not None and hasattr(loaded, "_weight_conversions"):
        model._weight_conversions = loaded._weight_conversions  # an export undoes them
    return model, loaded


def join_layers(layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Join layers that follow each other until it is worth gathering them.

    To gather a unit takes the host a millisecond or more, however small it is, and a device that
    computes faster than that would wait for each.

    Args:
        layers: Those of one kind in the order in which they run. Other kinds, such as an image encoder's
            that text never reaches, get units of their own: a unit must run as a whole.
    """
    units: list[list[nn.Module]] = []
    parameters = _UNIT_PARAMETERS
    for layer in layers:
        if parameters >= _UNIT_PARAMETERS or type(layer) is not type(units[-1][-1]):
            units.append([])
            parameters = 0
        units[-1].append(layer)
        parameters += sum(each.numel() for each in layer.parameters())
    return units


def shard(
    root: nn.Module,
    layers: Sequence[nn.Module],
    mesh: DeviceMesh,
    layer_dtype: torch.dtype | None = None,
) -> None:
    """Leave each process a part of every parameter, its rows as `torch.chunk` cuts them.

    Before a unit of layers runs, its parameters are gathered, and given up again after it; what
    belongs to no layer (embeddings, the head) is gathered from the start of the root's forward to the end of its
    backward. Gradients are averaged over processes in float32, part by part, and added to those of
    earlier backwards. Only the root's forward may be called.

    A model in memory moves to the mesh's devices, one layer at a time; one on the meta device stays
    there until `fill`.

    Args:
        root: Everything that is run together. Its parameters become DTensors.
        layers: Those inside it, in the order in which they run; `join_layers` makes units of them.
        mesh: From `make_mesh`.
        layer_dtype: What layers' parameters are gathered in; their own dtype if not given. bfloat16
            halves the traffic, and under autocast changes nothing but vectors (norms, biases).
    """
    policy = MixedPrecisionPolicy(
        param_dtype=layer_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # hidden states stay what they are on one device
    )
    for unit in join_layers(layers):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh)


def fill(model: nn.Module, device: torch.device, values: Mapping[str, Tensor]) -> None:
    """Give a sharded model on the meta device its weights, one tensor after the other.

    Args:
        model: The model; its buffers are not on the meta device.
        device: Of this process.
        values: Whole tensors by the model's names, in any dtype; what the main process gives counts,
            others give nothing.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(values), options=options)


def reshard(root: nn.Module) -> None:
    """Give up what a forward without a backward left gathered."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Put a sharded model together on the CPU of the main process, one tensor after the other.

    All processes take part, each with room for the largest tensor on its device.

    Args:
        model: Sharded or not; a tensor that is not comes back as it is.
        dtype: What gathered tensors are turned into; as they are if not given.

    Returns:
        The state dict, tied tensors as one; empty in other processes.
    """
    is_main = processes.rank() == 0
    state = model.state_dict(keep_vars=True)
    gathered: dict[int, Tensor] = {}
    for key, tensor in {id(each): each.detach() for each in state.values()}.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_main:
            gathered[key] = whole if whole is tensor else whole.to("cpu", dtype)
    return {name: gathered[id(each)] for name, each in state.items()} if is_main else {}


def first_row(tensor: DTensor) -> int:
    """Give the number of the first row of a tensor that this process holds."""
    (placement,) = tensor.placements
    if placement.is_replicate():
        return 0
    assert placement == Shard(0), f"placed as {placement}"
    rows, mesh = tensor.shape[0], tensor.device_mesh
    return min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
