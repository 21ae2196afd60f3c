"""Documents of plain text and jsonl files."""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from uptrain.data.source import Documents, Fragment, Source, to_text, unreadable
from uptrain.errors import DataError, one_line

_READ_BYTES = 2**20
_MAX_LINE_BYTES = 2**28  # a line is held in memory, a plain text is not
_BYTE_ORDER_MARK = "\ufeff"  # some editors put it at the start of a file; it is no text


def open_file(source: Source, path: Path) -> Documents:
    """Open text: one document in all, or one a line in jsonl; `.gz` is unpacked on the way.

    Raises:
        DataError: If a column is asked of plain text. While reading: if text is not UTF-8, or a
            line is no object with text.
    """
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".jsonl":
        return Documents(source, (path,), lambda tokenizer: _read_lines(path, source, tokenizer))
    if source.column is not None:
        raise DataError(f"{path}: plain text has no column; leave it out")
    return Documents(source, (path,), lambda tokenizer: _read_text(path))


def _read_text(path: Path) -> Iterator[Fragment]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, before = 1, 0
    with _open(path) as (file, position):
        is_last = False
        while not is_last:
            data = file.read(_READ_BYTES)
            is_last = not data
            try:
                text = decoder.decode(data, final=is_last)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise _not_utf8(path, line, error.object[error.start]) from error
            if "\0" in text:
                line += text.count("\n", 0, text.index("\0"))
                raise DataError(
                    f"{path}: line {line} holds a NUL, which no text does; it is damaged, or in "
                    "another encoding: convert the file to UTF-8"
                )
            line += text.count("\n")
            text = text if before else text.removeprefix(_BYTE_ORDER_MARK)
            yield Fragment(text, is_last, position() - before)
            before = position()


def _read_lines(path: Path, source: Source, tokenizer: Any) -> Iterator[Fragment]:
    before = 0
    with _open(path) as (file, position):
        lines = iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            if len(line) > _MAX_LINE_BYTES:
                raise DataError(
                    f"{path}: line {number} is longer than {_MAX_LINE_BYTES / 2**20:g} MiB; "
                    "expected one document on every line, cut it"
                )
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, line[error.start]) from error
            text = text.removeprefix(_BYTE_ORDER_MARK) if number == 1 else text
            if text.strip():
                document = _parse_line(text, source.column, f"{path}: line {number}", tokenizer)
                yield Fragment(document, True, position() - before)
                before = position()


@contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Open a file, packed or not; yields it, and a call for the place that was read up to."""
    try:
        with path.open("rb") as raw:
            packed = path.suffix == ".gz"
            yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw, raw.tell
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def _not_utf8(path: Path, line: int, byte: int) -> DataError:
    return DataError(
        f"{path}: line {line} is not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8"
    )


def _parse_line(line: str, column: str | None, where: str, tokenizer: Any) -> str:
    way_out = 'expected {"text": "…"} or {"messages": […]} on every line'
    if column is not None:
        way_out = f'expected {{"{column}": "…"}} on every line'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({one_line(error)[:80]}); {way_out}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a JSON {type(row).__name__}, no object; {way_out}")
    key = column or ("text" if "text" in row else "messages")
    if key not in row:
        lacks = f"has no {column}" if column else "has neither text nor messages"
        keys = ", ".join(map(str, row))[:80] or "none"
        raise DataError(f"{where} {lacks} (its keys: {keys}); {way_out}")
    return to_text(row[key], key, where, tokenizer)
