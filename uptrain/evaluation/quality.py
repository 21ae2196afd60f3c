"""How well a model predicts a text, and how far it is from the model it was made of."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.checkpoint.staging import replace_file
from uptrain.errors import DataError, UnsupportedFamilyError, UptrainError
from uptrain.evaluation.blocks import read_blocks
from uptrain.evaluation.continuations import continue_prompts
from uptrain.evaluation.copying import measure_copying
from uptrain.evaluation.decode import measure_decode
from uptrain.evaluation.scoring import rows_at_once
from uptrain.evaluation.tally import Tally, tally_text
from uptrain.evaluation.tasks import check_tasks, run_tasks
from uptrain.families.head_tensors import kv_cache_bytes_per_token
from uptrain.families.registry import checkpoint_dtype, read_heads
from uptrain.loading import (
    check_same_vocabulary,
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EVALUATION = "evaluation.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_DEFAULT_MAX_SEQUENCE_LENGTH = 2048


def evaluate(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
    sequence_length: int | None = None,
    dtype: str = "auto",
    long_context: bool = False,
    copying: bool = False,
    continuations: bool = False,
    tasks: Sequence[str] = (),
    tasks_folder: str | os.PathLike[str] | None = None,
    decode: bool = False,
    decode_batches: Sequence[int | Literal["max"]] | None = None,
    decode_contexts: Sequence[int] | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    output: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Measure how well a checkpoint predicts a text, alone or against a reference.

    Each document is preceded by the tokenizer's bos token (else eos, else nothing), all are
    concatenated and cut in blocks of `sequence_length` inputs, the last short one dropped; every
    token is predicted once. What follows the logits is float32, sums are float64. The text is read
    as it is needed; memory grows with the number of documents only.

    Args:
        model: A checkpoint folder or a hub id. Its tokenizer is the one used.
        data: A `.jsonl` or `.parquet` file (`text` or `messages`), a data set that was saved to disk,
            or a plain text file.
        reference: A checkpoint with the same tokenizer, usually the one that `model` was made of.
        max_tokens: Predict at most so many tokens, in whole blocks; the whole text if not given.
        sequence_length: Inputs of a block; the model's context, at most 2048, if not given.
        dtype: Of weights and arithmetic: `float32` (without TF32 in matrix products), `bfloat16`, or `auto`: float32 on
            a CPU, the checkpoint's own elsewhere.
        long_context: Measure the loss by position once more, in blocks of the whole context.
        copying: Measure the loss on repeated random spans; see `measure_copying`.
        continuations: Let the models continue five prompts; see `continue_prompts`.
        tasks: Tasks of the lm-evaluation-harness.
        tasks_folder: A folder of more tasks.
        decode: Measure prefill and decode speed; on a GPU in the checkpoint's own dtype.
        decode_batches: See `measure_decode`.
        decode_contexts: See `measure_decode`.
        device: `cpu`, `cuda`, …; a GPU where there is one if not given.
        trust_remote_code: Run the code that a checkpoint brings along.
        output: A folder to leave the result in, as `evaluation.json`.

    Returns:
        `loss` (nats a token), `perplexity`, `bits_per_byte` (UTF-8 bytes of the text), `tokens`
        (predicted), `documents`, `parameters` (tied ones once), `num_key_value_heads`,
        `kv_cache_bytes_per_token` (in the checkpoint's dtype), and how it was measured. With a
        reference also `loss_increase`, `kl` (KL(reference ‖ model), nats a token), `top1_agreement`
        (fraction of tokens), and what is known of it as `reference_…`. From five documents on
        `intervals` (95%, by bootstrap over documents) and `loss_increase_p` (paired). `by_position`
        and `by_document` as `Tally` gives them. `long_context`, `copying`, `continuations`, `tasks`,
        `decode` and `decode_conditions` if asked for.

    Raises:
        CheckpointError: If a checkpoint cannot be read or loaded whole, or the reference has
            another vocabulary.
        UnsupportedFamilyError: If transformers does not know an architecture.
        DataError: If the text cannot be read, or is shorter than one block.
        UptrainError: If there is no such device, the loss is not finite, an extra is not installed,
            or `output` cannot be written.
    """
    place = pick_device(device)
    manager = check_tasks(tasks, tasks_folder) if tasks else None
    checkpoint = open_checkpoint(model)
    config = load_config(checkpoint, trust_remote_code)
    length = _block_length(checkpoint, config, sequence_length, max_tokens)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code)
    other, context = None, context_length(config)
    if reference is not None:
        other = open_checkpoint(reference)
        other_config = load_config(other, trust_remote_code)
        check_same_vocabulary(checkpoint, config, other, other_config, trust_remote_code)
        _block_length(other, other_config, length, max_tokens)
        known = [each for each in (context, context_length(other_config)) if each is not None]
        context = min(known, default=None)
    own_dtype = checkpoint_dtype(checkpoint.config)
    chosen = _pick_dtype(dtype, place)
    rows = rows_at_once(config, chosen or own_dtype, length, place.type)
    # The text is opened before the models are loaded: a wrong path should not take minutes.
    blocks = read_blocks(Path(data), tokenizer, length, max_tokens, rows)
    blocks = chain([next(blocks)], blocks)

    scored = load_model(checkpoint, place, config, chosen, trust_remote_code)
    names, described = {"model": checkpoint.name}, _describe(checkpoint, scored, trust_remote_code)
    referee = None
    if other is not None:
        referee = load_model(other, place, other_config, chosen, trust_remote_code)
        names["reference"] = other.name
        of_reference = _describe(other, referee, trust_remote_code)
        described |= {f"reference_{key}": value for key, value in of_reference.items()}
    models = {"target": scored} | ({} if referee is None else {"reference": referee})
    result: dict[str, Any] = dict(names)
    with _exact_float32():
        tally = tally_text(scored, referee, Path(data), blocks, length, max_tokens)
        result |= tally.summary() | described
        result |= {
            "data": Path(data).name,
            "sequence_length": length,
            "device": place.type,
            "dtype": str(scored.dtype).removeprefix("torch."),
            "by_position": tally.by_position(),
            "by_document": tally.by_document(),
        }
        limit = context or _DEFAULT_MAX_SEQUENCE_LENGTH
        if long_context:
            whole = tally
            if limit > length:
                most = None if max_tokens is None else max(max_tokens, limit)
                rows = rows_at_once(config, scored.dtype, limit, place.type)
                blocks = read_blocks(Path(data), tokenizer, limit, most, rows)
                whole = tally_text(scored, referee, Path(data), blocks, limit, most)
            result["long_context"] = _describe_long(whole, limit)
        if copying:
            result["copying"] = measure_copying(scored, tokenizer, Path(data), limit, referee)
        if continuations:
            result["continuations"] = continue_prompts(models, tokenizer, Path(data), limit)
        if manager is not None:
            result["tasks"] = run_tasks(models, tokenizer, tasks, manager)
    if decode:
        if place.type != "cpu":  # what is served is not what is measured exactly
            for each in models.values():
                each.to(own_dtype)
        result["decode"], result["decode_conditions"] = measure_decode(
            models, decode_batches, decode_contexts
        )
    if output is not None:
        _write(Path(output), result)
    return result


