"""Draw calibration tokens over a whole file."""

import heapq
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.options import Options
from uptrain.conversion.rewritten import tokenizer_of
from uptrain.data import open_source
from uptrain.data.encoding import encode_documents
from uptrain.errors import DataError
from uptrain.families.registry import parse_config
from uptrain.loading import context_length

# A passage of so many characters for each token of a block holds more than a block in most languages,
# so that a block can start anywhere in it.
_CHARACTERS_PER_TOKEN = 8
_MAX_LENGTH = 2048
# Their positions start behind the number of the padding token.
_FIRST_POSITION_BEHIND_PADDING = ("roberta", "camembert")


@dataclass(frozen=True)
class Sample:
    """Calibration text."""

    tokens: torch.Tensor
    """[blocks, length], int64, what a decoder (or an encoder that stands alone) reads."""
    encoder: torch.Tensor | None = None
    """[blocks, ...], what an encoder-decoder's encoder gets for each of them."""

    def first(self, blocks: int) -> "Sample":
        """Leave out all but the first blocks."""
        encoder = None if self.encoder is None else self.encoder[:blocks]
        return Sample(self.tokens[:blocks], encoder)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All there is of it."""
        return [self.tokens] if self.encoder is None else [self.tokens, self.encoder]


def draw_text(checkpoint: Checkpoint, options: Options, code: Path | None = None) -> Sample:
    """Draw the calibration text of a conversion, in blocks of the model's context (at most 2048).

    The first half of a block goes to an encoder-decoder's encoder, and the second, shifted by one, to
    its decoder. So the decoder continues what the encoder has read (prefix language modelling, Raffel
    et al. 2020, section 3.2): a text that needs no pairs, in which attention to the encoder has
    something to find, and which the decoder cannot merely copy.

    Raises:
        CheckpointError: If the checkpoint has no tokenizer.
        DataError: As `draw_blocks` does.
    """
    assert options.calibration is not None
    config = parse_config(checkpoint.config, code)
    length = min(usable_length(config) or _MAX_LENGTH, _MAX_LENGTH)
    if config.is_encoder_decoder:
        length = 2 * min(length, _MAX_LENGTH // 2)
    drawn = draw_blocks(
        options.calibration,
        tokenizer_of(checkpoint, trust_remote_code=code is not None),
        options.calibration_tokens,
        length,
        options.seed,
        config.get_text_config().vocab_size,
    )
    if not config.is_encoder_decoder:
        return Sample(drawn)
    read, continued = drawn.split(length // 2, dim=1)
    return Sample(shifted(continued, config), read)


def shifted(tokens: torch.Tensor, config: Any) -> torch.Tensor:
    """Make a decoder's input of what it is to give: its first token, then all but the last.

    Args:
        tokens: [blocks, length], int64.
        config: The model's.
    """
    keys = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    stated = (getattr(config, key, None) for key in keys)
    start = next((token for token in stated if isinstance(token, int)), 0)
    return torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], dim=1)


def usable_length(config: Any) -> int | None:
    """Count the positions that text can take, if the config says so."""
    length: int | None = context_length(config) or getattr(config, "max_target_positions", None)
    if length is not None and str(config.model_type).endswith(_FIRST_POSITION_BEHIND_PADDING):
        return length - int(config.pad_token_id) - 1
    return length


def draw_blocks(
    path: Path, tokenizer: Any, tokens: int, length: int, seed: int, vocabulary: int
) -> torch.Tensor:
    """Draw blocks of text from everywhere in a file.

    The file is read once, as passages; those with the smallest random keys are kept, so memory does
    not grow with the file. Each long passage gives one block, short ones are joined.

    Args:
        path: Text, jsonl or parquet, as `read_documents` takes it.
        tokenizer: The model's.
        tokens: How many to draw; rounded to whole blocks, at least one.
        length: Tokens of a block.
        seed: Of the draw.
        vocabulary: Size of the model's vocabulary.

    Returns:
        [blocks, length], int64. Fewer blocks than asked for if the file is short; said on standard
        error.

    Raises:
        DataError: If there is not one block, all tokens are the same, or one is not in the
            vocabulary.
    """
    wanted = max(1, tokens // length)
    draw = random.Random(seed)
    size = _CHARACTERS_PER_TOKEN * length
    enough = int(1.25 * size * wanted)
    kept: list[tuple[float, str]] = []
    characters = 0
    for passage in _passages(path, tokenizer, size):
        heapq.heappush(kept, (-draw.random(), passage))
        characters += len(passage)
        while characters - len(kept[0][1]) >= enough:
            characters -= len(heapq.heappop(kept)[1])
    passages = [passage for _, passage in sorted(kept, reverse=True)]
    blocks: list[np.ndarray[Any, Any]] = []
    short: list[np.ndarray[Any, Any]] = []
    for encoded in encode_documents(passages, tokenizer):
        found = encoded.tokens
        if len(found) >= length:
            # Every other block starts as a document does, the rest anywhere: a model may treat the
            # first token in a way of its own, and meets both.
            start = 0 if len(blocks) % 2 else draw.randrange(len(found) - length + 1)
            blocks.append(found[start : start + length])
        else:
            short.append(found)
            if sum(map(len, short)) >= length:
                blocks.append(np.concatenate(short)[:length])
                short = []
        if len(blocks) == wanted:
            break
    if not blocks:
        found_tokens = sum(map(len, short))
        raise DataError(
            f"{path}: gives {found_tokens} tokens, calibration needs at least one block of {length}; "
            "add text"
        )
    if len(blocks) < wanted:
        print(
            f"{path}: gives {len(blocks) * length:,} tokens, {wanted * length:,} were wanted; "
            "calibrating with what is there",
            file=sys.stderr,
        )
    drawn = torch.from_numpy(np.stack(blocks).astype(np.int64))
    behind_first = drawn[:, 1:]  # which may mark the start of a document
    if int(behind_first.min()) == int(behind_first.max()):
        raise DataError(f"{path}: every token is the same; expected ordinary text")
    if int(drawn.max()) >= vocabulary:
        raise DataError(
            f"{path}: gives token {int(drawn.max())}, the model's vocabulary has {vocabulary}; "
            "tokenizer and weights do not belong together"
        )
    return drawn


def _passages(path: Path, tokenizer: Any, size: int) -> Iterator[str]:
    """Cut documents into passages of `size` characters, the last of each shorter."""
    text, is_first = "", True
    for fragment in open_source(path).read(tokenizer):
        text += fragment.text
        start = 0
        while len(text) - start > size:
            yield text[start : start + size]
            start += size
            is_first = False
        text = text[start:]
        if fragment.is_last:
            if text or is_first:
                yield text
            text, is_first = "", True
