"""Documents of text files, and their tokens with the bytes that each stands for."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from uptrain.errors import DataError

# A longer text goes through the tokenizer in pieces: it takes some 100 bytes of memory a token.
_PIECE_CHARACTERS = 2**20
_BATCH_CHARACTERS = 2**21
_BYTE_ORDER_MARK = "\ufeff"  # some editors put it at the start of a file; it is no text


@dataclass(frozen=True)
class EncodedDocument:
    """One document in tokens."""

    tokens: npt.NDArray[np.int64]
    """[n], the document's first token being bos (else eos) where the tokenizer has one."""
    byte_counts: npt.NDArray[np.int64]
    """[n], bytes of UTF-8 text that each token adds; 0 for a bos in front."""


@dataclass(frozen=True)
class _Piece:
    text: str
    is_first: bool
    is_last: bool
    file_bytes: int
    """How much of the file is read once this piece is."""


@dataclass(frozen=True)
class TokenChunk:
    """A document's tokens, or some of them if it is long."""

    tokens: npt.NDArray[np.int64]
    """[n], with the token in front if the document begins here."""
    text_tokens: int
    """Tokens without the one in front."""
    is_first: bool
    file_bytes: int
    """Bytes of the file that the document took, given with its last chunk, else 0."""


def read_documents(path: str | Path, tokenizer: Any) -> Iterator[str]:
    """Read the documents of a file, one at a time.

    Args:
        path: `.jsonl` holds one JSON object a line, with `text`, or with `messages` for the
            tokenizer's chat template. Any other file is plain UTF-8 text, one document.
        tokenizer: The transformers tokenizer whose chat template is used.

    Yields:
        The text of each document; the template's text for `messages`.

    Raises:
        DataError: If the file cannot be read, is not UTF-8, or a line is not such an object; the
            message names the line.
    """
    for text, _ in _read(Path(path), tokenizer):
        yield text


def encode_documents(texts: Iterable[str], tokenizer: Any) -> Iterator[EncodedDocument]:
    """Tokenise documents, and say how many bytes of text each token stands for.

    Documents go through the tokenizer in batches. Those above a million characters are cut at a
    line end or a space first, and their pieces joined again.

    Args:
        texts: The documents.
        tokenizer: A transformers tokenizer. A slow one knows no offsets: a document's bytes are
            then spread evenly over its tokens.

    Yields:
        The documents in order. `bos_token` (else `eos_token`, else nothing) is put in front, unless
        the text itself begins with it; no other special token is added.
    """
    pieces = (piece for text in texts for piece in _split(text, 0))
    front = _front_token(tokenizer)
    tokens: list[npt.NDArray[np.int64]] = []
    counts: list[npt.NDArray[np.int64]] = []
    for piece, ids, ends in _encode(pieces, tokenizer, with_offsets=True):
        byte_counts = _count_bytes(piece.text, len(ids), ends)
        if piece.is_first and front is not None:
            if ids[:1].tolist() == [front]:
                byte_counts[0] = 0
            else:
                tokens.append(np.array([front]))
                counts.append(np.array([0]))
        tokens.append(ids)
        counts.append(byte_counts)
        if piece.is_last:
            yield EncodedDocument(np.concatenate(tokens), np.concatenate(counts))
            tokens, counts = [], []


def stream_tokens(paths: Iterable[Path], tokenizer: Any) -> Iterator[TokenChunk]:
    """Tokenise files like `encode_documents`, a bounded number of tokens at a time.

    Raises:
        DataError: As `read_documents`.
    """
    pieces = (
        piece
        for path in paths
        for text, file_bytes in _read(path, tokenizer)
        for piece in _split(text, file_bytes)
    )
    front = _front_token(tokenizer)
    for piece, ids, _ in _encode(pieces, tokenizer, with_offsets=False):
        tokens = ids
        if piece.is_first and front is not None and ids[:1].tolist() != [front]:
            tokens = np.concatenate([np.array([front]), ids])
        yield TokenChunk(tokens, len(ids), piece.is_first, piece.file_bytes)


