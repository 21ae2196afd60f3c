"""Write a checkpoint folder: staged aside, synced, published whole by one rename."""

import fcntl
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uptrain.checkpoint.reader import DTYPES, SAFETENSORS, SAFETENSORS_INDEX, Checkpoint
from uptrain.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5 * 10**9
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


@contextmanager
def staged_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write to, and publish it as `target` when the block ends without error.

    The staging folder lies beside the target, so that the final rename is atomic. It is locked while
    in use; what a killed run left behind is removed. On an error nothing of it stays.

    Raises:
        CheckpointError: If `target` exists and `overwrite` is false, or another process is writing it.
    """
    target = Path(os.path.abspath(target))
    check_target(target, overwrite)
    staging = target.with_name(f"{target.name}.uptrain-staging")
    replaced = target.with_name(f"{target.name}.uptrain-replaced")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be created ({error.strerror}); choose another target"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino != staging.stat().st_ino:
                raise BlockingIOError  # the folder we opened was published in the meantime
        except OSError as error:
            raise CheckpointError(
                f"{target}: another process is writing it right now; wait for it or choose another target"
            ) from error
        for leftover in staging.iterdir():
            _remove(leftover)
        try:
            yield staging
            _sync_tree(staging)
            check_target(target, overwrite)
            if target.exists():
                _remove(replaced)
                target.rename(replaced)
            staging.rename(target)
            sync_folder(target.parent)
            _remove(replaced)
        except BaseException:
            _remove(staging)
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            raise
    finally:
        os.close(lock)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists, unless it is a checkpoint that may be overwritten.

    Raises:
        CheckpointError: If `target` exists and is not to be, or must not be, replaced.
    """
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise CheckpointError(f"{target}: exists already; choose another target or add --overwrite")
    is_checkpoint = target.is_dir() and (
        (target / "config.json").is_file() or not any(target.iterdir())
    )
    if target.is_symlink() or not is_checkpoint:
        raise CheckpointError(
            f"{target}: is no checkpoint folder, so --overwrite will not replace it; choose another target"
        )


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
    for number, shard in enumerate(shards, 1):
        # Wide dtypes first keeps every tensor aligned to its item size, as safetensors demands.
        shard.sort(key=lambda spec: -DTYPES[spec.dtype].itemsize)
        name = (
            SAFETENSORS
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        digests[name] = _write_shard(folder / name, shard, data, progress)
        weight_map.update({spec.name: name for spec in shard})
    if len(shards) > 1:
        metadata = {"total_size": sum(spec.nbytes for spec in specs)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        digests[SAFETENSORS_INDEX] = write_json(folder / SAFETENSORS_INDEX, index)
    return digests


def _write_shard(
    path: Path,
    specs: Sequence[TensorSpec],
    data: Callable[[TensorSpec], Iterable[memoryview]],
    progress: Callable[[int], None],
) -> str:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    # Hashing and syncing release the interpreter lock: both run beside the reading and writing.
    with (
        path.open("xb", buffering=0) as file,
        ThreadPoolExecutor(1) as hasher,
        ThreadPoolExecutor(1) as syncer,
    ):
        hashed: Future[None] | None = None
        synced: Future[None] | None = None
        unsynced = 0

        def write(chunk: bytes | memoryview) -> None:
            nonlocal hashed, synced, unsynced
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, chunk)
            _write_all(file.fileno(), chunk)
            unsynced += len(chunk)
            if unsynced >= _SYNC_BYTES and (synced is None or synced.done()):
                if synced is not None:
                    synced.result()
                synced = syncer.submit(os.fdatasync, file.fileno())
                unsynced = 0

        write(struct.pack("<Q", len(text)) + text)
        for spec in specs:
            written = 0
            for chunk in data(spec):
                write(chunk)
                written += len(chunk)
                progress(len(chunk))
            if written != spec.nbytes:
                raise AssertionError(f"{spec.name}: {written} bytes given, {spec.nbytes} announced")
        for pending in (hashed, synced):
            if pending is not None:
                pending.result()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> str:
    """Write `content` as indented JSON and return the file's SHA-256."""
    return write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> str:
    """Write `content` to a new file, sync it, and return its SHA-256."""
    with path.open("xb", buffering=0) as file:
        _write_all(file.fileno(), content)
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in the place of a file, which holds the old or the new one at any time."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    write_bytes(partial, content)
    partial.replace(path)
    sync_folder(path.parent)


def copy_companions(checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Copy a checkpoint's companion files byte for byte; return their SHA-256 by name."""
    return {
        path.name: write_bytes(folder / path.name, path.read_bytes())
        for path in checkpoint.companions
    }


def sync_folder(folder: Path) -> None:
    """Make the entries of `folder` (creations, renames) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    # Files are synced as they are written; what is left are the folders' own entries.
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def _write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
