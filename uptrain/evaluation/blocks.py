"""A text as blocks of tokens to predict, with the document and the bytes of each."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from uptrain.data import Documents, open_source
from uptrain.data.encoding import EncodedDocument, encode_documents
from uptrain.errors import DataError

Ids = npt.NDArray[np.int64]

_READ_BLOCKS = 256  # at a time, where all of them are kept


@dataclass(frozen=True)
class Blocks:
    """Some whole blocks of a text, one behind the other; each array is [blocks, length]."""

    inputs: Ids
    labels: Ids
    """The token behind each input."""
    documents: Ids
    """Which document each label is of, counted from 0."""
    byte_counts: Ids
    """UTF-8 bytes of the text that each label adds."""
    read_bytes: int
    """Bytes of the source that the labels took."""


def read_blocks(
    path: Path, tokenizer: Any, length: int, max_tokens: int | None, rows: int
) -> Iterator[Blocks]:
    """Read as many whole blocks as there are, or as are wanted, a few at a time.

    Args:
        path: A file or data set, as for `uptrain.data.open_source`.
        tokenizer: A transformers tokenizer.
        length: Inputs of a block. Documents follow one another in the stream that is cut in blocks.
        max_tokens: Predict at most so many; all if not given. The last short block is dropped.
        rows: Blocks to give at a time.

    Raises:
        DataError: If the text cannot be read, has no token, or fills no block.
    """
    left = None if max_tokens is None else max_tokens // length
    parts: list[Ids] = []
    found, waiting, text_bytes, given = 0, 0, 0, 0
    for columns in _encode(open_source(path), tokenizer):
        parts.append(columns)
        found += columns.shape[1]
        waiting += columns.shape[1]
        text_bytes += int(columns[2].sum())
        while (wanted := _wanted(rows, left, given)) and waiting > wanted * length:
            pending = np.concatenate(parts, axis=1)
            yield _cut(pending, wanted, length)
            given += wanted
            parts, waiting = [pending[:, wanted * length :]], waiting - wanted * length
        if not wanted:
            break
    if not text_bytes:
        raise DataError(f"{path}: its text has no token; expected text to predict")
    if rest := _wanted((waiting - 1) // length, left, given):
        yield _cut(np.concatenate(parts, axis=1), rest, length)
    elif not given:
        raise DataError(
            f"{path}: has {found} tokens, expected at least {length + 1} to fill one block; "
            f"give more text, or choose a --sequence-length below {found}"
        )


def read_tokens(path: Path, tokenizer: Any, length: int, max_tokens: int | None) -> Ids:
    """Read whole blocks at once: [blocks * length + 1], every token but the first to be predicted.

    Raises:
        DataError: As `read_blocks`.
    """
    parts = list(read_blocks(path, tokenizer, length, max_tokens, _READ_BLOCKS))
    return np.concatenate([*(part.inputs.ravel() for part in parts), parts[-1].labels[-1, -1:]])


def source_bytes(path: Path) -> int:
    """Give the bytes of the files that a text is read from: what `read_bytes` adds up to."""
    return sum(file.stat().st_size for file in open_source(path).files)


def _wanted(rows: int, left: int | None, given: int) -> int:
    return rows if left is None else min(rows, left - given)


def _encode(documents: Documents, tokenizer: Any) -> Iterator[Ids]:
    """Give for each document [4, tokens]: token, document, bytes of text, bytes of the source."""
    sizes: deque[float] = deque()  # of the documents that are in the tokenizer

    def texts() -> Iterator[str]:
        parts: list[str] = []
        size = 0.0
        for fragment in documents.read(tokenizer):
            parts.append(fragment.text)
            size += fragment.read_bytes
            if fragment.is_last:
                sizes.append(size)
                yield "".join(parts)
                parts, size = [], 0.0

    for number, document in enumerate(encode_documents(texts(), tokenizer)):
        yield _columns(document, number, round(sizes.popleft()))


def _columns(document: EncodedDocument, number: int, size: int) -> Ids:
    tokens = len(document.tokens)
    shares = np.diff(np.arange(tokens + 1) * size // max(tokens, 1))
    return np.stack([document.tokens, np.full(tokens, number), document.byte_counts, shares])


def _cut(pending: Ids, rows: int, length: int) -> Blocks:
    """Take blocks from the front of [4, tokens]; the token behind them stays the next input."""
    end = rows * length
    labels, documents, byte_counts, shares = pending[:, 1 : end + 1].reshape(4, rows, length)
    return Blocks(
        pending[0, :end].reshape(rows, length),
        labels,
        documents,
        byte_counts,
        int(shares.sum()),
    )