def _read(path: Path, tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Yield each document with the number of bytes of the file that it took."""
    check_file(path)
    try:
        if path.suffix != ".jsonl":
            data = path.read_bytes()
            try:
                yield data.decode().removeprefix(_BYTE_ORDER_MARK), len(data)
            except UnicodeDecodeError as error:
                number = data.count(b"\n", 0, error.start) + 1
                raise _not_utf8(path, number, data[error.start]) from error
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = _decode(line, path, number)
                if text.strip():
                    yield _parse_line(text, path, number, tokenizer), len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, line[error.start]) from error
    return text.removeprefix(_BYTE_ORDER_MARK) if number == 1 else text


def _not_utf8(path: Path, number: int, byte: int) -> DataError:
    return DataError(
        f"{path}: line {number} is not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8"
    )


def _parse_line(line: str, path: Path, number: int, tokenizer: Any) -> str:
    where = f"{path}: line {number}"
    way_out = 'expected {"text": "…"} or {"messages": […]} on every line'
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise DataError(f"{where} is not JSON ({reason}); {way_out}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a JSON {type(row).__name__}, no object; {way_out}")
    if "text" in row:
        text = row["text"]
        if not isinstance(text, str):
            raise DataError(f"{where}: text is a {type(text).__name__}, no string; {way_out}")
    elif "messages" in row:
        text = _apply_template(row["messages"], where, tokenizer)
    else:
        keys = ", ".join(map(str, row))[:80] or "none"
        raise DataError(f"{where} has neither text nor messages (its keys: {keys}); {way_out}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair, which is no character; remove or replace it"
        ) from error
    return text


def _apply_template(messages: Any, where: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} has messages, but the model's tokenizer has no chat template; "
            "give plain text, or add chat_template.jinja to the model's folder"
        )
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(message, dict) and "role" in message for message in messages)
    ):
        raise DataError(
            f'{where}: messages is no list of {{"role": …, "content": …}} objects; correct the line'
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (
        Exception
    ) as error:  # a template is a program of the model's author: it may raise anything
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"{where}: the model's chat template refuses the messages ({reason}); correct the line"
        ) from error


def check_file(path: Path) -> None:
    """Raise DataError unless `path` is a file."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path}: {found}; expected a .jsonl or plain text file")


def _split(text: str, file_bytes: int) -> Iterator[_Piece]:
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        stop = start + _PIECE_CHARACTERS
        # A cut behind a line end, else before a space, is where tokenizers cut words themselves.
        newline, space = text.rfind("\n", start, stop) + 1, text.rfind(" ", start + 1, stop)
        stop = next((cut for cut in (newline, space) if cut > start), stop)
        yield _Piece(text[start:stop], start == 0, False, 0)
        start = stop
    yield _Piece(text[start:], start == 0, True, file_bytes)


def _encode(
    pieces: Iterable[_Piece], tokenizer: Any, with_offsets: bool
) -> Iterator[tuple[_Piece, npt.NDArray[np.int64], npt.NDArray[np.int64] | None]]:
    """Tokenise pieces in batches; yields ids and, if asked and known, the end of each's text."""
    with_offsets = with_offsets and tokenizer.is_fast
    for batch in _batched(pieces):
        encoded = tokenizer(
            [piece.text for piece in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=with_offsets,
            verbose=False,  # no warning that a document is longer than the model's context
        )
        for row, piece in enumerate(batch):
            ids = np.array(encoded["input_ids"][row], dtype=np.int64)
            ends = None
            if with_offsets:
                offsets = np.array(encoded["offset_mapping"][row], dtype=np.int64).reshape(-1, 2)
                ends = offsets[:, 1]
            yield piece, ids, ends


def _batched(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _count_bytes(
    text: str, tokens: int, ends: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.int64]:
    """Share the bytes of `text` among its tokens: [tokens], with their exact sum."""
    if tokens == 0:
        return np.zeros(0, dtype=np.int64)
    if ends is None:
        total = len(text.encode())
        return np.diff(np.arange(tokens + 1) * total // tokens)
    # Code points to bytes: a continuation byte (10xxxxxx) begins no character.
    raw = np.frombuffer(text.encode(), dtype=np.uint8)
    byte_of = np.append(np.flatnonzero((raw & 0xC0) != 0x80), len(raw))
    # Tokens that share a character all end behind it: the first of them takes its bytes. The last
    # token takes what the tokenizer stripped at the end.
    reached = np.maximum.accumulate(ends)
    reached[-1] = len(text)
    return np.diff(byte_of[reached], prepend=0)


def _front_token(tokenizer: Any) -> int | None:
    token = tokenizer.bos_token_id
    token = tokenizer.eos_token_id if token is None else token
    return None if token is None else int(token)
