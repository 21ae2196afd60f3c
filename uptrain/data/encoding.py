"""Documents into tokens, in bulk or with the bytes that each token stands for."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from uptrain.data import Documents
from uptrain.data.source import Fragment

# A longer text goes through the tokenizer in pieces: it takes some 100 bytes of memory a token.
_PIECE_CHARACTERS = 2**20
_BATCH_CHARACTERS = 2**21
_BATCHES_AHEAD = 2
_PROBED_TEXTS, _PROBED_CHARACTERS = 64, 2000

_Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedDocument:
    """One document in tokens."""

    tokens: _Ids
    """[n], the document's first token being bos (else eos) where the tokenizer has one."""
    byte_counts: npt.NDArray[np.int64]
    """[n], bytes of UTF-8 text that each token adds; 0 for a bos in front."""


@dataclass(frozen=True)
class TokenChunk:
    """A document's tokens, or some of them if it is long."""

    tokens: _Ids
    """[n], with the token in front if the document begins here."""
    text_tokens: int
    """Tokens without the one in front."""
    is_first: bool
    source: int
    """Which of the sources it is of, from 0."""
    read_bytes: float
    """Bytes of the sources that were read up to here since the chunk before."""


@dataclass(frozen=True)
class _Piece:
    text: str
    is_first: bool
    is_last: bool
    read_bytes: float
    source: int = 0


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
    front = _front_token(tokenizer)
    tokens: list[_Ids] = []
    counts: list[npt.NDArray[np.int64]] = []
    for piece, ids, ends in _encode_with_ends(_split(Fragment(text) for text in texts), tokenizer):
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


def stream_tokens(sources: Sequence[Documents], tokenizer: Any) -> Iterator[TokenChunk]:
    """Tokenise sources like `encode_documents`, a bounded number of tokens at a time.

    While the tokenizer's own threads work on one batch of text, the next is read and the last one
    is handed on.

    Raises:
        DataError: If a source cannot be read; see `uptrain.data.open_source`.
    """
    pieces = (
        piece
        for number, documents in enumerate(sources)
        for piece in _split(documents.read(tokenizer), number)
    )
    front = _front_token(tokenizer)
    for piece, ids, read_bytes in _encode(pieces, tokenizer):
        tokens = ids
        if piece.is_first and front is not None and ids[:1].tolist() != [front]:
            tokens = np.concatenate([np.array([front]), ids])
        yield TokenChunk(tokens, len(ids), piece.is_first, piece.source, read_bytes)


def _split(fragments: Iterable[Fragment], source: int = 0) -> Iterator[_Piece]:
    """Join fragments, and cut documents where tokenizers cut words themselves."""
    text, is_first, read_bytes = "", True, 0.0
    for fragment in fragments:
        text += fragment.text
        read_bytes += fragment.read_bytes
        start = 0
        while len(text) - start > _PIECE_CHARACTERS:
            stop = _find_cut(text, start, start + _PIECE_CHARACTERS)
            yield _Piece(text[start:stop], is_first, False, read_bytes, source)
            start, is_first, read_bytes = stop, False, 0
        text = text[start:]
        if fragment.is_last:
            yield _Piece(text, is_first, True, read_bytes, source)
            text, is_first, read_bytes = "", True, 0


def _find_cut(text: str, start: int, stop: int) -> int:
    """Find the last line end, else the last space to cut before, else `stop`."""
    newline, space = text.rfind("\n", start, stop) + 1, text.rfind(" ", start + 1, stop)
    return next((cut for cut in (newline, space) if cut > start), stop)


def _encode(pieces: Iterable[_Piece], tokenizer: Any) -> Iterator[tuple[_Piece, _Ids, float]]:
    """Tokenise pieces in batches, a few of them ahead of the one that is handed on."""
    encode: Callable[[list[str]], list[Any]] | None = None
    waiting: deque[tuple[list[_Piece], Future[list[Any]]]] = deque()
    with ThreadPoolExecutor(1, "tokenise") as pool:
        for batch in _batched(pieces):
            texts = [piece.text for piece in batch]
            if encode is None:
                encode = _choose_encoder(tokenizer, texts)
            waiting.append((batch, pool.submit(encode, texts)))
            if len(waiting) > _BATCHES_AHEAD:
                yield from _collect(*waiting.popleft())
        while waiting:
            yield from _collect(*waiting.popleft())


def _collect(
    batch: list[_Piece], encoded: Future[list[Any]]
) -> Iterator[tuple[_Piece, _Ids, float]]:
    """Give the ids of each piece; the bytes of all with the first, for they took time together."""
    read_bytes = sum(piece.read_bytes for piece in batch)
    for piece, encoding in zip(batch, encoded.result(), strict=True):
        ids = getattr(encoding, "ids", encoding)
        yield piece, np.fromiter(ids, np.int64, len(ids)), read_bytes
        read_bytes = 0


def _choose_encoder(tokenizer: Any, texts: Sequence[str]) -> Callable[[list[str]], list[Any]]:
    """Take the tokenizer library's batch call where it gives what the tokenizer itself gives.

    transformers turns all that the library knows of a text into Python lists, which takes longer
    than the tokens alone. But a subclass may do something of its own to the text.
    """

    def encode_whole(texts: list[str]) -> list[Any]:
        return list(_call(tokenizer, texts)["input_ids"])

    def encode_fast(texts: list[str]) -> list[Any]:
        return list(tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    if not tokenizer.is_fast:
        return encode_whole
    probes = [text[:_PROBED_CHARACTERS] for text in texts[:_PROBED_TEXTS]]
    probes.append(" a ".join(map(str, tokenizer.get_added_vocab())))
    # This call comes first: it also takes a file's truncation and padding off the library's side.
    whole = encode_whole(probes)
    alike = whole == [encoding.ids for encoding in encode_fast(probes)]
    return encode_fast if alike else encode_whole


def _call(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning that a document is longer than the model's context
        **options,
    )


def _encode_with_ends(
    pieces: Iterable[_Piece], tokenizer: Any
) -> Iterator[tuple[_Piece, _Ids, npt.NDArray[np.int64] | None]]:
    """Tokenise pieces in batches; yields ids and, if the tokenizer knows, where each's text ends."""
    for batch in _batched(pieces):
        texts = [piece.text for piece in batch]
        encoded = _call(tokenizer, texts, return_offsets_mapping=tokenizer.is_fast)
        for row, piece in enumerate(batch):
            ids = np.array(encoded["input_ids"][row], dtype=np.int64)
            ends = None
            if tokenizer.is_fast:
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
