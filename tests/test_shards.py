"""Token shards: what they hold, when they are reused, replaced or refused."""

import fcntl
import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_data import write
from tiny_run import EXAMPLE
from transformers import AutoTokenizer

from uptrain.data import Source, read_documents, shards
from uptrain.data.encoding import EncodedDocument, encode_documents
from uptrain.data.shards import TokenShards
from uptrain.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE)


def shard_sources(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / "a.jsonl", *({"text": f"document {i}"} for i in range(20))),
        write(tmp_path / "b.jsonl", {"text": "another file"}),
    ]


def concatenated(paths: list[Path], tokenizer) -> list[int]:
    documents: list[EncodedDocument] = []
    for path in paths:
        documents += encode_documents(read_documents(path, tokenizer), tokenizer)
    return np.concatenate([document.tokens for document in documents]).tolist()


def test_shards_hold_all_documents_in_order(tmp_path, tokenizer):
    paths = shard_sources(tmp_path)
    made = TokenShards.prepare(tmp_path / "tokens", paths, tokenizer, shard_tokens=16)
    expected = concatenated(paths, tokenizer)
    assert made.tokens == len(expected)
    assert made.read(0, made.tokens).tolist() == expected
    assert made.read(10, 50).tolist() == expected[10:50]
    assert made.manifest["documents"] == 21
    sizes = [shard["tokens"] for shard in made.manifest["shards"]]
    assert set(sizes[:-1]) == {16}
    assert len(sizes) > 5
    assert made.manifest["dtype"] == "<u2"


def test_shards_are_reused_until_something_changes(tmp_path, tokenizer, capsys):
    paths = shard_sources(tmp_path)
    folder = tmp_path / "tokens"
    first = TokenShards.prepare(folder, paths, tokenizer)
    made = (folder / "manifest.json").stat().st_mtime_ns
    assert TokenShards.prepare(folder, paths, tokenizer).digest == first.digest
    assert (folder / "manifest.json").stat().st_mtime_ns == made
    assert capsys.readouterr().err == ""

    write(paths[1], {"text": "other words"})
    changed = TokenShards.prepare(folder, paths, tokenizer)
    assert changed.digest != first.digest
    assert "data.train changed (b.jsonl); tokenising again" in capsys.readouterr().err

    other = AutoTokenizer.from_pretrained(EXAMPLE)
    other.add_tokens(["another"])
    TokenShards.prepare(folder, paths, other)
    assert "the tokenizer changed" in capsys.readouterr().err

    path = folder / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[::-1])
    assert TokenShards.prepare(folder, paths, other).read(0, 1).tolist() == [0]
    assert "tokens-00000.bin is damaged" in capsys.readouterr().err

    (folder / "manifest.json").unlink()
    TokenShards.prepare(folder, paths, other)
    assert "is incomplete" in capsys.readouterr().err


def test_a_killed_tokenisation_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        TokenShards.prepare(tmp_path / "tokens", shard_sources(tmp_path), tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path, tokenizer):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "thesis.tex").write_text("")
    with pytest.raises(DataError, match="holds no token shards but other files; move it away"):
        TokenShards.prepare(tmp_path / "tokens", shard_sources(tmp_path), tokenizer)


def test_text_without_a_token_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"text": ""})
    with pytest.raises(
        DataError, match=r"a\.jsonl: the text holds no token; expected text to train"
    ):
        TokenShards.prepare(tmp_path / "tokens", [path], tokenizer)
    assert not (tmp_path / "tokens").exists()


def test_a_manifest_of_no_tokens_is_refused(tmp_path, tokenizer):
    folder = tmp_path / "tokens"
    TokenShards.prepare(folder, shard_sources(tmp_path), tokenizer)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"shards": [], "tokens": 0}))
    with pytest.raises(DataError, match=r"tokens: its token shards cannot be used \(no tokens\)"):
        TokenShards.open(folder)


def documents_of(paths: list[Path], tokenizer) -> list[int]:
    """Lengths in tokens."""
    return [
        len(document.tokens)
        for path in paths
        for document in encode_documents(read_documents(path, tokenizer), tokenizer)
    ]


def test_shards_know_where_documents_and_sources_begin(tmp_path, tokenizer):
    paths = shard_sources(tmp_path)
    made = TokenShards.prepare(tmp_path / "tokens", paths, tokenizer, shard_tokens=16)
    lengths = documents_of(paths, tokenizer)
    starts = np.cumsum(lengths) - lengths
    assert made.document_starts(0, made.tokens).tolist() == starts.tolist()
    assert made.document_starts(1, starts[2]).tolist() == [starts[1]]
    assert made.document_starts(starts[2], starts[2] + 1).tolist() == [starts[2]]
    counts = [(entry["documents"], entry["tokens"]) for entry in made.manifest["sources"]]
    assert counts == [(20, sum(lengths[:20])), (1, lengths[20])]


