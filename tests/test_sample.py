"""Calibration text: drawn by seed from everywhere in a file, in bounded memory."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from uptrain.conversion.sample import draw_blocks
from uptrain.errors import DataError

WORDS = 1000


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token for each of the words w0 … w999; nothing in front of a text."""
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"?": WORDS}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def write(path: Path, documents: list[list[int]]) -> Path:
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in words)}) for words in documents]
    path.write_text("\n".join(lines) + "\n")
    return path


def draw(path: Path, tokenizer: Any, tokens: int, length: int = 8, seed: int = 0) -> torch.Tensor:
    return draw_blocks(path, tokenizer, tokens, length, seed, WORDS + 1)


def test_blocks_are_runs_of_the_text(tmp_path: Path, tokenizer: Any) -> None:
    # Documents of 12 successive numbers each: one passage, which no cut may end within a word.
    documents = [list(range(12 * i, 12 * i + 12)) for i in range(80)]
    blocks = draw(write(tmp_path / "a.jsonl", documents), tokenizer, 64)
    assert blocks.shape == (8, 8)
    assert blocks.dtype == torch.int64
    assert bool((blocks.diff(dim=1) == 1).all())


def test_the_kind_of_file_changes_nothing(tmp_path: Path, tokenizer: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lines = write(tmp_path / "a.jsonl", [list(range(12 * i, 12 * i + 12)) for i in range(80)])
    texts = [json.loads(line)["text"] for line in lines.read_text().splitlines()]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    blocks = [draw(path, tokenizer, 64) for path in (lines, tmp_path / "a.parquet")]
    assert torch.equal(*blocks)


def test_blocks_come_from_everywhere(tmp_path: Path, tokenizer: Any) -> None:
    # Only 40 of 250 documents are wanted: a reader of the file's beginning would see the first 40.
    documents = [[i % WORDS] * 40 for i in range(250)]
    path = write(tmp_path / "a.jsonl", documents)
    seen = draw(path, tokenizer, 40 * 8)[:, 0]
    assert len(seen) == 40
    for quarter in range(4):
        inside = (seen >= 62 * quarter) & (seen < 62 * (quarter + 1))
        assert int(inside.sum()) >= 3


def test_late_parts_of_one_long_document_appear(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" ".join(f"w{i * WORDS // 20_000}" for i in range(20_000)))
    seen = draw(path, tokenizer, 40 * 8).float().mean(1)
    assert seen.min() < 250
    assert seen.max() > 750


def test_the_seed_draws(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [list(range(100 * i, 100 * i + 100)) for i in range(10)])
    first = draw(path, tokenizer, 64)
    assert torch.equal(first, draw(path, tokenizer, 64))
    assert not torch.equal(first, draw(path, tokenizer, 64, seed=1))


def test_short_documents_are_joined(tmp_path: Path, tokenizer: Any) -> None:
    blocks = draw(write(tmp_path / "a.jsonl", [[i, i, i] for i in range(60)]), tokenizer, 64)
    assert blocks.shape == (8, 8)
    assert all(len(row.unique()) == 3 for row in blocks)


def test_tokens_are_rounded_to_blocks_and_at_least_one(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [list(range(100))] * 10)
    assert draw(path, tokenizer, 1).shape == (1, 8)
    assert draw(path, tokenizer, 17).shape == (2, 8)


def test_what_is_there_is_used_and_said(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [list(range(20)), list(range(20))])
    blocks = draw(path, tokenizer, 8000)
    assert blocks.shape[1] == 8
    assert capsys.readouterr().err == (
        f"{path}: gives {blocks.numel()} tokens, 8,000 were wanted; calibrating with what is there\n"
    )


def test_enough_text_says_nothing(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(write(tmp_path / "a.jsonl", [list(range(100))] * 10), tokenizer, 64)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("documents", "vocabulary", "message"),
    [
        ([[1, 2, 3]], WORDS, "gives 3 tokens, calibration needs at least one block of 8; add text"),
        ([[7] * 50] * 9, WORDS, "every token is the same; expected ordinary text"),
        (
            [[7, 900] * 50],
            500,
            "gives token 900, the model's vocabulary has 500; tokenizer and weights",
        ),
    ],
)
def test_text_that_is_of_no_use(
    documents: list[list[int]], vocabulary: int, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = write(tmp_path / "a.jsonl", documents)
    with pytest.raises(DataError, match=f"^{path}: {message}"):
        draw_blocks(path, tokenizer, 16, 8, 0, vocabulary)


@pytest.mark.parametrize("jsonl", [True, False])
def test_memory_does_not_grow_with_the_file(jsonl: bool, tmp_path: Path, tokenizer: Any) -> None:
    words = " ".join(f"w{i % WORDS}" for i in range(2000))
    path = tmp_path / ("a.jsonl" if jsonl else "a.txt")
    line = json.dumps({"text": words}) if jsonl else words
    path.write_text(f"{line}\n" * 1000)  # 10 MB
    draw(path, tokenizer, 64)  # whatever is imported or cached once
    tracemalloc.start()
    try:
        blocks = draw(path, tokenizer, 1600)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert blocks.shape == (200, 8)
    assert peak < (2 if jsonl else 35) * 2**20