def check_evaluation(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    max_tokens: int | None = None,
    sequence_length: int | None = None,
    tasks: Sequence[str] = (),
    tasks_folder: str | os.PathLike[str] | None = None,
) -> None:
    """Refuse what `evaluate` would refuse of these, before there is a model to evaluate.

    Args:
        model: The original of what will be evaluated: context and tokenizer are the same.
        data: As for `evaluate`.
        max_tokens: Likewise.
        sequence_length: Likewise.
        tasks: Likewise.
        tasks_folder: Likewise.

    Raises:
        CheckpointError, UnsupportedFamilyError, DataError, UptrainError: As `evaluate`.
    """
    if tasks:
        check_tasks(tasks, tasks_folder)
    checkpoint = open_checkpoint(model)
    length = _block_length(checkpoint, load_config(checkpoint), sequence_length, max_tokens)
    next(read_blocks(Path(data), load_tokenizer(checkpoint), length, max_tokens, 1))


def _describe_long(tally: Tally, length: int) -> dict[str, Any]:
    found = tally.summary()
    kept = ("loss", "reference_loss", "loss_increase", "kl", "tokens")
    return {
        "sequence_length": length,
        **{key: found[key] for key in kept if key in found},
        "by_position": tally.by_position(),
    }


def _pick_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Say what to load checkpoints in; None for their own dtype."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else None
    if name not in DTYPES:
        raise UptrainError(f"dtype={name}: expected auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Let float32 be float32 on a GPU as well: TF32 rounds the factors of a product to 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UptrainError(
            f"{folder}: cannot take the result ({error.strerror}); choose another --output"
        ) from error
    replace_file(folder / EVALUATION, (json.dumps(result, indent=2) + "\n").encode())
