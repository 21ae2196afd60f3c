"""Tokenizers that need code of their checkpoint's own, as a `tokenizer.json` that needs none.

That code is not run: of the classes that are known here, the vocabulary files are read and the rules
written down once more. Special tokens that stand in a text are taken for what they are, as there.
"""

import base64
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as splitters
from transformers.convert_slow_tokenizer import bytes_to_unicode

from uptrain.checkpoint.files import read_json
from uptrain.errors import CheckpointError, one_line

_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = ("unk_token", "bos_token", "eos_token", "pad_token")
_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "chat_template")
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)),
)  # fmt: skip
_SENTENCEPIECE_DEFAULTS = {
    "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "BaichuanTokenizer": _SENTENCEPIECE_DEFAULTS,
    "BaiChuanTokenizer": _SENTENCEPIECE_DEFAULTS,
    "InternLMTokenizer": {**_SENTENCEPIECE_DEFAULTS, "pad_token": "</s>"},
    "InternLM2Tokenizer": {**_SENTENCEPIECE_DEFAULTS, "pad_token": "</s>"},
    # As Qwen1.5 states them, which has the same vocabulary; Qwen's own code knows them by number.
    "QWenTokenizer": {"eos_token": _QWEN_SPECIALS[0], "pad_token": _QWEN_SPECIALS[0]},
}
"""By class, what a `tokenizer_config.json` that says nothing means."""

# Of sentencepiece's format.
_NORMAL, _UNKNOWN, _USER_DEFINED, _BYTE, _BPE = 1, 2, 4, 6, 2

_SPACE = "▁"

P = TypeVar("P", str, bytes)


class Piece(NamedTuple):
    """An entry of a sentencepiece vocabulary."""

    text: str
    score: float
    kind: int


def class_with_code(folder: Path) -> str | None:
    """Name the class of a folder's tokenizer if it is one of the checkpoint's own code.

    Raises:
        CheckpointError: If `tokenizer_config.json` cannot be read.
    """
    if not (folder / _CONFIG).is_file():
        return None
    mapped = read_json(folder / _CONFIG).get("auto_map")
    # Older ones are lists, for the tokenizer alone.
    paths = mapped.get("AutoTokenizer") if isinstance(mapped, dict) else mapped
    path = next(filter(None, paths), None) if isinstance(paths, list) else paths
    return str(path).rpartition(".")[2] if path else None


def without_code(folder: Path, class_name: str) -> tuple[Tokenizer, dict[str, Any]]:
    """Make a tokenizer from its vocabulary file.

    Args:
        folder: The checkpoint's.
        class_name: From `class_with_code`.

    Returns:
        The tokenizer, and the settings of its `tokenizer_config.json`.

    Raises:
        CheckpointError: If the class is not known here, or its file is not as it should be.

    Source: tokenization_qwen.py, tokenization_baichuan.py and tokenization_internlm.py of the models;
    src/sentencepiece_model.proto in google/sentencepiece.
    """
    if class_name not in _DEFAULTS:
        raise CheckpointError(f"{class_name} is not known")
    stated: dict[str, Any] = dict(_DEFAULTS[class_name])
    for name in ("special_tokens_map.json", _CONFIG):
        stated |= read_json(folder / name) if (folder / name).is_file() else {}
    try:
        tokens = {key: _content(stated[key]) for key in _SPECIAL_TOKENS if stated.get(key)}
        decoder = stated.get("added_tokens_decoder", {})
        added = {int(n): _content(token) for n, token in decoder.items()}
        if class_name == "QWenTokenizer":
            made = _from_tiktoken((folder / "qwen.tiktoken").read_bytes())
        else:
            data = (folder / "tokenizer.model").read_bytes()
            made = _from_sentencepiece(data, added, tokens, stated)
    except Exception as error:  # the files may hold anything
        raise CheckpointError(f"{class_name}'s files cannot be read: {one_line(error)}") from error
    if any(made.token_to_id(token) != n for n, token in added.items()):
        raise CheckpointError(f"{_CONFIG} adds tokens that leave a gap")
    kept = {key: stated[key] for key in _SETTINGS if stated.get(key) is not None}
    return made, {"clean_up_tokenization_spaces": False, **kept, **tokens}


