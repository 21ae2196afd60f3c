"""The files of a checkpoint folder: their names, where links may lead, and plain JSON."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uptrain.errors import CheckpointError, one_line

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
MODEL_CARD = "README.md"
RECORD = "uptrain.json"
LFS_POINTER = b"version https://git-lfs"

CHUNK_BYTES = 2**20  # larger buffers cost more in page faults than they save in calls
MAX_JSON_BYTES = 2**25  # of 300,000 tensors; parsed, JSON takes up to twenty times its size


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of what the system refuses to read which file it is.

    Raises:
        CheckpointError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be read ({error.strerror or one_line(error)}); "
            "check the disk, and who may read it"
        ) from error


def file_chunks(path: Path, offset: int = 0, nbytes: int = sys.maxsize) -> Iterator[memoryview]:
    """Yield `nbytes` of a file from `offset` on, or what there is, at most 1 MiB at a time.

    Raises:
        CheckpointError: If it cannot be read.
    """
    # Buffered: a raw read may give less than it was asked for.
    with reading(path), path.open("rb") as file:
        file.seek(offset)
        while chunk := file.read(min(nbytes, CHUNK_BYTES)):
            nbytes -= len(chunk)
            yield memoryview(chunk)


def byte_chunks(content: bytes | memoryview) -> Iterator[memoryview]:
    """Yield what is in memory as `file_chunks` would."""
    for start in range(0, len(content), CHUNK_BYTES):
        yield memoryview(content)[start : start + CHUNK_BYTES]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises:
        CheckpointError: If it is not readable UTF-8 JSON, not an object, or names a key twice.
    """
    with reading(path):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: is too large to be JSON; fetch the file again")
        data = path.read_bytes()
    try:
        content = parse_json(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is not valid JSON ({one_line(error)}); fetch the file again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, expected a JSON object; fetch it again"
        )
    return content


def parse_json(text: str) -> Any:
    """Parse JSON that can be written again.

    Raises:
        ValueError: If it is malformed, names a key twice, or holds half a surrogate pair.
        RecursionError: If it is nested too deeply.
    """
    content = json.loads(text, object_pairs_hook=_unique_keys, parse_int=_integer)
    json.dumps(content, ensure_ascii=False).encode()
    return content


def _integer(digits: str) -> int | float:
    # As safetensors' own reader sees it.
    return -0.0 if digits == "-0" else int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def check_link(path: Path, folder: Path) -> None:
    """Let a link lead only within the folder or to the hub cache's own blobs.

    Raises:
        CheckpointError: If `path`, or a folder on the way to it, leads elsewhere.
    """
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    is_cached = home.parent.name == "snapshots" and real.is_relative_to(blobs)
    if not (real.is_relative_to(home) or is_cached):
        raise CheckpointError(
            f"{path}: is a link that leads out of the folder; replace it by the file itself"
        )


def disguise(start: bytes) -> str | None:
    """Say what a weight file is that begins like this, if it is something else."""
    if start.startswith(LFS_POINTER):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in the folder"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not the weights; download the file itself"
    return None
