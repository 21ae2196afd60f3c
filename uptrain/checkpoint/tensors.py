"""The tensors of a checkpoint's files: safetensors headers and pickles, checked before they are used."""

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uptrain.checkpoint.files import (
    MAX_JSON_BYTES,
    byte_chunks,
    disguise,
    file_chunks,
    parse_json,
    reading,
)
from uptrain.errors import CheckpointError, one_line

# safetensors' own names of dtypes, as its format document lists them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_DIMENSIONS = 64  # what torch can hold; the product of very many sizes would take hours


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies; its data is read only when asked for."""

    name: str
    dtype: str
    """safetensors' name of the dtype, such as `BF16`."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Bytes from the start of the file; unused in `.bin` files."""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def entry_chunks(entry: TensorEntry) -> Iterator[memoryview]:
    """Yield the raw bytes of a tensor in a safetensors file, at most 1 MiB at a time.

    Raises:
        CheckpointError: If the file has become shorter since its header was read.
    """
    left = entry.nbytes
    for chunk in file_chunks(entry.path, entry.offset, left):
        left -= len(chunk)
        yield chunk
    if left:
        raise CheckpointError(
            f"{entry.path}: ended while tensor {one_line(entry.name)} was being read; "
            "the file changed or its disk failed, copy it again"
        )


def tensor_chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the raw little-endian bytes of `tensor`, at most 1 MiB at a time."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    yield from byte_chunks(data)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of a safetensors file.

    Returns:
        The tensors by name, in the order of their data.

    Raises:
        CheckpointError: If the file is truncated, is no safetensors file (a Git LFS pointer, a web
            page), or its header contradicts itself or the file's size.
    """
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        (length,) = struct.unpack("<Q", start.ljust(8, b"\xff"))
        if length > min(size - 8, MAX_JSON_BYTES):
            # Asked only now: the length of a good header may well begin with the byte of a "<".
            if (other := disguise(start + file.read(64))) is not None:
                raise CheckpointError(f"{path}: {other}")
            if len(start) < 8:
                raise CheckpointError(f"{path}: is truncated ({size} bytes); fetch the file again")
            raise CheckpointError(
                f"{path}: is truncated or no safetensors file (a header of {length} bytes in a file "
                f"of {size}); fetch the file again"
            )
        file.seek(8)
        header_bytes = file.read(length)
    try:
        header = parse_json(header_bytes.decode())
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
        notes = header.pop("__metadata__", {})
        if not all(isinstance(note, str) for note in notes.values()):
            raise ValueError("its metadata is no text")
        spans = [
            (_header_entry(path, 8 + length, *item), item[1]["data_offsets"])
            for item in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its safetensors header is malformed ({one_line(error)}); fetch the file again"
        ) from error
    spans.sort(key=lambda span: (span[1][0], span[1][1]))
    position = 0
    for entry, (begin, end) in spans:
        if begin != position:
            raise CheckpointError(
                f"{path}: tensor {one_line(entry.name)} starts at byte {begin} of the data, expected {position} "
                "(tensors overlap or leave a hole); fetch the file again"
            )
        position = end
    if 8 + length + position != size:
        raise CheckpointError(
            f"{path}: is {size} bytes long, its header says {8 + length + position}; "
            "the file is truncated or has trailing bytes, fetch it again"
        )
    return {entry.name: entry for entry, _ in spans}


def _header_entry(path: Path, base: int, name: str, value: dict[str, Any]) -> TensorEntry:
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(value) == 3):
        raise ValueError(f"tensor {name} is described in another way")
    begin, end = offsets
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype!r}")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {len(shape)} dimensions")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has a size that is not a natural number")
    entry = TensorEntry(name, dtype, tuple(shape), path, base + begin)
    if end - begin != entry.nbytes:
        raise ValueError(f"tensor {name} spans {end - begin} bytes, its shape needs {entry.nbytes}")
    return entry


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """Load one pickled shard, tensors only, memory-mapped.

    Raises:
        CheckpointError: If it is damaged, or holds anything but named tensors.
    """
    with path.open("rb") as file:
        if (other := disguise(file.read(72))) is not None:
            raise CheckpointError(f"{path}: {other}")
    try:
        if zipfile.is_zipfile(path):
            _check_packing(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the older, unzipped format cannot be memory-mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: cannot be loaded as plain tensors: it holds other Python objects, which might "
            "execute code; take a safetensors version of the checkpoint"
        ) from error
    except Exception as error:  # torch documents no closed set of errors for malformed files
        raise CheckpointError(
            f"{path}: cannot be loaded as plain tensors ({one_line(error)}); "
            "fetch the file again, or take a safetensors version of the checkpoint"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{path}: holds more than named tensors; expected a state dict")
    return dict(content)


def _check_packing(path: Path) -> None:
    """Refuse a zip file that would take more memory than disk; torch stores tensors unpacked."""
    with zipfile.ZipFile(path) as packed:
        if any(member.compress_type != zipfile.ZIP_STORED for member in packed.infolist()):
            raise ValueError("it is compressed")


def read_bin_entries(path: Path) -> dict[str, TensorEntry]:
    """Say what one pickled shard holds.

    Raises:
        CheckpointError: As `load_bin`, or if a tensor has no equal in safetensors.
    """
    entries, size = {}, path.stat().st_size
    for name, tensor in load_bin(path).items():
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{path}: tensor {one_line(name)} is a {tensor.dtype} {tensor.layout} tensor on {tensor.device}, which "
                "safetensors cannot hold; take a safetensors version of the checkpoint"
            )
        entry = TensorEntry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), path, 0)
        if entry.nbytes > size:  # one number, repeated by strides of 0
            raise CheckpointError(
                f"{path}: tensor {one_line(name)} takes {entry.nbytes} bytes, the file has {size}; "
                "take a safetensors version of the checkpoint"
            )
        entries[name] = entry
    return entries
