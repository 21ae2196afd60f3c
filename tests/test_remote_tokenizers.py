"""Tokenizers that need code of their own, without it: judged by sentencepiece, tiktoken and their rules."""

import base64
import io
import json
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from tokenizers import Tokenizer

from uptrain.conversion.remote_tokenizers import class_with_code, without_code
from uptrain.errors import CheckpointError

CORPUS = [
    "the quick brown fox jumps over the lazy dog and over the lazy cat in 1234 ways",
    "aaa aaaa aaaaa banana bananas ananas; naïve café, 你好世界 你好吗 世界和平",
    "def f(x):\n    return x  # comment\n\n\n\tif x == 12:\n        pass\r\n",
]
TEXTS = [
    "the lazy fox", "  two  spaces  ", " ", "", "aaaaaaa banana", "你好，世界！", "naïve cafe\u0301 ﬁ ①",
    "x\n\n\ty\r\n  z", "it's THEY'LL 12345 3.14", "🦊 emoji\x07 and bytes", "unseen Ωß", *CORPUS,
]  # fmt: skip
# As tokenization_qwen.py has it.
WORDS = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
Ranks = dict[bytes, int]


def settings(folder: Path, name: str, **stated: Any) -> Path:
    """Write settings as the models do, and code that would be noticed if it were run."""
    auto_map = {"AutoTokenizer": [f"tokenization.{name}", None]}
    content = {"tokenizer_class": name, "auto_map": auto_map, **stated}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "tokenization.py").write_text("raise SystemExit('was run')\n")
    return folder


