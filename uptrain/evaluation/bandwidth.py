"""What a decode step must read, and how fast the memory gives it."""

import platform
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BUFFER_BYTES = {"cpu": 2**27, "cuda": 2**32}  # far more than any cache holds
_REPEATS = 10


def measure_bandwidth(device: torch.device) -> dict[str, float]:
    """Measure how many bytes a second a device's memory gives: by copying and by reading.

    Returns:
        `copy_bytes_per_second` (bytes read and written), `read_bytes_per_second`, each the best of
        ten, and the larger of both as `bytes_per_second`.
    """
    wanted = _BUFFER_BYTES["cpu" if device.type == "cpu" else "cuda"]
    values = max(1, min(wanted, free_bytes(device) // 4) // 4)
    source = torch.ones(values, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(_REPEATS))
    read = min(seconds(source.sum, device) for _ in range(_REPEATS))
    found = {
        "copy_bytes_per_second": 2 * source.nbytes / copy,
        "read_bytes_per_second": source.nbytes / read,
    }
    return {"bytes_per_second": max(found.values()), **found}


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time a call, and on a GPU what it left to do."""
    synchronize(device)
    begun = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begun


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model: "PreTrainedModel") -> int:
    """Count the bytes of a model's parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def read_weight_bytes(model: "PreTrainedModel") -> int:
    """Count the bytes of the parameters that a step reads: all but an embedding table of its own.

    Of a table that is no head as well, a step reads a row for each sequence. Experts count all, as
    if a batch chose every one.
    """
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is table
    return weight_bytes(model) - (0 if is_tied else int(table.nbytes))


def free_bytes(device: torch.device) -> int:
    """Say how much memory of a device is free, what torch keeps for later included."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)


def device_name(device: torch.device) -> str:
    """Name a GPU, or the CPU with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
