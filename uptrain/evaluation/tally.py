"""Scores of single tokens summed up: over all, by document, by position in the context."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from uptrain.errors import CheckpointError, DataError
from uptrain.evaluation.blocks import Blocks, source_bytes
from uptrain.evaluation.bootstrap import MIN_DOCUMENTS, interval, p_value, resample_means, settings
from uptrain.evaluation.scoring import Scores, score
from uptrain.loading import vocabulary_size
from uptrain.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Floats = npt.NDArray[np.float64]

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_WORST = 10
_MIN_TOKENS = 32  # of a document that is listed: the loss of fewer is chance


class Tally:
    """Sums in float64, in memory that grows with the documents but not with their length."""

    def __init__(self, length: int, compares: bool) -> None:
        self._names = ["loss", "reference_loss", "kl", "top1_agreement"][: 4 if compares else 1]
        self._by_position = np.zeros((1 + len(self._names), length))
        self._documents: list[npt.NDArray[np.int64]] = []
        self._by_document: list[Floats] = []

    def add(self, blocks: Blocks, scores: Scores) -> None:
        """Add what a model, and a reference if there is one, makes of some blocks."""
        found = [scores.loss, scores.reference_loss, scores.kl, scores.agrees]
        each = [values for values in found if values is not None]
        ones = np.ones(blocks.labels.shape)
        self._by_position += [values.sum(0, dtype=np.float64) for values in (ones, *each)]
        numbers = blocks.documents.ravel()
        first, last = numbers[0], numbers[-1]
        self._documents.append(np.arange(first, last + 1))
        self._by_document.append(
            np.stack(
                [
                    np.bincount(numbers - first, weights=values.ravel())
                    for values in (ones, blocks.byte_counts, *each)
                ]
            )
        )

    def text_bytes(self) -> int:
        """UTF-8 bytes of the text that the tokens stand for."""
        return int(sum(sums[1].sum() for sums in self._by_document))

    def summary(self) -> dict[str, Any]:
        """Give the figures over all tokens, with the intervals that the documents allow."""
        numbers, counts, sums = self._join()
        tokens = int(counts.sum())
        mean = dict(zip(self._names, (sums.sum(1) / tokens).tolist(), strict=True))
        result = {"loss": mean["loss"], **_of_loss(mean["loss"], tokens, self.text_bytes())}
        result["tokens"] = tokens
        compares = len(self._names) > 1
        if compares:
            reference = _of_loss(mean["reference_loss"], tokens, self.text_bytes())
            result |= {
                "reference_loss": mean["reference_loss"],
                **{f"reference_{key}": value for key, value in reference.items()},
                "loss_increase": mean["loss"] - mean["reference_loss"],
                "kl": mean["kl"],
                "top1_agreement": mean["top1_agreement"],
            }
        result["documents"] = len(numbers)
        if len(numbers) >= MIN_DOCUMENTS:
            means = dict(zip(self._names, resample_means(sums, counts), strict=True))
            if compares:
                means["loss_increase"] = means["loss"] - means["reference_loss"]
                result["loss_increase_p"] = p_value(means["loss_increase"])
            result["intervals"] = {name: list(interval(values)) for name, values in means.items()}
            result["bootstrap"] = settings()
        return result

    def by_position(self) -> list[dict[str, float]]:
        """Give means a token by its place in the context, in ranges that double.

        Returns:
            For each range `first` and `last` (inputs that the model saw, this one included),
            `tokens` and the means.
        """
        length = self._by_position.shape[1]
        rows, first = [], 1
        while first <= length:
            last = min(max(1, 2 * (first - 1)), length)
            rows.append({"first": first, "last": last} | self._means(first - 1, last))
            first = last + 1
        return rows

    def by_document(self) -> dict[str, Any]:
        """Give how the documents differ, and the worst of them.

        Returns:
            `quantiles` over documents of the loss a token (over the reference if there is one), and
            the `worst` documents: `document` (counted from 0), `tokens` and their means. Documents
            of fewer than 32 predicted tokens are left out of both, unless all are that short.
        """
        numbers, counts, sums = self._join()
        enough = counts >= _MIN_TOKENS
        if enough.any():
            numbers, counts, sums = numbers[enough], counts[enough], sums[:, enough]
        means = sums / counts
        ranked = means[0] - means[1] if len(means) > 1 else means[0]
        worst = np.argsort(-ranked, kind="stable")[:_WORST]
        return {
            "documents": len(numbers),
            "of": "loss_increase" if len(means) > 1 else "loss",
            "quantiles": {
                f"{part:g}": value
                for part, value in zip(
                    _QUANTILES, np.quantile(ranked, _QUANTILES).tolist(), strict=True
                )
            },
            "worst": [
                {"document": int(numbers[i]), "tokens": int(counts[i])}
                | self._named(means[:, i].tolist())
                for i in worst
            ],
        }

    def _means(self, start: int, stop: int) -> dict[str, float]:
        tokens, *sums = self._by_position[:, start:stop].sum(1).tolist()
        return {"tokens": int(tokens)} | self._named([each / tokens for each in sums])

    def _named(self, means: Sequence[float]) -> dict[str, float]:
        named = dict(zip(self._names, means, strict=True))
        if "reference_loss" in named:
            named["loss_increase"] = named["loss"] - named["reference_loss"]
        return named

    def _join(self) -> tuple[npt.NDArray[Any], Floats, Floats]:
        """Join what the batches saw of each document: numbers, tokens, [quantities, documents]."""
        numbers = np.concatenate(self._documents)
        columns = np.concatenate(self._by_document, axis=1)
        joined: Floats = np.stack([np.bincount(numbers, weights=row) for row in columns])
        seen = np.flatnonzero(joined[0])
        return seen, joined[0, seen], joined[2:, seen]


def tally_text(
    model: "PreTrainedModel",
    reference: "PreTrainedModel | None",
    path: Path,
    blocks: Iterable[Blocks],
    length: int,
    max_tokens: int | None,
) -> Tally:
    """Score a text, and show how far that is.

    Args:
        model: A causal language model in eval mode.
        reference: Another one with the same vocabulary, on the same device.
        path: Where the text is.
        blocks: What `read_blocks` gives of it.
        length: Inputs of a block.
        max_tokens: What `blocks` was limited to.

    Raises:
        CheckpointError: If a token is not in the model's vocabulary.
        DataError: If the text cannot be read, or has no token.
        UptrainError: If a loss is not finite.
    """
    tally = Tally(length, compares=reference is not None)
    vocabulary = vocabulary_size(model.config)
    total, unit = source_bytes(path), "bytes"
    if max_tokens is not None:
        total, unit = max_tokens // length * length, "tokens"
    done, loss = 0, 0.0
    with progress("evaluate", total, unit) as advance:
        for part in blocks:
            largest = max(part.inputs.max(), part.labels.max())
            if vocabulary is not None and largest >= vocabulary:
                raise CheckpointError(
                    f"{model.name_or_path}: its tokenizer gives token {largest}, its vocabulary has "
                    f"{vocabulary}; take the tokenizer files of the original checkpoint"
                )
            scores = score(model, part.inputs, part.labels, reference, done // length)
            tally.add(part, scores)
            done += part.labels.size
            loss += float(scores.loss.sum(dtype=np.float64))
            advance(
                part.read_bytes if unit == "bytes" else part.labels.size, f"loss {loss / done:.4f}"
            )
    if not tally.text_bytes():
        raise DataError(f"{path}: its text has no token; expected text to predict")
    return tally


def _of_loss(loss: float, tokens: int, text_bytes: int) -> dict[str, float]:
    return {
        "perplexity": math.exp(min(loss, 700.0)),  # a float holds little more
        "bits_per_byte": loss * tokens / math.log(2) / text_bytes,
    }
