"""What a model makes of every token of a stream, alone or beside a reference."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from uptrain.errors import CheckpointError, UptrainError
from uptrain.loading import vocabulary_size
from uptrain.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of one forward pass: more rows at once are not faster beyond this.
_LOGIT_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
# Log-probabilities are made for so many bytes at a time: on a CPU they should stay in its cache.
_CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**28}

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


def score(
    model: "PreTrainedModel",
    tokens: npt.NDArray[np.int64],
    length: int,
    reference: "PreTrainedModel | None" = None,
) -> Scores:
    """Let a model predict every token of a stream but the first, block after block.

    Args:
        model: A causal language model in eval mode.
        tokens: [blocks * length + 1]; block i feeds [i * length, (i + 1) * length) and predicts the
            token behind each.
        length: Inputs of a block.
        reference: Another model with the same vocabulary, on the same device.

    Raises:
        UptrainError: If a loss is not finite, or the two models have unlike logits.
    """
    blocks = (len(tokens) - 1) // length
    device = model.device
    inputs = torch.from_numpy(tokens[:-1].reshape(blocks, length))
    labels = torch.from_numpy(tokens[1:].reshape(blocks, length))
    batch = _batch_blocks(model, length, device.type)
    parts: list[list[torch.Tensor]] = []
    total = 0.0
    with torch.inference_mode(), progress("evaluate", blocks * length, "tokens") as advance:
        for start in range(0, blocks, batch):
            rows = inputs[start : start + batch].to(device)
            models = [model] if reference is None else [model, reference]
            logits = [m(input_ids=rows, use_cache=False).logits.flatten(0, 1) for m in models]
            if len({each.shape for each in logits}) > 1:
                raise CheckpointError(
                    f"the model gives {logits[0].shape[-1]} logits a token, the reference "
                    f"{logits[1].shape[-1]}; expected one vocabulary"
                )
            part = _score_tokens(logits, labels[start : start + batch].flatten().to(device))
            part = [values.reshape(-1, length).cpu() for values in part]
            for values, what in zip(part, _FINITE, strict=False):
                _check_finite(values, what, start)
            parts.append(part)
            total += float(part[0].sum(dtype=torch.float64))
            done = (start + len(rows)) * length
            advance(rows.numel(), f"loss {total / done:.4f}")
    return Scores(*(torch.cat(values).numpy() for values in zip(*parts, strict=True)))


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
            "dtype overflows (then evaluate on --device cpu)"
        )


def _batch_blocks(model: "PreTrainedModel", length: int, device: str) -> int:
    vocabulary = vocabulary_size(model.config) or 2**17
    row_bytes: int = length * vocabulary * model.dtype.itemsize
    kind = _kind(device)
    return max(1, min(_LOGIT_BYTES[kind] // row_bytes, _BATCH_TOKENS[kind] // length))


def _kind(device: str) -> str:
    return "cpu" if device == "cpu" else "cuda"
