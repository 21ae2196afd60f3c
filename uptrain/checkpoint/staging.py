"""Publish what is written whole: staged aside, synced, put in its place by one rename."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from uptrain.checkpoint.files import CONFIG, read_json
from uptrain.errors import CheckpointError, one_line

STAGING = ".uptrain-staging"


@contextmanager
def staged_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write to, and publish it as `target` when the block ends without error.

    The staging folder lies beside the target, so that the final rename is atomic. Whoever touches
    one of the `side_folders` has locked it; what a killed run left in it is removed. On an error
    nothing of it stays, and a target that was to be replaced is what it was.

    Raises:
        CheckpointError: If `target` exists and `overwrite` is false, another process is writing it, or
            it cannot be written.
    """
    target = Path(os.path.abspath(target))
    check_target(target, overwrite)
    staging, replaced, _ = side_folders(target)
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        lock = _lock(staging)
    except BlockingIOError as error:
        raise CheckpointError(
            f"{target}: another process is writing it right now; wait for it or choose another target"
        ) from error
    except OSError as error:
        _remove_empty(made)
        raise CheckpointError(
            f"{target}: cannot be created ({error.strerror}); choose another target"
        ) from error
    try:
        try:
            check_target(target, overwrite)  # again: another process may just have made it
            for leftover in staging.iterdir():
                _remove(leftover)
            yield staging
            _sync_tree(staging)
            check_target(target, overwrite)
            if target.exists():
                _remove(replaced)
                target.rename(replaced)
            staging.rename(target)
            sync_folder(target.parent)
        except BaseException as error:
            _withdraw(target, os.fstat(lock).st_ino)
            _remove_empty(made)
            if isinstance(error, OSError):
                raise _unwritable(target, error) from error
            raise
    finally:
        os.close(lock)
    _remove_sides(target)


def _lock(folder: Path) -> int:
    """Make a folder if need be, and lock it; returns its descriptor.

    Raises:
        BlockingIOError: If another process has locked it, or just published or removed it.
        OSError: If it cannot be made.
    """
    is_made, lock = False, -1
    try:
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            is_made = True
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino != folder.stat().st_ino:
            raise BlockingIOError
    except OSError as error:
        if lock != -1:
            os.close(lock)
        if isinstance(error, FileNotFoundError) and folder.parent.is_dir():
            raise BlockingIOError from error
        if is_made and not isinstance(error, BlockingIOError):
            _remove_empty([folder])
        raise
    return lock


def _remove_sides(target: Path) -> None:
    """Remove what a published target leaves beside it, unless another run is at work: it then will."""
    staging, *sides = side_folders(target)
    try:
        if not any(side.exists() for side in sides):
            return
        lock = _lock(staging)
    except BlockingIOError:
        return
    except OSError as error:
        raise _unremoved(sides[0], target, error) from error
    try:
        for side in sides:
            _remove(side)
    except OSError as error:
        raise _unremoved(side, target, error) from error
    finally:
        _remove_empty([staging])
        os.close(lock)


def _unremoved(path: Path, target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be removed ({error.strerror}); {target} is whole, remove what is left there"
    )


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written ({error.strerror or one_line(error)}); "
        "make room, or look after the disk"
    )


def _withdraw(target: Path, staged_inode: int) -> None:
    """Undo what was staged, published or not; what cannot be undone now is by the next run."""
    staging, replaced, _ = side_folders(target)
    with suppress(OSError):
        if not staging.exists() and target.stat().st_ino == staged_inode:
            target.rename(staging)  # its rename may not outlive a power cut
    with suppress(OSError):
        if _is_replaceable(replaced) and not target.exists():
            replaced.rename(target)
    with suppress(OSError):
        if staging.stat().st_ino == staged_inode:  # else another run's
            _remove(staging)


def side_folders(target: Path) -> tuple[Path, Path, Path]:
    """Name the folders beside `target` that are used while it is made, and removed thereafter.

    Returns:
        The staged target, the target that is being replaced, and the finished layers of a calibration.
    """
    staging, replaced, partial = (
        target.with_name(f"{target.name}{suffix}")
        for suffix in (STAGING, ".uptrain-replaced", ".uptrain-partial")
    )
    return staging, replaced, partial


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists, unless it is a checkpoint that may be overwritten.

    Raises:
        CheckpointError: If `target` exists and is not to be, or must not be, replaced.
    """
    while (found := _inode(target)) is not None:
        if not overwrite:
            raise CheckpointError(
                f"{target}: exists already; choose another target or add --overwrite"
            )
        if not target.is_symlink() and _is_replaceable(target):
            return
        if _inode(target) == found:  # else another run is replacing it: parts of both were seen
            raise CheckpointError(
                f"{target}: is no checkpoint folder, so --overwrite will not replace it; choose another target"
            )


def _inode(path: Path) -> int | None:
    """Tell what lies at a path, a link itself too, from what may lie there later; None if nothing does."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return path.lstat().st_ino
    return None


def _is_replaceable(folder: Path) -> bool:
    """Whether a folder is empty or a checkpoint that was not begun to be removed."""
    if not folder.is_dir():
        return False
    # Many programs keep a config.json; only a checkpoint's names a model type.
    try:
        return isinstance(read_json(folder / CONFIG).get("model_type"), str)
    except CheckpointError:
        with suppress(FileNotFoundError):
            return not any(folder.iterdir())
        return False


def check_room(target: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk of `target` has no room for.

    Raises:
        CheckpointError: If it has not.
    """
    parent = Path(os.path.abspath(target))
    # What a killed run left there is removed before anything is written, or used.
    staging, _, partial = side_folders(parent)
    left = 0
    with suppress(FileNotFoundError):  # another run is at work there
        left = sum(path.lstat().st_size for side in (staging, partial) for path in side.rglob("*"))
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free + left
    if free < needed_bytes:
        raise CheckpointError(
            f"{target}: needs {_size(needed_bytes)}, its disk has {_size(free)} free; "
            "make room, or choose another disk"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def write_json(path: Path, content: Any) -> str:
    """Write `content` as indented JSON and return the file's SHA-256."""
    return write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> str:
    """Write `content` to a new file, sync it, and return its SHA-256."""
    return write_chunks(path, [memoryview(content)])


def write_chunks(path: Path, chunks: Iterable[memoryview]) -> str:
    """Write `chunks` to a new file, sync it, and return its SHA-256."""
    digest = hashlib.sha256()
    with path.open("xb", buffering=0) as file:
        for chunk in chunks:
            digest.update(chunk)
            write_all(file.fileno(), chunk)
        os.fsync(file.fileno())
    return digest.hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in the place of a file, which holds the old or the new one at any time.

    Raises:
        CheckpointError: If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        write_bytes(partial, content)
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise


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


def write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    """Write all of `chunk` to a file, in as many calls as that takes."""
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # another run may be using it
            folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        (path / CONFIG).unlink(missing_ok=True)  # first: what is half removed is no checkpoint
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()
