"""How well a model predicts a text, and how far it is from the model it was made of."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.data import read_documents
from uptrain.data.encoding import encode_documents
from uptrain.errors import CheckpointError, DataError, UnsupportedFamilyError, UptrainError
from uptrain.evaluation.scoring import Scores, score
from uptrain.families.head_tensors import kv_cache_bytes_per_token
from uptrain.families.registry import read_heads
from uptrain.loading import (
    context_length,
    has_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    vocabulary_size,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EVALUATION = "evaluation.json"

_DEFAULT_MAX_SEQUENCE_LENGTH = 2048


def evaluate(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
    sequence_length: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    output: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Measure how well a checkpoint predicts a text, alone or against a reference.

    Each document is preceded by the tokenizer's bos token (else eos, else nothing), all are
    concatenated and cut in blocks of `sequence_length` inputs, the last short one dropped; every
    token is predicted once. Arithmetic is float32 on a CPU; elsewhere the forward pass runs in the
    checkpoint's own dtype and what follows the logits in float32. Sums are float64.

    Args:
        model: A checkpoint folder or a hub id. Its tokenizer is the one used.
        data: A `.jsonl` or `.parquet` file (`text` or `messages`), a data set that was saved to disk,
            or a plain text file.
        reference: A checkpoint with the same tokenizer, usually the one that `model` was made of.
        max_tokens: Predict at most so many tokens, in whole blocks; the whole text if not given.
        sequence_length: Inputs of a block; the model's context, at most 2048, if not given.
        device: `cpu`, `cuda`, …; a GPU where there is one if not given.
        trust_remote_code: Run the code that a checkpoint brings along.
        output: A folder to leave the result in, as `evaluation.json`.

    Returns:
        `loss` (nats a token), `perplexity`, `bits_per_byte` (UTF-8 bytes of the text), `tokens`
        (predicted), `parameters` (tied ones once), `num_key_value_heads`,
        `kv_cache_bytes_per_token` (in the checkpoint's dtype), and how it was measured. With a
        reference also `reference_loss`, `reference_parameters`, `loss_increase`, `kl`
        (KL(reference ‖ model), nats a token) and `top1_agreement` (fraction of tokens).

    Raises:
        CheckpointError: If a checkpoint cannot be read or loaded whole, or the reference has
            another vocabulary.
        UnsupportedFamilyError: If transformers does not know an architecture.
        DataError: If the text cannot be read, or is shorter than one block.
        UptrainError: If there is no such device, the loss is not finite, or `output` cannot be
            written.
    """
    place = pick_device(device)
    checkpoint = open_checkpoint(model)
    config = load_config(checkpoint, trust_remote_code)
    length = _block_length(checkpoint, config, sequence_length, max_tokens)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code)
    other = None
    if reference is not None:
        other = open_checkpoint(reference)
        other_config = load_config(other, trust_remote_code)
        check_same_vocabulary(checkpoint, config, other, other_config, trust_remote_code)
        _block_length(other, other_config, length, max_tokens)
    tokens, byte_counts = read_tokens(Path(data), tokenizer, length, max_tokens)
    vocabulary = vocabulary_size(config)
    if vocabulary is not None and tokens.max() >= vocabulary:
        raise CheckpointError(
            f"{checkpoint.folder}: its tokenizer gives token {tokens.max()}, its vocabulary has "
            f"{vocabulary}; take the tokenizer files of the original checkpoint"
        )

    dtype = torch.float32 if place.type == "cpu" else None
    scored = load_model(checkpoint, place, config, dtype, trust_remote_code)
    names, described = {"model": checkpoint.name}, _describe(checkpoint, scored, trust_remote_code)
    referee = None
    if other is not None:
        referee = load_model(other, place, other_config, dtype, trust_remote_code)
        names["reference"] = other.name
        of_reference = _describe(other, referee, trust_remote_code)
        described |= {f"reference_{key}": value for key, value in of_reference.items()}
    scores = score(scored, tokens, length, referee)
    result = {
        **names,
        **summarize(scores, int(byte_counts.sum())),
        **described,
        "data": Path(data).name,
        "sequence_length": length,
        "device": place.type,
        "dtype": str(scored.dtype).removeprefix("torch."),
    }
    if output is not None:
        _write(Path(output), result)
    return result


def summarize(scores: Scores, text_bytes: int) -> dict[str, Any]:
    """Turn scores of single tokens into the figures of `evaluate`.

    Args:
        scores: Of every predicted token.
        text_bytes: UTF-8 bytes of the text that the predicted tokens stand for.
    """
    loss = _mean(scores.loss)
    result: dict[str, Any] = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # a float holds little more
        "bits_per_byte": loss * scores.loss.size / math.log(2) / text_bytes,
        "tokens": scores.loss.size,
    }
    if scores.reference_loss is not None and scores.kl is not None and scores.agrees is not None:
        reference_loss = _mean(scores.reference_loss)
        result |= {
            "reference_loss": reference_loss,
            "loss_increase": loss - reference_loss,
            "kl": _mean(scores.kl),
            "top1_agreement": _mean(scores.agrees),
        }
    return result


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64))


