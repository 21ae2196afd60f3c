"""Draw calibration tokens over a whole file."""

import heapq
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.options import Options
from uptrain.data import open_source
from uptrain.data.encoding import encode_documents
from uptrain.errors import DataError
from uptrain.families.registry import parse_config
from uptrain.loading import context_length, load_tokenizer

# A passage of so many characters for each token of a block holds more than a block in most languages,
# so that a block can start anywhere in it.
_CHARACTERS_PER_TOKEN = 8
_MAX_LENGTH = 2048


def draw_calibration(
    checkpoint: Checkpoint, options: Options, code: Path | None = None
) -> torch.Tensor:
    """Draw the calibration text of a conversion, in blocks of the model's context (at most 2048).

    Returns:
        [blocks, length], int64.

    Raises:
        CheckpointError: If the checkpoint has no tokenizer.
        DataError: As `draw_blocks` does.
    """
    assert options.calibration is not None
    config = parse_config(checkpoint.config, code)
    return draw_blocks(
        options.calibration,
        load_tokenizer(checkpoint, trust_remote_code=code is not None),
        options.calibration_tokens,
        min(context_length(config) or _MAX_LENGTH, _MAX_LENGTH),
        options.seed,
        config.get_text_config().vocab_size,
    )


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
            start = draw.randrange(len(found) - length + 1)
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
    if int(drawn.min()) == int(drawn.max()):
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
