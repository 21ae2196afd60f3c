"""Documents: what is read of files and data sets, and what is refused."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from tiny_run import EXAMPLE
from transformers import AutoTokenizer

from uptrain.data import Source, open_source, read_documents
from uptrain.errors import DataError

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
        (b'{"text": 3}\n', "line 1: text is a int, no string; correct it"),
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
        DataError, match=r"a\.txt: does not exist; expected a \.jsonl, \.parquet or plain"
    ):
        list(read_documents(tmp_path / "a.txt", tokenizer))
    with pytest.raises(DataError, match="is a folder"):
        list(read_documents(tmp_path, tokenizer))
    path = tmp_path / "b.txt"
    path.write_bytes(b"one\ntwo\n\xe4\n")
    with pytest.raises(DataError, match=r"line 3 is not UTF-8 \(byte 0xe4\)"):
        list(read_documents(path, tokenizer))


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
def test_a_file_is_read_in_chunks_without_a_trace(tmp_path, tokenizer, monkeypatch, chunk):
    monkeypatch.setattr("uptrain.data.files._READ_BYTES", chunk)
    path = tmp_path / "a.txt"
    text = "漢字 and\r\n😀 wörds\n" * 3
    path.write_text("\ufeff" + text, newline="")
    if chunk > 1:  # the mark has three bytes
        assert list(read_documents(path, tokenizer)) == [text]
    path.write_bytes(text.encode() + b"\n\xff")
    with pytest.raises(DataError, match=r"line 8 is not UTF-8 \(byte 0xff\)"):
        list(read_documents(path, tokenizer))
    path.write_bytes("é".encode()[:1])
    with pytest.raises(DataError, match=r"line 1 is not UTF-8 \(byte 0xc3\)"):
        list(read_documents(path, tokenizer))


def test_packed_files_are_unpacked(tmp_path, tokenizer):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines))
    assert list(read_documents(path, tokenizer)) == TEXTS
    text = tmp_path / "a.txt.gz"
    text.write_bytes(gzip.compress(b"some words"))
    assert list(read_documents(text, tokenizer)) == ["some words"]
    path.write_bytes(gzip.compress(lines)[:-12])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        list(read_documents(path, tokenizer))
    path.write_bytes(lines)
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be read \(Not a gzipped file"):
        list(read_documents(path, tokenizer))


def test_a_column_is_found_by_its_name(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"body": "one", "text": "two"})
    assert list(read_documents(Source(path=str(path), column="body"), tokenizer)) == ["one"]
    with pytest.raises(
        DataError, match=r'line 1 has no title \(its keys: body, text\); expected \{"title": "…"\}'
    ):
        list(read_documents(Source(path=str(path), column="title"), tokenizer))
    with pytest.raises(DataError, match=r"a\.jsonl: a file has no split; leave it out"):
        open_source(Source(path=str(path), split="train"))
    plain = tmp_path / "a.txt"
    plain.write_text("words")
    with pytest.raises(DataError, match=r"a\.txt: plain text has no column; leave it out"):
        open_source(Source(path=str(plain), column="text"))


def read_bytes(source: Source) -> tuple[float, int]:
    """What reading says it has read, and the files' size."""
    documents = open_source(source)
    done = sum(fragment.read_bytes for fragment in documents.read(None))
    return done, sum(file.stat().st_size for file in documents.files)


def test_reading_says_how_far_it_is(tmp_path):
    lines = write(tmp_path / "a.jsonl", *({"text": text} for text in TEXTS))
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    plain = tmp_path / "c.txt"
    plain.write_text("words\n" * 10)
    for path in (lines, packed, plain):
        done, size = read_bytes(Source(path=str(path)))
        assert done == size


