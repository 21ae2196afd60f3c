"""The parts that a run's state is saved in: of each process, its rows of every tensor.

A tensor is what the parts hold of it, one below the other; so any number of processes can take on
what any other number left.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from uptrain.checkpoint.tensors import DTYPE_NAMES, tensor_chunks
from uptrain.checkpoint.writer import TensorSpec, write_tensors
from uptrain.training import processes
from uptrain.training.optimizer import set_learning_rate
from uptrain.training.shard import first_row


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor that this process works with, on its device."""

    tensor: Tensor
    """At least one-dimensional; writing to it writes to the run's state."""
    start: int
    """Its first row in the whole tensor; 0 if this process holds all of it."""
    rows: int
    """Of the whole tensor."""
    is_private: bool = False
    """Means something only together with this process's other pieces, as quantised moments do."""


def pieces_of(root: nn.Module, optimizer: Optimizer) -> dict[str, Piece]:
    """Give all that makes up a run's state, by name.

    That is the persistent buffers of `root`, the parameters that the optimizer holds (no others
    ever change) by their names, and what it remembers of each of them as `key/name`.
    """
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    persistent = root.state_dict(keep_vars=True)
    found = [(name, "", each) for name, each in root.named_buffers() if name in persistent]
    for name, parameter in root.named_parameters():
        if id(parameter) in trained:
            memory = optimizer.state.get(parameter, {})
            found.append((name, "", parameter))
            found += [(f"/{name}", key, each) for key, each in memory.items()]
    return {
        f"{key}{inner}{name}": piece
        for name, key, each in found
        for inner, piece in _pieces(each.detach())
    }


def _pieces(tensor: Tensor) -> Iterator[tuple[str, Piece]]:
    """Give the plain tensors that one is made of, each with what it adds to the name."""
    local, start = tensor, 0
    if isinstance(tensor, DTensor):
        local, start = tensor.to_local(), first_row(tensor)
    if is_traceable_wrapper_subclass(local):
        for key in local.__tensor_flatten__()[0]:
            inner = getattr(local, key)
            yield f".{key}", Piece(inner, 0, len(inner), is_private=True)
    elif local.ndim == 0:
        yield "", Piece(local.view(1), 0, 1)
    else:
        yield "", Piece(local, start, len(tensor))


def own_part(pieces: dict[str, Piece]) -> dict[str, Tensor]:
    """Give what this process has to save of its pieces: what all hold is saved by the first."""
    is_first = processes.rank() == 0
    return {
        name: piece.tensor
        for name, piece in pieces.items()
        if piece.is_private or (len(piece.tensor) and (is_first or piece.start))
    }


def save_part(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a part into a folder of its own.

    Returns:
        Its `bytes`, and its `sha256`, hashed while it was written.
    """
    path.parent.mkdir()
    specs = [
        TensorSpec(name, DTYPE_NAMES[each.dtype], tuple(each.shape))
        for name, each in tensors.items()
    ]
    digests = write_tensors(
        path.parent, specs, lambda spec: tensor_chunks(tensors[spec.name]), sys.maxsize
    )
    return {"bytes": path.stat().st_size, "sha256": digests[path.name]}


def load_parts(paths: Sequence[Path], root: nn.Module, optimizer: Optimizer) -> None:
    """Copy a saved state into a model and its optimizer, whatever they hold now.

    Args:
        paths: The saved parts, in the order of the processes that wrote them.
        root: The model.
        optimizer: Of its parameters.

    Raises:
        ValueError: If they do not have the tensors that were saved, or the state can be taken on
            only by as many processes as saved it.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        saved: dict[str, list[_Saved]] = {}
        for rank, file in enumerate(files):
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                found = file.get_slice(name)
                saved.setdefault(name, []).append(_Saved(rank, found, found.get_shape()[0]))
        begun = {name.partition("/")[2] for name in saved if "/" in name}
        _begin(optimizer, [each for name, each in root.named_parameters() if name in begun])
        pieces = pieces_of(root, optimizer)
        if odd := sorted(pieces.keys() ^ saved.keys()):
            raise ValueError(f"{odd[0]} is saved there or kept here, but not both")
        for name, piece in pieces.items():
            if piece.is_private and len(files) != processes.count():
                raise ValueError(
                    f"{name} was saved by {len(files)} processes, now there are "
                    f"{processes.count()}, and it cannot be parted anew"
                )
            _read(name, piece, saved[name])


@dataclass(frozen=True)
class _Saved:
    """What one part holds of a tensor."""

    rank: int
    content: Any
    """A slice of safetensors."""
    rows: int


def _read(name: str, piece: Piece, saved: list[_Saved]) -> None:
    if piece.is_private:
        saved = [each for each in saved if each.rank == processes.rank()]
    rows = sum(each.rows for each in saved)
    end = 0
    for each in saved:
        begin, end = end, end + each.rows
        first, last = max(begin, piece.start), min(end, piece.start + len(piece.tensor))
        if first < last:
            content = each.content[first - begin : last - begin]
            place = piece.tensor[first - piece.start : last - piece.start]
            if content.shape != place.shape or content.dtype != place.dtype:
                raise ValueError(f"{name} has another shape or dtype there")
            place.copy_(content)
    if rows != piece.rows:
        raise ValueError(f"{name} has {rows} rows there, expected {piece.rows}")


def _begin(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Let an optimizer make the memory of some parameters and of no others, to be filled.

    It knows best what that is: it does a step, whatever comes of it.
    """
    optimizer.state.clear()
    optimizer.zero_grad(set_to_none=True)
    for parameter in parameters:
        # Not zeros, by which some would divide.
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