def _block_length(
    checkpoint: Checkpoint,
    config: "PretrainedConfig",
    sequence_length: int | None,
    max_tokens: int | None,
) -> int:
    context = context_length(config)
    length = sequence_length
    if length is None:
        length = min(context or _DEFAULT_MAX_SEQUENCE_LENGTH, _DEFAULT_MAX_SEQUENCE_LENGTH)
    if length < 1:
        raise DataError(f"sequence_length={length}: expected at least 1 token")
    if context is not None and length > context:
        raise DataError(
            f"sequence_length={length}: {checkpoint.name} was made for {context} tokens; "
            f"choose --sequence-length {context} or less"
        )
    if max_tokens is not None and max_tokens < length:
        raise DataError(
            f"max_tokens={max_tokens}: expected at least one block of {length} tokens; "
            "raise --max-tokens or lower --sequence-length"
        )
    return length


def check_same_vocabulary(
    checkpoint: Checkpoint,
    config: "PretrainedConfig",
    other: Checkpoint,
    other_config: "PretrainedConfig",
    trust_remote_code: bool = False,
    role: str = "reference",
) -> None:
    """Refuse two checkpoints whose predictions cannot be compared token by token.

    Args:
        checkpoint: One of them.
        config: Its own.
        other: The other one.
        other_config: Its own.
        trust_remote_code: Run the code that their tokenizers bring along.
        role: What the other one is, for the message.

    Raises:
        CheckpointError: If their vocabularies differ.
    """
    sizes = vocabulary_size(config), vocabulary_size(other_config)
    same = sizes[0] == sizes[1]
    found = f"a vocabulary of {sizes[1]} tokens, {checkpoint.name} one of {sizes[0]}"
    if same and has_tokenizer(other) and not _same_file(checkpoint, other, "tokenizer.json"):
        vocabularies = [
            load_tokenizer(each, trust_remote_code).get_vocab() for each in (checkpoint, other)
        ]
        same = vocabularies[0] == vocabularies[1]
        found = f"other tokens than {checkpoint.name}"
    if not same:
        raise CheckpointError(
            f"{other.folder}: the {role} has {found}; only models with one tokenizer can be "
            "compared token by token"
        )


def _same_file(checkpoint: Checkpoint, other: Checkpoint, name: str) -> bool:
    paths = checkpoint.folder / name, other.folder / name
    return all(path.is_file() for path in paths) and paths[0].read_bytes() == paths[1].read_bytes()


def read_tokens(
    path: Path, tokenizer: Any, length: int, max_tokens: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Read as many whole blocks as there are, or as are wanted.

    Returns:
        The tokens [blocks * length + 1], and the text bytes of each but the first.
    """
    wanted = None if max_tokens is None else max_tokens // length * length + 1
    tokens: list[npt.NDArray[np.int64]] = []
    byte_counts: list[npt.NDArray[np.int64]] = []
    found, text_bytes = 0, 0
    for document in encode_documents(read_documents(path, tokenizer), tokenizer):
        tokens.append(document.tokens)
        byte_counts.append(document.byte_counts)
        found += len(document.tokens)
        text_bytes += int(document.byte_counts.sum())
        if wanted is not None and found >= wanted:
            break
    if not text_bytes:
        raise DataError(f"{path}: its text has no token; expected text to predict")
    if found <= length:
        raise DataError(
            f"{path}: has {found} tokens, expected at least {length + 1} to fill one block; "
            f"give more text, or choose a --sequence-length below {found}"
        )
    end = (found - 1) // length * length + 1
    end = end if wanted is None else min(end, wanted)
    return np.concatenate(tokens)[:end], np.concatenate(byte_counts)[1:end]


def _describe(
    checkpoint: Checkpoint, model: "PreTrainedModel", trust_remote_code: bool
) -> dict[str, int]:
    code = checkpoint.folder if trust_remote_code else None
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_key_value_heads": _num_key_value_heads(checkpoint.config, model.config, code),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(checkpoint.config, code),
    }


def _num_key_value_heads(
    raw: Mapping[str, Any], config: "PretrainedConfig", code: Path | None
) -> int:
    try:
        return read_heads(raw, code).num_key_value_heads
    except UnsupportedFamilyError:  # a family that is evaluated but cannot be converted
        text = config.get_text_config()
        return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    partial = folder / f".{EVALUATION}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / EVALUATION)
    except OSError as error:
        raise UptrainError(
            f"{folder}: cannot take the result ({error.strerror}); choose another --output"
        ) from error
