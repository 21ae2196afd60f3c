"""Documents into tokens: the tokenizer's own, in bulk and with their bytes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from test_data import TEXTS, write
from tiny_run import EXAMPLE
from transformers import AutoTokenizer

from uptrain.data import open_source
from uptrain.data.encoding import encode_documents, stream_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE)


def test_tokens_are_the_tokenizers_own_with_one_in_front(tokenizer):
    for text, document in zip(TEXTS, encode_documents(TEXTS, tokenizer), strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        front = [] if text.startswith("<|endoftext|>") else [tokenizer.bos_token_id]
        assert document.tokens.tolist() == front + ids
        assert document.byte_counts[0] == 0


def test_byte_counts_add_up_to_the_text(tokenizer):
    for text, document in zip(TEXTS, encode_documents(TEXTS, tokenizer), strict=True):
        special = len("<|endoftext|>") if text.startswith("<|") else 0
        assert document.byte_counts.sum() == len(text.encode()) - special
        assert len(document.byte_counts) == len(document.tokens)
        assert document.byte_counts.min(initial=0) >= 0


def test_a_long_document_is_cut_without_a_trace(tokenizer, monkeypatch):
    text = "Some words of a long text,\nin lines and sentences. " * 40
    (whole,) = encode_documents([text], tokenizer)
    monkeypatch.setattr("uptrain.data.encoding._PIECE_CHARACTERS", 100)
    monkeypatch.setattr("uptrain.data.encoding._BATCH_CHARACTERS", 250)
    first, second = encode_documents([text, "x" * 1000], tokenizer)
    assert first.tokens.tolist() == whole.tokens.tolist()
    assert first.byte_counts.tolist() == whole.byte_counts.tolist()
    assert second.byte_counts.sum() == 1000


def test_without_offsets_bytes_are_spread_evenly(tokenizer):
    class Slow:
        is_fast = False
        bos_token_id = None
        eos_token_id = None

        def __call__(self, texts, **options):
            return {"input_ids": [[7, 8, 9] for _ in texts]}

    (document,) = encode_documents(["zwölf Käse"], Slow())
    assert document.tokens.tolist() == [7, 8, 9]
    assert document.byte_counts.tolist() == [4, 4, 4]


def streamed(tokenizer, *paths: Path) -> list[list[int]]:
    """The tokens of each document."""
    documents: list[list[int]] = []
    for chunk in stream_tokens([open_source(path) for path in paths], tokenizer):
        if chunk.is_first:
            documents.append([])
        documents[-1] += chunk.tokens.tolist()
    return documents


@pytest.mark.parametrize("characters", [10, 100, 2**20])
def test_a_stream_gives_the_same_tokens(tmp_path, tokenizer, monkeypatch, characters):
    monkeypatch.setattr("uptrain.data.encoding._BATCH_CHARACTERS", characters)
    paths = [
        write(tmp_path / f"{n}.jsonl", *({"text": text} for text in TEXTS[n:])) for n in range(3)
    ]
    expected = [
        document.tokens.tolist()
        for n in range(3)
        for document in encode_documents(TEXTS[n:], tokenizer)
    ]
    assert streamed(tokenizer, *paths) == expected


def test_a_stream_cuts_long_documents_like_the_rest(tmp_path, tokenizer, monkeypatch):
    text = "Some words of a long text,\nin lines and sentences. " * 40 + "x" * 500
    path = tmp_path / "a.txt"
    path.write_text(text)
    monkeypatch.setattr("uptrain.data.encoding._PIECE_CHARACTERS", 100)
    monkeypatch.setattr("uptrain.data.files._READ_BYTES", 77)
    (expected,) = encode_documents([text], tokenizer)
    chunks = list(stream_tokens([open_source(path)], tokenizer))
    assert len(chunks) > 20
    assert np.concatenate([chunk.tokens for chunk in chunks]).tolist() == expected.tokens.tolist()
    assert [chunk.is_first for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert sum(chunk.read_bytes for chunk in chunks) == path.stat().st_size


def test_a_file_with_truncation_or_padding_cuts_nothing(tmp_path):
    limited = AutoTokenizer.from_pretrained(EXAMPLE)
    limited.backend_tokenizer.enable_truncation(4)
    limited.backend_tokenizer.enable_padding(length=16)
    path = write(
        tmp_path / "a.jsonl", {"text": "many words of one sentence in a row"}, {"text": "a"}
    )
    first, second = streamed(limited, path)
    assert len(first) > 5
    assert len(second) == 2


def test_a_tokenizer_with_ways_of_its_own_keeps_them(tmp_path, tokenizer):
    class Loud:
        is_fast = True
        backend_tokenizer = tokenizer.backend_tokenizer
        bos_token_id = tokenizer.bos_token_id

        def __call__(self, texts, **options):
            return tokenizer([text.upper() for text in texts], **options)

        def get_added_vocab(self):
            return {}

    path = write(tmp_path / "a.jsonl", {"text": "quiet words"})
    shout = tokenizer("QUIET WORDS", add_special_tokens=False)["input_ids"]
    assert streamed(Loud(), path) == [[tokenizer.bos_token_id, *shout]]


def test_what_is_in_memory_does_not_grow_with_the_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("uptrain.data.encoding._BATCH_CHARACTERS", 100)
    path = write(tmp_path / "a.jsonl", *({"text": "twenty characters. ."} for _ in range(400)))
    read = []
    documents = open_source(path)

    def watched(_tokenizer):
        for fragment in documents.read(_tokenizer):
            read.append(fragment)
            yield fragment

    source = type(documents)(documents.source, documents.files, watched)
    for taken, _ in enumerate(itertools.islice(stream_tokens([source], tokenizer), 300), 1):
        # Five documents make a batch: one handed on, two ahead, one being filled.
        assert len(read) - taken <= 20
