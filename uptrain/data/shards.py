"""Token shards: text tokenised once, in memory-mapped files beside the manifest of them."""

import bisect
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from uptrain.checkpoint.files import check_link, read_json
from uptrain.checkpoint.staging import replace_file, staged_folder, write_json
from uptrain.data import Documents, Source, open_source
from uptrain.data.tokenise import STARTS, tokenizer_digest, write_shards
from uptrain.errors import CheckpointError, DataError, one_line
from uptrain.progress import progress

MANIFEST = "manifest.json"
SHARD_TOKENS = 2**26
_SEEN = "seen.json"
_FORMAT = 2
_DTYPES = ("<u2", "<u4")
_HASHED_BYTES = 2**24


@dataclass
class TokenShards:
    """Tokens of a corpus in memory-mapped files beside the manifest that describes them."""

    folder: Path
    manifest: dict[str, Any]
    _maps: list[npt.NDArray[Any]] = field(default_factory=list, repr=False)
    _begins: list[int] = field(default_factory=list, repr=False)
    _documents: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0), repr=False)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.manifest["tokens"])

    @property
    def digest(self) -> str:
        """SHA-256 of what was tokenised, how, and of the result."""
        # Where the files are cut is no property of the tokens, but a changed cut does no harm here.
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Read tokens [start, stop), across files: int64 [stop - start]."""
        parts = []
        for number in range(bisect.bisect_right(self._begins, start) - 1, len(self._maps)):
            begin = self._begins[number]
            if begin >= stop:
                break
            parts.append(self._maps[number][max(start - begin, 0) : stop - begin].astype(np.int64))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Find the tokens in [start, stop) that documents begin with."""
        first, last = np.searchsorted(self._documents, np.array([start, stop], np.uint64))
        return self._documents[first:last].astype(np.int64)

    @classmethod
    def open(cls, folder: Path) -> "TokenShards":
        """Open the shards that `prepare` made.

        Raises:
            DataError: If the manifest or a file is missing, malformed or of another size.
        """
        try:
            manifest = read_json(folder / MANIFEST)
            if manifest.get("format") != _FORMAT:
                raise ValueError(f"format {manifest.get('format')}, expected {_FORMAT}")
            if manifest["dtype"] not in _DTYPES:
                raise ValueError(f"dtype {manifest['dtype']}, expected {' or '.join(_DTYPES)}")
            shards = cls(folder, manifest)
            start = 0
            for shard in manifest["shards"]:
                mapped = _map(folder, shard["file"], manifest["dtype"], shard["tokens"])
                shards._maps.append(mapped)
                shards._begins.append(start)
                start += len(mapped)
            if not start:
                raise ValueError("no tokens")
            if start != manifest["tokens"]:
                raise ValueError(f"{start} tokens instead of {manifest['tokens']}")
            shards._documents = _map(folder, STARTS, "<u8", manifest["documents"])
        except (CheckpointError, OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{folder}: its token shards cannot be used ({one_line(error)}); remove the folder"
            ) from error
        return shards

    @classmethod
    def prepare(
        cls,
        folder: Path,
        sources: Sequence[Source | str | Path],
        tokenizer: Any,
        *,
        shared: bool = False,
        shard_tokens: int = SHARD_TOKENS,
    ) -> "TokenShards":
        """Tokenise `sources` into `folder`, or reuse what is there if nothing changed.

        A file counts as unchanged if its size and its times of change are those of when it was last
        hashed; else its SHA-256 decides. Another process that tokenises into `folder` is waited for.

        Args:
            folder: Where the shards are, or will be.
            sources: In the order of their tokens.
            tokenizer: A transformers tokenizer.
            shared: Whether other runs use `folder` too. If something changed, it is refused then,
                and else replaced (said on standard error).
            shard_tokens: Tokens in one file.

        Raises:
            DataError: If a source cannot be read or changes while it is, all of them hold no token,
                `folder` holds something else, or it is shared and of other sources or another
                tokenizer.
        """
        opened = [open_source(source) for source in sources]
        with _alone(folder):
            if folder.exists():
                finding = _find_change(folder, opened, tokenizer)
                if finding is None:
                    return cls.open(folder)
                if shared:
                    raise DataError(
                        f"{folder}: {finding} since it was tokenised; remove it if no other run "
                        "needs it, or choose another data.tokens"
                    )
                print(f"{folder}: {finding}; tokenising again", file=sys.stderr)
                _discard(folder)
            with staged_folder(folder) as staging:
                _make(staging, folder, opened, tokenizer, shard_tokens)
        return cls.open(folder)