def hashed(monkeypatch) -> list[str]:
    """The names of all files that are read whole from now on."""
    names = []
    whole = shards._hash

    def watched(files):
        names.extend(Path(file).name for file in files)
        return whole(files)

    monkeypatch.setattr(shards, "_hash", watched)
    return names


def test_only_what_was_touched_is_hashed_again(tmp_path, tokenizer, monkeypatch):
    paths, folder = shard_sources(tmp_path), tmp_path / "tokens"
    digest = TokenShards.prepare(folder, paths, tokenizer).digest
    names = hashed(monkeypatch)
    assert TokenShards.prepare(folder, paths, tokenizer).digest == digest
    assert names == []
    os.utime(paths[1], ns=(0, 0))
    for _ in range(2):
        assert TokenShards.prepare(folder, paths, tokenizer).digest == digest
        assert names == ["b.jsonl"]


def test_a_change_under_the_old_date_is_seen(tmp_path, tokenizer, capsys):
    paths, folder = shard_sources(tmp_path), tmp_path / "tokens"
    TokenShards.prepare(folder, paths, tokenizer)
    before = paths[1].stat()
    write(paths[1], {"text": "another life"})
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert paths[1].stat().st_size == before.st_size
    TokenShards.prepare(folder, paths, tokenizer)
    assert "data.train changed (b.jsonl)" in capsys.readouterr().err


def test_a_shared_folder_is_never_replaced(tmp_path, tokenizer):
    paths, folder = shard_sources(tmp_path), tmp_path / "shared" / "tokens"
    first = TokenShards.prepare(folder, paths, tokenizer, shared=True)
    assert TokenShards.prepare(folder, paths, tokenizer, shared=True).digest == first.digest
    other = AutoTokenizer.from_pretrained(EXAMPLE)
    other.add_tokens(["another"])
    for sources, used, finding in (
        (paths, other, "the tokenizer changed"),
        (paths[:1], tokenizer, r"data.train changed \(from 2 sources to 1\)"),
        (paths[::-1], tokenizer, r"data.train changed \(a.jsonl became b.jsonl\)"),
        (
            [paths[0], Source(path=str(paths[1]), column="text")],
            tokenizer,
            r"data.train changed \(b.jsonl\)",
        ),
    ):
        with pytest.raises(DataError, match=f"{finding} since it was tokenised; remove it if no"):
            TokenShards.prepare(folder, sources, used, shared=True)
    assert TokenShards.open(folder).digest == first.digest
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tokens"]


def test_one_process_waits_for_another(tmp_path, tokenizer, capsys):
    paths, folder = shard_sources(tmp_path), tmp_path / "tokens"
    lock = tmp_path / ".tokens.lock"
    held = os.open(lock, os.O_CREAT | os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    made: list[TokenShards] = []
    waiting = threading.Thread(
        target=lambda: made.append(TokenShards.prepare(folder, paths, tokenizer))
    )
    waiting.start()
    time.sleep(0.2)
    assert not folder.exists()
    lock.unlink()
    os.close(held)
    waiting.join(30)
    assert made[0].tokens > 0
    assert "waiting for another run that tokenises here" in capsys.readouterr().err
    assert not lock.exists()


def test_text_that_changes_while_it_is_read_is_refused(tmp_path, tokenizer, monkeypatch):
    paths = shard_sources(tmp_path)
    whole = shards.write_shards

    def meddle(*arguments):
        result = whole(*arguments)
        write(paths[0], {"text": "new"})
        return result

    monkeypatch.setattr(shards, "write_shards", meddle)
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read; start again"):
        TokenShards.prepare(tmp_path / "tokens", paths, tokenizer)
    assert not (tmp_path / "tokens").exists()


def test_data_sets_are_sources_like_others(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    texts = {"text": ["one document", "and another"]}
    saved = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(texts),
        test=datasets.Dataset.from_dict({"text": ["held out"]}),
    )
    saved.save_to_disk(tmp_path / "set")
    lines = write(tmp_path / "a.jsonl", *({"text": text} for text in texts["text"]))
    made, same = (
        TokenShards.prepare(tmp_path / name, [source], tokenizer)
        for name, source in (("1", Source(dataset=str(tmp_path / "set"))), ("2", lines))
    )
    assert made.read(0, made.tokens).tolist() == same.read(0, same.tokens).tolist()
    assert made.manifest["sources"][0]["bytes"] > 0
    source = Source(dataset=str(tmp_path / "set"), split="test")
    with pytest.raises(DataError, match=r"data.train changed \("):
        TokenShards.prepare(tmp_path / "1", [source], tokenizer, shared=True)


def test_tokenising_shows_its_progress(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("uptrain.progress._FIRST_LINE_SECONDS", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    TokenShards.prepare(tmp_path / "tokens", shard_sources(tmp_path), tokenizer)
    assert "tokenise: " in capsys.readouterr().err
