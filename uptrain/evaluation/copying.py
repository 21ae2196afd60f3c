"""Whether a model can copy: its loss on a random span that it has seen once already."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from uptrain.evaluation.blocks import read_tokens
from uptrain.evaluation.scoring import rows_at_once, score
from uptrain.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHORTEST = 8
_SPAN_TOKENS = 8192  # of all spans of one length together
_MOST_SPANS = 64
_SEED = 0
_KNOWN_TOKENS = 2**16


def measure_copying(
    model: "PreTrainedModel",
    tokenizer: Any,
    path: Path,
    context: int,
    reference: "PreTrainedModel | None" = None,
) -> list[dict[str, float]]:
    """Measure the loss on the second half of repeated random spans, by their length.

    Only attention to a place that lies the span's length back tells what comes next: what merging
    heads may take from a model that is otherwise hardly worse. Tokens are drawn from the text one by
    one, so that common ones are common and none is new to the model, in an order without sense.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its own.
        path: The text that tokens are drawn from, its first 65,536.
        context: Most inputs that the models were made for.
        reference: Another model with the same vocabulary, on the same device.

    Returns:
        For each `distance` (a power of two, the span's length, twice which fits the context):
        `tokens` predicted, `loss` the second time and `first_loss` the first time (nats a token),
        and the same of the reference.

    Source: Olsson et al. 2022, In-context Learning and Induction Heads.
    """
    front = tokenizer.bos_token_id
    front = tokenizer.eos_token_id if front is None else front
    known = read_tokens(path, tokenizer, 1, _KNOWN_TOKENS)
    known = known[~np.isin(known, tokenizer.all_special_ids)]
    random = np.random.default_rng(_SEED)
    counts = {
        distance: max(1, min(_MOST_SPANS, _SPAN_TOKENS // distance))
        for distance in (2**i for i in range(_SHORTEST.bit_length() - 1, context.bit_length()))
        if 2 * distance <= context
    }
    results: list[dict[str, float]] = []
    total = sum(2 * distance * count for distance, count in counts.items())
    with progress("copying", total, "tokens") as advance:
        for distance, count in counts.items():
            spans = random.choice(known, (count, distance))
            before = np.full((count, 0 if front is None else 1), front or 0)
            tokens = np.concatenate([before, spans, spans], axis=1)
            inputs, labels = tokens[:, :-1], tokens[:, 1:]
            rows = rows_at_once(model.config, model.dtype, inputs.shape[1], model.device.type)
            found = []
            for start in range(0, count, rows):
                part = slice(start, start + rows)
                found.append(score(model, inputs[part], labels[part], reference))
                advance(inputs[part].size, f"distance {distance}")
            row: dict[str, float] = {"distance": distance, "tokens": count * distance}
            row |= _halves([each.loss for each in found], distance)
            losses = [each.reference_loss for each in found if each.reference_loss is not None]
            if losses:
                beside = _halves(losses, distance)
                row |= {f"reference_{key}": value for key, value in beside.items()}
            results.append(row)
    return results


def _halves(losses: list[npt.NDArray[np.float32]], distance: int) -> dict[str, float]:
    loss = np.concatenate(losses).astype(np.float64)
    return {
        "loss": float(loss[:, -distance:].mean()),
        "first_loss": float(loss[:, :-distance].mean()),
    }