def _map(folder: Path, name: str, dtype: str, count: int) -> npt.NDArray[Any]:
    path = folder / Path(name).name
    check_link(path, folder)
    mapped = np.memmap(path, np.dtype(dtype), mode="r")
    if len(mapped) != count:
        raise ValueError(f"{path.name} holds {len(mapped)} entries, expected {count}")
    return mapped.view(np.ndarray)  # slices of which are made faster


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from making or replacing `folder`; wait for one that does."""
    path, lock = folder.with_name(f".{folder.name}.lock"), None
    with suppress(OSError):  # where nothing can be written, what is there can still be read
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _take(path)
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):  # the next run removes it
                path.unlink()
            os.close(lock)


def _take(path: Path) -> int:
    """Lock a file, made if need be; returns its descriptor."""
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path.parent}: waiting for another run that tokenises here", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == path.stat().st_ino:
                return lock
        os.close(lock)  # its last holder removed it: another one may have made a new file


def _find_change(folder: Path, opened: Sequence[Documents], tokenizer: Any) -> str | None:
    """Say what differs between the shards in `folder` and what is wanted; None if nothing does."""
    if not (folder / MANIFEST).is_file():
        # Only what a removal that was cut short leaves behind may be removed further.
        ours = (_SEEN, f".{_SEEN}.partial")
        if any(path.suffix != ".bin" and path.name not in ours for path in folder.iterdir()):
            raise DataError(f"{folder}: holds no token shards but other files; move it away")
        return "the folder is incomplete"
    try:
        manifest = TokenShards.open(folder).manifest
        known = [(entry["file"], entry["sha256"], entry) for entry in manifest["sources"]]
        files = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
        files[STARTS] = manifest["documents_sha256"]
    except (DataError, KeyError, TypeError):
        return "a file is missing, damaged or of another version"
    if manifest.get("tokenizer") != tokenizer_digest(tokenizer):
        return "the tokenizer changed"
    if len(known) != len(opened):
        return f"data.train changed (from {len(known)} sources to {len(opened)})"
    before = _read_seen(folder)
    seen = dict(before)
    for (name, digest, entry), documents in zip(known, opened, strict=True):
        wanted = _describe(documents)
        if wanted["file"] != name:
            return f"data.train changed ({name} became {wanted['file']})"
        is_described = wanted.items() <= entry.items()
        if not is_described or not _is_same(documents.files, digest, seen):
            return f"data.train changed ({name})"
    for name, digest in files.items():
        if not _is_same([folder / Path(name).name], digest, seen):
            return f"{name} is damaged"
    if seen != before:
        with suppress(CheckpointError):  # the folder may be somebody else's
            replace_file(folder / _SEEN, json.dumps(seen).encode())
    return None


def _read_seen(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / _SEEN)
    except CheckpointError:
        return {}


def _is_same(files: Sequence[Path], digest: str, seen: dict[str, Any]) -> bool:
    """Compare files with their SHA-256, unless nothing touched them since that was last done."""
    stamps = {os.path.abspath(file): _stamp(file) for file in files}
    if not stamps.items() <= seen.items():
        if _hash(files) != digest:
            return False
        seen |= stamps
    return True


def _stamp(file: Path) -> list[int]:
    # A file that is replaced under an old date still has a new time of change of its entry.
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _hash(files: Sequence[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    with progress("hash", sum(file.stat().st_size for file in files), "bytes") as advance:
        for path in files:
            with path.open("rb") as file:
                while data := file.read(_HASHED_BYTES):
                    digest.update(data)
                    advance(len(data))
    return digest.hexdigest()


def _describe(documents: Documents) -> dict[str, Any]:
    """Say which text of its files a source is."""
    source = documents.source
    keys = ("config", "split", "column")
    chosen = {key: getattr(source, key) for key in keys if getattr(source, key) is not None}
    size = sum(file.stat().st_size for file in documents.files)
    return {"file": source.dataset or Path(source.name).name, "bytes": size, **chosen}


def _discard(folder: Path) -> None:
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be removed ({error.strerror}); remove it") from error


def _make(
    staging: Path, folder: Path, opened: Sequence[Documents], tokenizer: Any, shard_tokens: int
) -> None:
    """Write all that `folder` is to hold to `staging`."""
    files = [file for documents in opened for file in documents.files]
    seen = {os.path.abspath(file): _stamp(file) for file in files}
    sources = [_describe(each) | {"sha256": _hash(each.files)} for each in opened]
    result = write_shards(staging, opened, tokenizer, shard_tokens)
    for file in files:
        if seen[os.path.abspath(file)] != _stamp(file):
            raise DataError(f"{file}: changed while it was read; start again")
    seen |= {os.path.abspath(folder / path.name): _stamp(path) for path in staging.iterdir()}
    counts = result.pop("sources")
    head = {
        "format": _FORMAT,
        "tokenizer": tokenizer_digest(tokenizer),
        "sources": [source | count for source, count in zip(sources, counts, strict=True)],
        "documents_sha256": _hash([staging / STARTS]),
    }
    write_json(staging / _SEEN, seen)
    write_json(staging / MANIFEST, head | result)