def _from_tiktoken(data: bytes) -> Tokenizer:
    """Make Qwen's tokenizer from lines of bytes in base 64 and their ranks."""
    lines = (line.split() for line in data.splitlines() if line)
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    letters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {text(token): rank for token, rank in ranks.items()}
    pairs = [(text(left), text(right)) for left, right in _pairs(ranks)]
    made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    made.normalizer = normalizers.NFC()
    words = splitters.Split(Regex(_QWEN_WORDS), behavior="isolated")
    letters_of_bytes = splitters.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = splitters.Sequence([words, letters_of_bytes])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([_special(token) for token in _QWEN_SPECIALS])
    return made


def _from_sentencepiece(
    data: bytes, added: Mapping[int, str], tokens: Mapping[str, str], stated: Mapping[str, Any]
) -> Tokenizer:
    """Make a tokenizer from a sentencepiece model that merges pairs."""
    pieces, trainer, normalizer = _read_model(data)
    if trainer.get("model_type") != _BPE:
        raise ValueError("expected a model of the kind BPE")
    # Some added tokens take the places of pieces that were left unused.
    vocabulary = {added.get(n, piece.text): n for n, piece in enumerate(pieces)}
    costs = {piece.text: -piece.score for piece in pieces if piece.kind == _NORMAL}
    unknown = next(piece.text for piece in pieces if piece.kind == _UNKNOWN)
    has_bytes = any(piece.kind == _BYTE for piece in pieces)
    made = Tokenizer(
        models.BPE(
            vocabulary,
            _pairs(costs),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=has_bytes,
            ignore_merges=True,  # a symbol of the user's is a word by itself, see below
        )
    )
    has_prefix = normalizer.get("add_dummy_prefix", True)
    steps: list[Any] = []
    if normalizer.get("precompiled_charsmap"):  # leaves "\r\n" alone, which sentencepiece does not
        steps.append(normalizers.Precompiled(normalizer["precompiled_charsmap"]))
    if normalizer.get("remove_extra_whitespaces", True):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if has_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    symbols = [re.escape(piece.text) for piece in pieces if piece.kind == _USER_DEFINED]
    if symbols:
        longest_first = "|".join(sorted(symbols, key=len, reverse=True))
        made.pre_tokenizer = splitters.Split(Regex(longest_first), behavior="isolated")
    made.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * bool(has_prefix)
    )
    for _, token in sorted(added.items()):
        made.add_special_tokens([_special(token)])
    made.add_special_tokens([_special(token) for token in dict.fromkeys(tokens.values())])
    before = [tokens["bos_token"]] * bool(stated.get("add_bos_token"))
    behind = [tokens["eos_token"]] * bool(stated.get("add_eos_token"))
    if before or behind:
        made.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *behind],
            pair=[*before, "$A", *behind, *before, "$B:1", *behind],
            special_tokens=[(token, made.token_to_id(token)) for token in {*before, *behind}],
        )
    return made


def _pairs(ranks: Mapping[P, float]) -> list[tuple[P, P]]:
    """List every way to make a piece of two others, in the order of the pieces that are made."""
    found = [
        (rank, ranks[piece[:cut]], ranks[piece[cut:]], piece[:cut], piece[cut:])
        for piece, rank in ranks.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _read_model(data: bytes) -> tuple[list[Piece], dict[str, Any], dict[str, Any]]:
    """Read pieces, and what matters of the trainer's and the normalizer's settings."""
    pieces: list[Piece] = []
    trainer: dict[str, Any] = {}
    normalizer: dict[str, Any] = {}
    for field, value in _fields(data):
        if field == 1:
            found = dict(_fields(value))
            pieces.append(Piece(found[1].decode(), found.get(2, 0.0), found.get(3, _NORMAL)))
        elif field == 2:
            trainer["model_type"] = dict(_fields(value)).get(3)
        elif field == 3:
            names = {
                2: "precompiled_charsmap",
                3: "add_dummy_prefix",
                4: "remove_extra_whitespaces",
            }
            normalizer = {names[n]: v for n, v in _fields(value) if n in names}
    return pieces, trainer, normalizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Read the fields of a protocol buffer message: numbers, floats, or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        field, kind = divmod(varint(), 8)
        if kind == 0:
            yield field, varint()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
        value: Any = data[place : place + size]
        place += size
        yield field, struct.unpack("<f", value)[0] if kind == 5 else value


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
