"""Write a checkpoint's tensors as safetensors shards with their index, and copy its other files."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uptrain.checkpoint.files import SAFETENSORS, SAFETENSORS_INDEX
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.staging import write_all, write_chunks, write_json
from uptrain.checkpoint.tensors import DTYPES

DEFAULT_SHARD_BYTES = 5 * 10**9
_OPEN_FILES = 32  # shards that may wait to be synced, each with an open file
_SYNC_BYTES = 256 * 2**20


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that is about to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        size = DTYPES[self.dtype].itemsize
        for n in self.shape:
            size *= n
        return size


def write_tensors(
    folder: Path,
    specs: Sequence[TensorSpec],
    data: Callable[[TensorSpec], Iterable[memoryview]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, str]:
    """Write tensors as safetensors shards with their index, streaming.

    Args:
        folder: Where to write; usually a staged folder.
        specs: The tensors, in the order in which shards are filled.
        data: Gives the raw little-endian bytes of one tensor in chunks; called once for each.
        max_shard_bytes: Shards are cut before they exceed this (a larger tensor gets its own).
        progress: Called with the number of bytes written since the last call.

    Returns:
        The SHA-256 of every file written, by name; hashed while writing.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    # Hashing and syncing release the interpreter lock: both run beside the reading and writing.
    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as syncer:
        synced: list[Future[None]] = []
        for number, shard in enumerate(shards, 1):
            # Wide dtypes first keeps every tensor aligned to its item size, as safetensors demands.
            shard.sort(key=lambda spec: -DTYPES[spec.dtype].itemsize)
            single = len(shards) == 1
            name = SAFETENSORS if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            digest = hashlib.sha256()
            hashed: Future[None] | None = None
            unsynced = 0
            with (folder / name).open("xb", buffering=0) as file:
                for chunk in _shard_bytes(shard, data, progress):
                    if hashed is not None:
                        hashed.result()
                    hashed = hasher.submit(digest.update, chunk)
                    write_all(file.fileno(), chunk)
                    unsynced += len(chunk)
                    if unsynced >= _SYNC_BYTES and all(sync.done() for sync in synced):
                        synced.append(syncer.submit(_sync_and_close, os.dup(file.fileno())))
                        unsynced = 0
                synced.append(syncer.submit(_sync_and_close, os.dup(file.fileno())))
            if len(synced) > _OPEN_FILES:
                synced.pop(0).result()
            if hashed is not None:
                hashed.result()
            digests[name] = digest.hexdigest()
            weight_map.update({spec.name: name for spec in shard})
        for sync in synced:
            sync.result()
    if len(shards) > 1:
        metadata = {"total_size": sum(spec.nbytes for spec in specs)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        digests[SAFETENSORS_INDEX] = write_json(folder / SAFETENSORS_INDEX, index)
    return digests


def _shard_bytes(
    specs: Sequence[TensorSpec],
    data: Callable[[TensorSpec], Iterable[memoryview]],
    progress: Callable[[int], None],
) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file: the header's length, the header, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for spec in specs:
        written = 0
        for chunk in data(spec):
            yield chunk
            written += len(chunk)
            progress(len(chunk))
        if written != spec.nbytes:
            raise AssertionError(f"{spec.name}: {written} bytes given, {spec.nbytes} announced")


def _sync_and_close(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_companions(checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Copy a checkpoint's companion files byte for byte; return their SHA-256 by name."""
    digests = {}
    for name, chunks in checkpoint.companion_files():
        (folder / name).parent.mkdir(exist_ok=True)
        digests[name] = write_chunks(folder / name, chunks)
    return digests