def made(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    name = class_with_code(folder)
    assert name is not None
    return without_code(folder, name)


def merged(parts: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    """Merge a pair wherever it stands, from the left."""
    found: list[bytes] = []
    for part in parts:
        if found and found[-1] == left and part == right:
            found[-1] = left + right
        else:
            found.append(part)
    return found


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    """Byte pairs in the order in which they are learnt, bytes first."""
    found: Ranks = {bytes([n]): n for n in range(256)}
    words = [
        [bytes([b]) for b in word.encode()]
        for text in CORPUS
        for word in regex.findall(WORDS, text)
    ]
    while counts := Counter(pair for word in words for pair in pairwise(word)):
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        found.setdefault(left + right, len(found))
        words = [merged(word, left, right) for word in words]
    return found


def qwen_ids(text: str, ranks: Ranks) -> list[int]:
    """Whole words if they are known, else the pair of the least rank first, the leftmost of several."""
    ids: list[int] = []
    for word in regex.findall(WORDS, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in word.encode()]
        while word.encode() not in ranks:
            pairs = [
                (ranks[a + b], n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in ranks
            ]
            if not pairs:
                break
            n = min(pairs)[1]
            parts[n : n + 2] = [parts[n] + parts[n + 1]]
        ids += [ranks[word.encode()]] if word.encode() in ranks else [ranks[part] for part in parts]
    return ids


@pytest.fixture
def qwen(ranks: Ranks, tmp_path: Path) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    return settings(tmp_path, "QWenTokenizer", model_max_length=8192)


def test_qwens_tokenizer_is_what_it_was(qwen: Path, ranks: Ranks) -> None:
    found, stated = made(qwen)
    for text in TEXTS:
        ids = found.encode(text).ids
        assert ids == qwen_ids(text, ranks), text
        assert found.decode(ids) == unicodedata.normalize("NFC", text)
    first = len(ranks)  # special tokens follow, wherever they stand
    assert found.encode("<|im_start|>the<|extra_204|>").ids == [
        first + 1, *qwen_ids("the", ranks), first + 207,
    ]  # fmt: skip
    assert stated["eos_token"] == "<|endoftext|>"
    assert stated["model_max_length"] == 8192
    assert "auto_map" not in stated


def test_qwens_tokenizer_agrees_with_tiktoken(qwen: Path, ranks: Ranks) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    encoding = tiktoken.Encoding("Qwen", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    found, _ = made(qwen)
    for text in TEXTS:
        assert found.encode(text).ids == encoding.encode(unicodedata.normalize("NFC", text)), text


SENTENCEPIECE = [
    {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    {"add_dummy_prefix": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    {"add_dummy_prefix": True, "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    {"add_dummy_prefix": True, "remove_extra_whitespaces": False, "byte_fallback": False},
]  # fmt: skip


def learn(folder: Path, **options: Any) -> Any:
    """Have sentencepiece learn a small vocabulary, and write it as `tokenizer.model`."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=320 if options.get("byte_fallback", True) else 100,
        minloglevel=2,
        user_defined_symbols=["<reserved_1>", "<eoh>"],
        **{"model_type": "bpe", "byte_fallback": True, **options},
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("options", SENTENCEPIECE, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("name", ["BaichuanTokenizer", "InternLMTokenizer"])
def test_sentencepiece_models_are_what_they_were(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    processor = learn(tmp_path, **options)
    found, stated = made(settings(tmp_path, name, add_bos_token=False))
    for text in [*TEXTS, "a<reserved_1> b<eoh>"]:
        if options.get("normalization_rule_name") != "identity":
            # The one thing that tokenizers takes for a character and sentencepiece for two.
            text = text.replace("\r\n", "\n")
        ids = found.encode(text).ids
        assert ids == processor.encode(text), text
        if processor.unk_id() not in ids:  # which sentencepiece writes as two question marks
            assert found.decode(ids, skip_special_tokens=False) == processor.decode(ids), text
    assert (stated["bos_token"], stated["eos_token"]) == ("<s>", "</s>")
    # Their classes put a first token before every text, and know special tokens within it.
    found, _ = made(settings(tmp_path, name, add_eos_token=True))
    wanted = [processor.bos_id(), *processor.encode("the fox"), processor.eos_id()]
    assert found.encode("the fox").ids == wanted
    assert found.encode("fox</s>", add_special_tokens=False).ids[-1] == processor.eos_id()


def test_added_tokens_take_the_places_that_are_stated(tmp_path: Path) -> None:
    """InternLM2 names pieces that were left unused in `added_tokens_decoder`."""
    processor = learn(tmp_path, add_dummy_prefix=False, remove_extra_whitespaces=False)
    size = processor.get_piece_size()
    added = {str(size - 1): {"content": "<|im_start|>"}, str(size): {"content": "<|new|>"}}
    folder = settings(
        tmp_path, "InternLM2Tokenizer", add_bos_token=False, added_tokens_decoder=added
    )
    found, _ = made(folder)
    assert found.encode("the<|im_start|><|new|>").ids == [*processor.encode("the"), size - 1, size]
    gap = {str(size + 3): {"content": "<|new|>"}}
    settings(tmp_path, "InternLM2Tokenizer", added_tokens_decoder=gap)
    with pytest.raises(CheckpointError, match="adds tokens that leave a gap"):
        made(tmp_path)


@pytest.mark.parametrize(
    ("data", "name"),
    [(b"", "BaichuanTokenizer"), (b"\x0a\xff\xff", "InternLMTokenizer"), (b"\x07", "BaichuanTokenizer"),
     (b"abc def ghi\n", "QWenTokenizer"), (b"\xff\xfe 1\n", "QWenTokenizer")],
)  # fmt: skip
def test_files_that_are_something_else_are_refused(data: bytes, name: str, tmp_path: Path) -> None:
    for file in ("tokenizer.model", "qwen.tiktoken"):
        (tmp_path / file).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name}'s files cannot be read"):
        made(settings(tmp_path, name))


def test_unigram_models_and_unknown_classes_are_refused(tmp_path: Path) -> None:
    learn(tmp_path, model_type="unigram")
    with pytest.raises(CheckpointError, match="expected a model of the kind BPE"):
        made(settings(tmp_path, "BaichuanTokenizer"))
    with pytest.raises(CheckpointError, match="ChatGLMTokenizer is not known"):
        made(settings(tmp_path, "ChatGLMTokenizer"))


@pytest.mark.parametrize(
    "stated",
    [
        {"bos_token": {"id": 1}},
        {"added_tokens_decoder": ["a"]},
        {"added_tokens_decoder": {"x": "a"}},
    ],
)
def test_settings_that_are_something_else_are_refused(
    stated: dict[str, Any], tmp_path: Path
) -> None:
    learn(tmp_path)
    with pytest.raises(CheckpointError, match="BaichuanTokenizer's files cannot be read"):
        made(settings(tmp_path, "BaichuanTokenizer", **stated))


def test_only_tokenizers_of_own_code_are_taken_for_them(tmp_path: Path) -> None:
    assert class_with_code(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert class_with_code(tmp_path) is None
    for auto_map in (
        ["tokenization.X", None],
        {"AutoTokenizer": "a.X"},
        {"AutoTokenizer": [None, "b.X"]},
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
        assert class_with_code(tmp_path) == "X"
