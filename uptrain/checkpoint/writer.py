"""Write a checkpoint folder: staged aside, synced, published whole by one rename."""

import fcntl
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uptrain.checkpoint.reader import (
    CONFIG,
    DTYPES,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    Checkpoint,
    read_json,
)
from uptrain.errors import CheckpointError

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
    staging, replaced, _ = side_folders(target)
    try:
        made = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
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
            with suppress(OSError):  # another run may be using them
                for folder in made:
                    folder.rmdir()
            raise
    finally:
        os.close(lock)


def side_folders(target: Path) -> tuple[Path, Path, Path]:
    """Name the folders beside `target` that are used while it is made, and removed thereafter.

    Returns:
        The staged target, the target that is being replaced, and the finished layers of a calibration.
    """
    staging, replaced, partial = (
        target.with_name(f"{target.name}.uptrain-{part}")
        for part in ("staging", "replaced", "partial")
    )
    return staging, replaced, partial


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists, unless it is a checkpoint that may be overwritten.

    Raises:
        CheckpointError: If `target` exists and is not to be, or must not be, replaced.
    """
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise CheckpointError(f"{target}: exists already; choose another target or add --overwrite")
    is_checkpoint = target.is_dir() and (_is_checkpoint(target) or not any(target.iterdir()))
    if target.is_symlink() or not is_checkpoint:
        raise CheckpointError(
            f"{target}: is no checkpoint folder, so --overwrite will not replace it; choose another target"
        )


def _is_checkpoint(folder: Path) -> bool:
    # Many programs keep a config.json; only a checkpoint's names a model type.
    try:
        return isinstance(read_json(folder / CONFIG).get("model_type"), str)
    except CheckpointError:
        return False


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
                    _write_all(file.fileno(), chunk)
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
    digests = {}
    for path in checkpoint.companions:
        name = checkpoint.companion_name(path)
        (folder / name).parent.mkdir(exist_ok=True)
        digests[name] = write_bytes(folder / name, path.read_bytes())
    return digests


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
