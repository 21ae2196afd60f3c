"""Tokenise documents into files of tokens."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from uptrain.data import Documents
from uptrain.data.encoding import TokenChunk, stream_tokens
from uptrain.errors import DataError
from uptrain.progress import progress

STARTS = "documents.bin"


def write_shards(
    folder: Path, opened: Sequence[Documents], tokenizer: Any, shard_tokens: int
) -> dict[str, Any]:
    """Tokenise sources into `folder`, one after the other.

    Args:
        folder: Gets `tokens-NNNNN.bin` (uint16 where the vocabulary fits, else uint32) and
            `documents.bin`, the number of the token that each document begins with (uint64).
        opened: The sources.
        tokenizer: A transformers tokenizer.
        shard_tokens: Tokens in one file.

    Returns:
        What the manifest says of the result; `sources` has the counts of each.

    Raises:
        DataError: If a source cannot be read, or there is no token in any.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    dtype = np.dtype("<u2" if largest < 2**16 else "<u4")
    counts = [{"tokens": 0, "documents": 0} for _ in opened]
    tokens = text_tokens = max_token = 0

    def watch(chunks: Iterable[TokenChunk], starts: BinaryIO) -> Iterator[npt.NDArray[Any]]:
        nonlocal tokens, text_tokens, max_token
        size = sum(file.stat().st_size for documents in opened for file in documents.files)
        with progress("tokenise", size, "bytes") as advance:
            for chunk in chunks:
                if chunk.is_first:
                    starts.write(tokens.to_bytes(8, "little"))
                counts[chunk.source]["documents"] += chunk.is_first
                counts[chunk.source]["tokens"] += len(chunk.tokens)
                tokens += len(chunk.tokens)
                text_tokens += chunk.text_tokens
                max_token = max(max_token, int(chunk.tokens.max(initial=0)))
                advance(chunk.read_bytes)
                yield chunk.tokens.astype(dtype)

    with (folder / STARTS).open("xb") as starts:
        stream = watch(stream_tokens(opened, tokenizer), starts)
        shards = _write_files(folder, stream, shard_tokens)
        starts.flush()
        os.fsync(starts.fileno())
    if text_tokens == 0:
        names = ", ".join(documents.source.name for documents in opened)
        raise DataError(f"{names}: the text holds no token; expected text to train on")
    return {
        "dtype": dtype.str,
        "sources": counts,
        "documents": sum(count["documents"] for count in counts),
        "tokens": tokens,
        "max_token": max_token,
        "shards": shards,
    }


def _write_files(
    folder: Path, stream: Iterator[npt.NDArray[Any]], shard_tokens: int
) -> list[dict[str, Any]]:
    """Cut a stream of tokens into files of `shard_tokens` each, the last one shorter."""
    shards: list[dict[str, Any]] = []
    rest: npt.NDArray[Any] | None = np.zeros(0, dtype=np.uint16)
    while rest is not None:
        path = folder / f"tokens-{len(shards):05d}.bin"
        with path.open("xb") as file:
            count, digest, rest = _fill(file, itertools.chain([rest], stream), shard_tokens)
            file.flush()
            os.fsync(file.fileno())
        shards.append({"file": path.name, "tokens": count, "sha256": digest})
    return shards


def _fill(
    file: BinaryIO, stream: Iterator[npt.NDArray[Any]], shard_tokens: int
) -> tuple[int, str, npt.NDArray[Any] | None]:
    """Write one file; returns its tokens, its SHA-256, and what is left for the next file."""
    count, digest = 0, hashlib.sha256()
    for ids in stream:
        taken, rest = ids[: shard_tokens - count], ids[shard_tokens - count :]
        file.write(taken.tobytes())
        digest.update(taken.tobytes())
        count += len(taken)
        if len(rest):
            return count, digest.hexdigest(), rest
    return count, digest.hexdigest(), None


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of everything of a tokenizer that decides how a text is cut into tokens."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for key in ("truncation", "padding"):  # of the last call, not of the tokenizer
            content.pop(key, None)
    else:
        content = tokenizer.get_vocab()
    content = [
        content,
        type(tokenizer).__name__,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
