"""What a model makes of every token of some blocks, alone or beside a reference."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from uptrain.errors import CheckpointError, UptrainError
from uptrain.evaluation.blocks import Ids
from uptrain.loading import vocabulary_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Logits of one forward pass: more rows at once are not faster beyond this.
_LOGIT_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
# Log-probabilities are made for so many bytes at a time: on a CPU they should stay in its cache.
_CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**28}
# A single block with more logits than this goes through the model in parts, by its cache.
_WHOLE_BLOCK_BYTES = 4 * 2**30

_FINITE = ("loss of the model", "loss of the reference", "KL divergence")


@dataclass(frozen=True)
class Scores:
    """What a model, and a reference beside it, make of each predicted token: [blocks, length]."""

    loss: npt.NDArray[np.float32]
    """Nats."""
    reference_loss: npt.NDArray[np.float32] | None = None
    """Nats."""
    kl: npt.NDArray[np.float32] | None = None
    """KL(reference ‖ model), nats."""
    agrees: npt.NDArray[np.bool_] | None = None
    """Whether both models find the same token most likely."""


@torch.inference_mode()
def score(
    model: "PreTrainedModel",
    inputs: Ids,
    labels: Ids,
    reference: "PreTrainedModel | None" = None,
    first_block: int = 0,
) -> Scores:
    """Let a model predict the tokens of some blocks, each on its own.

    Args:
        model: A causal language model in eval mode.
        inputs: [blocks, length]; all of them go through the model at once.
        labels: [blocks, length], the token behind each input.
        reference: Another model with the same vocabulary, on the same device.
        first_block: Number of the first of these blocks, for messages.

    Raises:
        UptrainError: If a loss is not finite.
        CheckpointError: If the two models have unlike logits.
    """
    rows, length = inputs.shape
    device = model.device
    at_once = length
    if _block_bytes(model.config, model.dtype, length) > _WHOLE_BLOCK_BYTES:
        at_once = max(1, _LOGIT_BYTES["cuda"] // _block_bytes(model.config, model.dtype, 1))
    models = [model] if reference is None else [model, reference]
    states: list[dict[str, Any]] = [{"use_cache": at_once < length} for _ in models]
    parts: list[list[torch.Tensor]] = []
    for start in range(0, length, at_once):
        given = torch.from_numpy(inputs[:, start : start + at_once]).to(device)
        wanted = torch.from_numpy(labels[:, start : start + at_once]).to(device)
        logits = []
        for each, state in zip(models, states, strict=True):
            out = each(input_ids=given, **state)
            if at_once < length:
                state["past_key_values"] = out.past_key_values
            logits.append(out.logits.flatten(0, 1))
        if len({each.shape for each in logits}) > 1:
            raise CheckpointError(
                f"the model gives {logits[0].shape[-1]} logits a token, the reference "
                f"{logits[1].shape[-1]}; expected one vocabulary"
            )
        part = _score_tokens(logits, wanted.flatten())
        parts.append([values.reshape(rows, -1).cpu() for values in part])
    scores = [torch.cat(values, dim=1) for values in zip(*parts, strict=True)]
    for values, what in zip(scores, _FINITE, strict=False):
        _check_finite(values, what, first_block)
    return Scores(*(values.numpy() for values in scores))


def rows_at_once(config: "PretrainedConfig", dtype: torch.dtype, length: int, device: str) -> int:
    """Say how many blocks to let through a model at once.

    Args:
        config: The model's.
        dtype: Of its logits.
        length: Inputs of a block.
        device: Type of the device that it is on.
    """
    kind = _kind(device)
    by_logits = _LOGIT_BYTES[kind] // _block_bytes(config, dtype, length)
    return max(1, min(by_logits, _BATCH_TOKENS[kind] // length))


def _block_bytes(config: "PretrainedConfig", dtype: torch.dtype, length: int) -> int:
    return length * (vocabulary_size(config) or 2**17) * dtype.itemsize


def _score_tokens(logits: list[torch.Tensor], labels: torch.Tensor) -> list[torch.Tensor]:
    """Score tokens, a chunk at a time.

    Args:
        logits: [tokens, vocabulary] of the model and, if there is one, of the reference.
        labels: [tokens], the tokens that came.

    Returns:
        [tokens] each: loss; with a reference also its loss, KL and agreement.
    """
    chunk = max(1, _CHUNK_BYTES[_kind(labels.device.type)] // (4 * logits[0].shape[-1]))
    parts = []
    for start in range(0, len(labels), chunk):
        target = labels[start : start + chunk, None]
        log_probs = [each[start : start + chunk].float().log_softmax(-1) for each in logits]
        part = [-each.gather(-1, target).squeeze(-1) for each in log_probs]
        if len(logits) == 2:
            student, teacher = log_probs
            # A logit of -inf has no probability and adds nothing, though the product is NaN.
            part.append(((teacher - student) * teacher.exp()).nansum(-1))
            part.append(student.argmax(-1) == teacher.argmax(-1))
        parts.append(part)
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def _check_finite(values: torch.Tensor, what: str, first_block: int) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        block, position = bad[0].tolist()
        raise UptrainError(
            f"the {what} is {float(values[block, position])} at token {position} of block "
            f"{first_block + block}, expected a finite number; the weights are damaged, or their "
            "dtype overflows (then evaluate with --dtype float32)"
        )


def _kind(device: str) -> str:
    return "cpu" if device == "cpu" else "cuda"
