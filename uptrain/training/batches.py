"""Token shards, and a pure function from (data, seed, step) to a batch."""

import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from uptrain.checkpoint.reader import read_json
from uptrain.checkpoint.writer import staged_folder, write_json
from uptrain.data import TokenChunk, check_file, stream_tokens
from uptrain.errors import CheckpointError, DataError
from uptrain.progress import progress

MANIFEST = "manifest.json"
SHARD_TOKENS = 2**26
_FORMAT = 1


@dataclass
class TokenShards:
    """Tokens of a corpus in memory-mapped files beside the manifest that describes them."""

    folder: Path
    manifest: dict[str, Any]
    _maps: list[npt.NDArray[Any]] = field(default_factory=list, repr=False)
    _starts: list[int] = field(default_factory=list, repr=False)

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
        parts = [
            shard[max(start - begin, 0) : stop - begin].astype(np.int64)
            for begin, shard in zip(self._starts, self._maps, strict=True)
            if begin < stop and start < begin + len(shard)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

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
            shards = cls(folder, manifest)
            start = 0
            for shard in manifest["shards"]:
                path = folder / Path(shard["file"]).name
                mapped = np.memmap(path, np.dtype(manifest["dtype"]), mode="r")
                if len(mapped) != shard["tokens"]:
                    raise ValueError(f"{path.name} holds {len(mapped)} tokens")
                shards._maps.append(mapped)
                shards._starts.append(start)
                start += len(mapped)
            if start != manifest["tokens"]:
                raise ValueError(f"{start} tokens instead of {manifest['tokens']}")
        except (CheckpointError, OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{folder}: its token shards cannot be used ({error}); remove the folder"
            ) from error
        return shards

    @classmethod
    def prepare(
        cls,
        folder: Path,
        paths: Sequence[Path],
        tokenizer: Any,
        shard_tokens: int = SHARD_TOKENS,
    ) -> "TokenShards":
        """Tokenise `paths` into `folder`, or reuse what is there if nothing changed.

        Args:
            folder: Replaced when the sources or the tokenizer changed (said on standard error).
            paths: The files, in the order of their tokens; see `uptrain.data.read_documents`.
            tokenizer: A transformers tokenizer.
            shard_tokens: Tokens in one file.

        Raises:
            DataError: If a file cannot be read, all of them hold no token, or `folder` holds
                something else.
        """
        for path in paths:
            check_file(path)
        wanted = {
            "format": _FORMAT,
            "tokenizer": tokenizer_digest(tokenizer),
            "sources": [
                {"file": path.name, "bytes": path.stat().st_size, "sha256": _file_digest(path)}
                for path in paths
            ],
        }
        if folder.exists():
            finding = _find_change(folder, wanted)
            if finding is None:
                return cls.open(folder)
            print(f"{folder}: {finding}; tokenising again", file=sys.stderr)
            _discard(folder)
        with staged_folder(folder) as staging:
            result = _write_shards(staging, paths, tokenizer, shard_tokens)
            write_json(staging / MANIFEST, wanted | result)
        return cls.open(folder)


@dataclass(frozen=True)
class Batches:
    """The batches of a run: block i is the tokens [iL, iL+L], in an order drawn anew each epoch."""

    shards: TokenShards
    sequence_length: int
    batch_sequences: int
    """Blocks in one step, over all processes."""
    seed: int

    @property
    def blocks(self) -> int:
        """Number of whole blocks of `sequence_length` inputs, each with its targets."""
        return max(self.shards.tokens - 1, 0) // self.sequence_length

    def check(self, steps: int, repeat: bool) -> None:
        """Refuse data that cannot feed `steps` steps.

        Raises:
            DataError: If there is less than one batch, or less than `steps` and no `repeat`.
        """
        batch_tokens = self.batch_sequences * self.sequence_length
        found = f"data.train holds {self.shards.tokens:,} tokens"
        if self.blocks < self.batch_sequences:
            raise DataError(
                f"{found}, fewer than one batch of {batch_tokens:,} (and one more to predict); "
                "add text or lower train.batch_tokens"
            )
        wanted = steps * self.batch_sequences
        if wanted > self.blocks and not repeat:
            raise DataError(
                f"{found}, but {steps:,} steps of {batch_tokens:,} need "
                f"{steps * batch_tokens + 1:,}; add text, lower the budget, or set "
                f"data.repeat: true to go over the text {wanted / self.blocks:.1f} times"
            )

    def indices(self, step: int, rank: int = 0, world_size: int = 1) -> npt.NDArray[np.int64]:
        """Blocks of step `step` (from 0) that process `rank` of `world_size` takes.

        The parts of all ranks, in their order, make the same batch for any `world_size`, which must
        divide `batch_sequences`.
        """
        whole = batch_indices(step, self.batch_sequences, self.blocks, self.seed)
        return np.split(whole, world_size)[rank]

    def read(self, indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read blocks as inputs and targets, both int64 [len(indices), sequence_length]."""
        length = self.sequence_length
        rows = [self.shards.read(i * length, i * length + length + 1) for i in indices]
        tokens = torch.from_numpy(np.stack(rows))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def batch_indices(step: int, batch_sequences: int, blocks: int, seed: int) -> npt.NDArray[np.int64]:
    """Give the block numbers of one step, a pure function of the arguments.

    The infinite order of blocks is one permutation of all of them after another, each drawn from
    (seed, epoch); step s takes its places [s * batch_sequences, (s + 1) * batch_sequences).

    Args:
        step: From 0.
        batch_sequences: Blocks in one step, over all processes.
        blocks: Number of blocks in the data, at least 1.
        seed: Of the order.

    Returns:
        [batch_sequences] block numbers.
    """
    places = np.arange(step * batch_sequences, (step + 1) * batch_sequences)
    epochs, places = np.divmod(places, blocks)
    result = np.empty(batch_sequences, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        result[here] = _permutation(blocks, seed, epoch)[places[here]]
    return result


@functools.lru_cache(maxsize=2)
def _permutation(blocks: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(blocks)


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


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_change(folder: Path, wanted: dict[str, Any]) -> str | None:
    """Say why the shards in `folder` are not those of `wanted`; None if they are."""
    if not (folder / MANIFEST).is_file():
        # Only what a removal that was cut short leaves behind may be removed further.
        if any(path.suffix != ".bin" for path in folder.iterdir()):
            raise DataError(f"{folder}: holds no token shards but other files; move it away")
        return "is incomplete"
    try:
        shards = TokenShards.open(folder)
    except DataError:
        return "is damaged"
    manifest = shards.manifest
    for key, text in (("tokenizer", "the tokenizer"), ("sources", "the text of data.train")):
        if manifest.get(key) != wanted[key]:
            return f"{text} changed"
    for shard in manifest["shards"]:
        if _file_digest(folder / Path(shard["file"]).name) != shard["sha256"]:
            return "is damaged"
    return None


def _discard(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _write_shards(
    folder: Path, paths: Sequence[Path], tokenizer: Any, shard_tokens: int
) -> dict[str, Any]:
    """Tokenise into `folder`; returns what the manifest says of the result."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    dtype = np.dtype("<u2" if largest < 2**16 else "<u4")
    documents = text_tokens = max_token = 0

    def watched(chunks: Iterable[TokenChunk]) -> Iterator[npt.NDArray[Any]]:
        nonlocal documents, text_tokens, max_token
        with progress("tokenise", sum(path.stat().st_size for path in paths), "bytes") as advance:
            for chunk in chunks:
                documents += chunk.is_first
                text_tokens += chunk.text_tokens
                max_token = max(max_token, int(chunk.tokens.max(initial=0)))
                advance(chunk.file_bytes)
                yield chunk.tokens.astype(dtype)

    shards = _write_files(folder, watched(stream_tokens(paths, tokenizer)), shard_tokens)
    if text_tokens == 0:
        names = ", ".join(map(str, paths)) or "data.train"
        raise DataError(f"{names}: the text holds no token; expected text to train on")
    return {
        "dtype": dtype.str,
        "documents": documents,
        "tokens": sum(shard["tokens"] for shard in shards),
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
