"""Documents, their tokens and bytes, token shards, and the order of batches."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import EXAMPLE
from transformers import AutoTokenizer

from uptrain.data import EncodedDocument, encode_documents, read_documents
from uptrain.errors import DataError
from uptrain.training import batches
from uptrain.training.batches import Batches, TokenShards, batch_indices

TEXTS = [
    "Plain words, and more of them.\n\n  Indented.  ",
    "héllo wörld 😀👨‍👩‍👧 漢字かな  \u200b end",
    "",
    "<|endoftext|>begins with the token in front",
    "\n",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_jsonl_is_one_document_a_line(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", *({"text": text, "more": 1} for text in TEXTS))
    with path.open("a") as file:
        file.write("\n  \n")
    assert list(read_documents(path, tokenizer)) == TEXTS


def test_any_other_file_is_one_document_with_its_bytes_as_they_are(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\n".encode())
    assert list(read_documents(path, tokenizer)) == ["one\r\ntwo\n"]


def test_messages_go_through_the_chat_template(tmp_path, tokenizer):
    chat = AutoTokenizer.from_pretrained(EXAMPLE)
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    assert list(read_documents(path, chat)) == ["user: hi\nassistant: yes\n"]
    with pytest.raises(
        DataError, match="line 1 has messages, but the model's tokenizer has no chat"
    ):
        list(read_documents(path, tokenizer))
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match=r"line 1: .* refuses the messages \(roles must alternate\)"
    ):
        list(read_documents(path, chat))
    with pytest.raises(DataError, match="line 1: messages is no list of"):
        list(read_documents(write(tmp_path / "b.jsonl", {"messages": ["hi"]}), chat))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"line 2 is not JSON \(Expecting value"),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', r"line 3 is not UTF-8 \(byte 0xff\); convert"),
        (b"[1, 2]\n", 'line 1 holds a JSON list, no object; expected {"text": "…"} or {"messages"'),
        (b'{"content": "a"}\n', r"line 1 has neither text nor messages \(its keys: content\)"),
        (b'{"text": 3}\n', "line 1: text is a int, no string"),
        (b'{"text": "\\ud800"}\n', "line 1 holds half a surrogate pair"),
        (b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(path, tokenizer))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_bad_file_is_named(tmp_path, tokenizer):
    with pytest.raises(
        DataError, match=r"a\.txt: does not exist; expected a \.jsonl or plain text"
    ):
        list(read_documents(tmp_path / "a.txt", tokenizer))
    with pytest.raises(DataError, match="is a folder"):
        list(read_documents(tmp_path, tokenizer))
    path = tmp_path / "b.txt"
    path.write_bytes(b"one\ntwo\n\xe4\n")
    with pytest.raises(DataError, match=r"line 3 is not UTF-8 \(byte 0xe4\)"):
        list(read_documents(path, tokenizer))


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
    monkeypatch.setattr("uptrain.data._PIECE_CHARACTERS", 100)
    monkeypatch.setattr("uptrain.data._BATCH_CHARACTERS", 250)
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
    shards = TokenShards.prepare(tmp_path / "tokens", paths, tokenizer, shard_tokens=16)
    expected = concatenated(paths, tokenizer)
    assert shards.tokens == len(expected)
    assert shards.read(0, shards.tokens).tolist() == expected
    assert shards.read(10, 50).tolist() == expected[10:50]
    assert shards.manifest["documents"] == 21
    sizes = [shard["tokens"] for shard in shards.manifest["shards"]]
    assert set(sizes[:-1]) == {16}
    assert len(sizes) > 5
    assert shards.manifest["dtype"] == "<u2"


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
    assert "the text of data.train changed; tokenising again" in capsys.readouterr().err

    other = AutoTokenizer.from_pretrained(EXAMPLE)
    other.add_tokens(["another"])
    TokenShards.prepare(folder, paths, other)
    assert "the tokenizer changed" in capsys.readouterr().err

    path = folder / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[::-1])
    assert TokenShards.prepare(folder, paths, other).read(0, 1).tolist() == [0]
    assert "is damaged" in capsys.readouterr().err

    (folder / "manifest.json").unlink()
    TokenShards.prepare(folder, paths, other)
    assert "is incomplete" in capsys.readouterr().err


def test_a_killed_tokenisation_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(batches, "write_json", die)
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


def make_batches(tmp_path: Path, tokenizer, length: int = 4, batch: int = 8) -> Batches:
    shards = TokenShards.prepare(
        tmp_path / "tokens", shard_sources(tmp_path), tokenizer, shard_tokens=16
    )
    return Batches(shards, length, batch, seed=3)


def test_blocks_feed_and_predict_as_the_readme_says(tmp_path, tokenizer):
    made = make_batches(tmp_path, tokenizer)
    tokens = concatenated(shard_sources(tmp_path), tokenizer)
    assert made.blocks == (len(tokens) - 1) // 4
    inputs, targets = made.read(range(made.blocks))
    assert inputs.flatten().tolist() == tokens[: made.blocks * 4]
    assert targets.flatten().tolist() == tokens[1 : made.blocks * 4 + 1]


def test_each_epoch_is_another_permutation(tmp_path, tokenizer):
    blocks = 12
    order = np.concatenate([batch_indices(step, 8, blocks, seed=1) for step in range(6)])
    epochs = order.reshape(4, blocks)
    assert all(sorted(epoch) == list(range(blocks)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    other = np.concatenate([batch_indices(step, 8, blocks, seed=2) for step in range(6)])
    assert order.tolist() != other.tolist()


def test_the_order_is_pure_and_stays_what_it_is():
    again = [batch_indices(step, 8, 12, seed=1).tolist() for step in (5, 0, 5)]
    assert again[0] == again[2]
    # A changed order would make old checkpoints go on with other data.
    assert batch_indices(0, 8, 100, seed=0).tolist() == [82, 36, 20, 5, 93, 16, 94, 52]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_the_same_batches(tmp_path, tokenizer, world_size):
    made = make_batches(tmp_path, tokenizer)
    for step in range(5):
        parts = [made.indices(step, rank, world_size) for rank in range(world_size)]
        assert np.concatenate(parts).tolist() == made.indices(step).tolist()
        assert {len(part) for part in parts} == {8 // world_size}


def test_too_little_text_is_refused(tmp_path, tokenizer):
    made = make_batches(tmp_path, tokenizer)
    tokens, fit = made.shards.tokens, made.blocks // 8
    made.check(fit, repeat=False)
    made.check(100, repeat=True)
    with pytest.raises(DataError) as caught:
        made.check(fit + 1, repeat=False)
    wanted = (fit + 1) * 8
    assert str(caught.value) == (
        f"data.train holds {tokens} tokens, but {fit + 1} steps of 32 need {wanted * 4 + 1}; "
        "add text, lower the budget, or set data.repeat: true to go over the text "
        f"{wanted / made.blocks:.1f} times"
    )
    large = make_batches(tmp_path, tokenizer, batch=64)
    with pytest.raises(
        DataError, match=r"tokens, fewer than one batch of 256 .* lower train.batch"
    ):
        large.check(1, repeat=True)


def test_tokenising_shows_its_progress(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("uptrain.progress._FIRST_LINE_SECONDS", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    TokenShards.prepare(tmp_path / "tokens", shard_sources(tmp_path), tokenizer)
    assert "tokenise: " in capsys.readouterr().err