@pytest.fixture
def rows(tmp_path) -> Path:
    """A parquet file of 200 rows in groups of 50."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"n": range(200), "text": [f"row {i} é" for i in range(200)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    return tmp_path / "a.parquet"


def test_parquet_is_one_document_a_row(rows, tokenizer):
    expected = [f"row {i} é" for i in range(200)]
    assert list(read_documents(rows, tokenizer)) == expected
    done, size = read_bytes(Source(path=str(rows), column="text"))
    assert done == pytest.approx(size)
    with pytest.raises(DataError, match=r"has no column body; set column to one of n, text"):
        open_source(Source(path=str(rows), column="body"))
    with pytest.raises(DataError, match=r"a.parquet: row 1: n is a int, no string"):
        list(read_documents(Source(path=str(rows), column="n"), tokenizer))


def test_messages_and_gaps_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    chat = AutoTokenizer.from_pretrained(EXAMPLE)
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    messages = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"messages": messages, "chat": messages}), path)
    assert list(read_documents(path, chat)) == ["user: hi\n", "user: ho\n"]
    named = Source(path=str(path), column="chat")
    assert list(read_documents(named, chat)) == ["user: hi\n", "user: ho\n"]
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match="row 2: text is a NoneType, no string"):
        list(read_documents(path, chat))
    parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    with pytest.raises(
        DataError, match="has no column text or messages; set column to one of body"
    ):
        list(read_documents(path, chat))


@pytest.mark.parametrize("damage", ["end", "page", "empty"])
def test_a_damaged_parquet_file_is_named(rows, tokenizer, damage):
    data = bytearray(rows.read_bytes())
    if damage == "page":
        data[4:400] = bytes(396)
    rows.write_bytes({"end": data[:-20], "page": data, "empty": b""}[damage])
    with pytest.raises(DataError, match=r"a.parquet: cannot be read \(") as caught:
        list(read_documents(rows, tokenizer))
    assert "\n" not in str(caught.value)


def test_parquet_takes_no_more_memory_than_some_rows(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    # One row group of 40 MB, with no two values alike so that nothing is kept as a dictionary.
    texts = [f"{i:06d}" + "x" * 20_000 for i in range(2000)]
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, path, use_dictionary=False, write_batch_size=16)
    pool = pyarrow.default_memory_pool()
    before, most, count = pool.bytes_allocated(), 0, 0
    for _ in read_documents(path, tokenizer):
        count += 1
        most = max(most, pool.bytes_allocated() - before)
    assert count == 2000
    assert most < 10e6  # 64 rows of 20 kB, a page of 1 MB and its buffers


def test_saved_data_sets_are_read(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"text": TEXTS, "n": range(len(TEXTS))})
    test = datasets.Dataset.from_dict({"text": ["held out"], "n": [0]})
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    for source in (one, Source(dataset=one), Source(dataset=two), Source(path=two, split="train")):
        assert list(read_documents(source, tokenizer)) == TEXTS
    assert list(read_documents(Source(dataset=two, split="test"), tokenizer)) == ["held out"]
    done, size = read_bytes(Source(dataset=one))
    assert done == pytest.approx(size)
    assert size > 0
    for wrong, message in (
        (Source(dataset=two, split="dev"), "has no split dev; choose one of train, test"),
        (Source(dataset=one, split="train"), "holds one data set without splits; leave split out"),
        (Source(dataset=one, config="en"), "a saved data set has no config; leave it out"),
        (Source(dataset=one, column="body"), "has no column body; set column to one of text, n"),
        (Source(dataset=one, column="n"), "row 1: n is a int, no string"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_documents(wrong, tokenizer))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(DataError, match="cannot be loaded as a data set"):
        open_source(Source(dataset=one))


def test_a_folder_of_files_is_a_data_set(tmp_path, tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", *({"body": text} for text in TEXTS))
    source = Source(dataset=str(tmp_path / "set"), column="body")
    assert list(read_documents(source, tokenizer)) == TEXTS


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("datasets", "a")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, package, name):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError then
    source = Source(dataset="owner/a") if package == "datasets" else tmp_path / name
    with pytest.raises(DataError, match=r"is not installed; pip install 'uptrain-gqa\[data\]'"):
        open_source(source)
