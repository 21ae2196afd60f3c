"""Blocks of a text against the stream written out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_quality import TEXTS, save_tokenizer, stream
from transformers import AutoTokenizer

from uptrain.errors import DataError
from uptrain.evaluation.blocks import read_blocks, read_tokens, source_bytes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_blocks_are_cut_from_the_stream_and_the_short_one_dropped(
    tokenizer: object, data: Path, rows: int
) -> None:
    expected = stream()
    blocks = list(read_blocks(data, tokenizer, 7, None, rows))
    whole = (len(expected) - 1) // 7 * 7
    assert np.concatenate([b.inputs.ravel() for b in blocks]).tolist() == expected[:whole]
    assert np.concatenate([b.labels.ravel() for b in blocks]).tolist() == expected[1 : whole + 1]
    assert [len(b.inputs) for b in blocks][:-1] == [rows] * (len(blocks) - 1)
    assert all(b.inputs.shape == b.documents.shape == b.byte_counts.shape for b in blocks)
    assert read_tokens(data, tokenizer, 7, None).tolist() == expected[: whole + 1]


def test_labels_know_their_document_and_its_bytes(tokenizer: object, data: Path) -> None:
    (blocks,) = read_blocks(data, tokenizer, 1, None, 1000)
    documents, byte_counts = blocks.documents.ravel(), blocks.byte_counts.ravel()
    for number, text in enumerate(TEXTS):
        # The first token of the stream is never predicted, and it is a bos, without bytes.
        is_first = number == 0
        assert (documents == number).sum() == len(text.encode()) + 1 - is_first
        assert byte_counts[documents == number].sum() == len(text.encode())
    assert (byte_counts[blocks.labels.ravel() == 256] == 0).all()
    first_of_all = data.stat().st_size / len(stream())
    assert source_bytes(data) == data.stat().st_size
    assert blocks.read_bytes == pytest.approx(data.stat().st_size, abs=3 * first_of_all + 1)


def test_no_more_blocks_than_wanted(tokenizer: object, data: Path) -> None:
    for rows in (1, 2, 3):
        blocks = list(read_blocks(data, tokenizer, 7, 20, rows))
        assert sum(len(b.inputs) for b in blocks) == 2
        assert np.concatenate([b.inputs.ravel() for b in blocks]).tolist() == stream()[:14]


def test_many_documents_are_held_a_few_at_a_time(tokenizer: object, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text('{"text": "abc"}\n' * 1000)
    sizes = [b.inputs.size for b in read_blocks(path, tokenizer, 10, None, 3)]
    assert sum(sizes) == (4 * 1000 - 1) // 10 * 10
    assert max(sizes) == 30


def test_text_without_a_token_or_a_block(tokenizer: object, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n' * 20)
    with pytest.raises(DataError, match="its text has no token; expected text to predict"):
        list(read_blocks(path, tokenizer, 4, None, 100))
    path.write_text('{"text": "abc"}\n')
    with pytest.raises(DataError, match="has 4 tokens, expected at least 5 to fill one block"):
        list(read_blocks(path, tokenizer, 4, None, 1))
