"""How fast models prefill and decode, side by side, and how near to the memory's bandwidth."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from uptrain.errors import DataError
from uptrain.evaluation.bandwidth import (
    device_name,
    free_bytes,
    measure_bandwidth,
    read_weight_bytes,
    seconds,
    weight_bytes,
)
from uptrain.evaluation.full_batch import FullBatch, cache_bytes, unmasked_steps
from uptrain.loading import context_length
from uptrain.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCHES = {"cpu": (1, 4), "cuda": (1, 4, 16)}
_CONTEXTS = {"cpu": (256,), "cuda": (1024, 4096)}
_ROUNDS, _ROUND_SECONDS, _MAX_STEPS = 5, 0.2, 64
_PREFILL_ROUNDS = 3
# Of the free memory: the rest is for activations and gaps, on a CPU for everything else as well.
_USABLE = {"cpu": 0.25, "cuda": 0.9}


@dataclass(frozen=True)
class _Size:
    """What one sequence of full context takes, and how many of them should fit."""

    cache_bytes: int
    fits: int
    """With all models loaded."""
    largest: int
    """With this model alone."""


@dataclass
class _Timed:
    """A batch, and what was measured of it."""

    batch: FullBatch
    peak_bytes: int
    """At most, beyond the weights."""
    kept_bytes: int
    """After the prefill, beyond the weights."""
    prefill_seconds: list[float]
    step_seconds: list[float]
    """A step, in each round."""


@torch.inference_mode()
def measure_decode(
    models: Mapping[str, "PreTrainedModel"],
    batches: Sequence[int | Literal["max"]] | None = None,
    contexts: Sequence[int] | None = None,
    baseline: str = "reference",
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure prefill and decode speed by batch and context, of all models in one process.

    The models take turns, a round of steps each, five times. A step decodes the last token of a full
    context for the whole batch from a static cache, greedily; on a GPU it is a CUDA graph. The bound
    is the time to read weights and cache once at the bandwidth measured before, which nothing beats
    where they are larger than the processor's own caches.

    Args:
        models: Causal language models in eval mode, on one device, by name.
        batches: Sequences at once; `max` is as many as should fit, of one model after the other.
            1, 4 and 16 on a GPU, 1 and 4 on a CPU if not given.
        contexts: Tokens of a full context; 1024 and 4096 on a GPU, 256 on a CPU if not given, or
            what the models were made for if that is less.
        baseline: Name of the model that the others are compared with, if it is among them.

    Returns:
        The results, and under what conditions they were measured. A result has `model`, `batch`,
        `context`; `tokens_per_second` and `milliseconds_per_step` (the median of
        `milliseconds_by_round`); `peak_bytes` (weights, cache, activations of this model; on a CPU
        weights and cache as computed); `prefill_tokens_per_second`, `prefill_batch`;
        `kv_cache_bytes_per_token` as held, `read_bytes_per_step`, `bound_milliseconds`,
        `bandwidth_fraction` (bound over measured); `largest_batch` (estimated from free memory, for
        this model alone); `cuda_graph`, `interleaved`; and where there is a baseline `speedup`, the
        median over rounds of its tokens a second over the baseline's, and `speedup_range`.
        What does not fit is listed in the conditions as `left_out`.

    Raises:
        DataError: If a context is longer than the models were made for.
        UptrainError: If a model cannot decode from a static cache.
    """
    first = next(iter(models.values()))
    device = first.device
    kind = "cpu" if device.type == "cpu" else "cuda"
    lengths = _pick_contexts(models, contexts, kind)
    settings = [
        (context, batch)
        for context in lengths
        for batch in dict.fromkeys(batches or _BATCHES[kind])
    ]
    bandwidth = measure_bandwidth(device)
    results: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    with unmasked_steps(), progress("decode", len(settings), "settings") as advance:
        for context, batch in settings:
            sizes = _size_up(models, context)
            wanted = {
                name: size.fits if batch == "max" else int(batch) for name, size in sizes.items()
            }
            rows: list[dict[str, Any]] = []
            for names in _groups(wanted, sizes, device):
                try:
                    timed = _time({name: models[name] for name in names}, wanted, context)
                except torch.OutOfMemoryError:
                    timed = {}
                rows += [
                    _describe(name, each, sizes[name], bandwidth["bytes_per_second"])
                    | {"interleaved": len(names) > 1}
                    for name, each in timed.items()
                ]
                del timed
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            measured = {row["model"] for row in rows}
            left_out += [
                {"model": name, "batch": wanted[name], "context": context}
                for name in models
                if name not in measured
            ]
            results += _compare(rows, baseline)
            advance(1, f"batch {batch}, context {context}")
    return results, {
        "device": device_name(device),
        "device_type": device.type,
        "dtype": str(first.dtype).removeprefix("torch."),
        "bandwidth": bandwidth,
        "left_out": left_out,
    }


def _pick_contexts(
    models: Mapping[str, "PreTrainedModel"], contexts: Sequence[int] | None, kind: str
) -> list[int]:
    known = [context_length(model.config) for model in models.values()]
    limit = min((each for each in known if each is not None), default=None)
    if contexts is None:
        contexts = [min(each, limit or each) for each in _CONTEXTS[kind]]
    for each in contexts:
        if each < 2 or (limit is not None and each > limit):
            raise DataError(
                f"decode_contexts={each}: expected 2 tokens or more"
                + (f", and {limit} at most, what the models were made for" if limit else "")
            )
    return list(dict.fromkeys(contexts))


def _size_up(models: Mapping[str, "PreTrainedModel"], context: int) -> dict[str, _Size]:
    weights = {name: weight_bytes(model) for name, model in models.items()}
    sizes = {}
    for name, model in models.items():
        one = cache_bytes(model, context)
        free = free_bytes(model.device)
        alone = free + sum(weights.values()) - weights[name]
        fits, largest = (_usable(nbytes, model.device) // one for nbytes in (free, alone))
        sizes[name] = _Size(one, fits, largest)
    return sizes


def _usable(nbytes: int, device: torch.device) -> int:
    return int(_USABLE["cpu" if device.type == "cpu" else "cuda"] * nbytes)


def _groups(
    wanted: Mapping[str, int], sizes: Mapping[str, _Size], device: torch.device
) -> list[list[str]]:
    """Say which models are measured in turns: all that fit, or each alone if not all at once."""
    fitting = [name for name, size in sizes.items() if 0 < wanted[name] <= size.fits]
    needed = sum(wanted[name] * sizes[name].cache_bytes for name in fitting)
    if needed <= _usable(free_bytes(device), device):
        return [fitting] if fitting else []
    return [[name] for name in fitting]


def _time(
    models: Mapping[str, "PreTrainedModel"], wanted: Mapping[str, int], context: int
) -> dict[str, _Timed]:
    timed = {}
    for name, model in models.items():
        with _Peak(model.device) as peak:
            batch = FullBatch(model, wanted[name], context)
            batch.prefill()
        timed[name] = _Timed(batch, peak.beyond, peak.kept, [], [])
    for _ in range(_PREFILL_ROUNDS):
        for each in timed.values():
            each.prefill_seconds.append(seconds(each.batch.prefill, each.batch.device))
    steps = {}
    for name, each in timed.items():
        with _Peak(each.batch.device) as peak:
            each.batch.widen()
            each.batch.step()
            if each.batch.device.type == "cuda":
                each.batch.capture()
        each.peak_bytes = max(each.peak_bytes, each.kept_bytes + peak.beyond)
        once = min(seconds(each.batch.step, each.batch.device) for _ in range(2))
        steps[name] = max(1, min(_MAX_STEPS, math.ceil(_ROUND_SECONDS / once)))
    for _ in range(_ROUNDS):
        for name, each in timed.items():
            each.step_seconds.append(_round(each.batch, steps[name]))
    return timed


def _round(batch: FullBatch, steps: int) -> float:
    """Time some steps one after the other; returns seconds a step."""

    def run() -> None:
        for _ in range(steps):
            batch.step()

    return seconds(run, batch.device) / steps


class _Peak:
    """What a GPU's memory held at most within a block, and still holds, beyond what it did before.

    Both are 0 on a CPU.
    """

    beyond = kept = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> "_Peak":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self.beyond = torch.cuda.max_memory_allocated(self._device) - self._before
            self.kept = torch.cuda.memory_allocated(self._device) - self._before


def _describe(name: str, timed: _Timed, size: _Size, bandwidth: float) -> dict[str, Any]:
    batch = timed.batch
    cached = batch.batch * size.cache_bytes
    step = statistics.median(timed.step_seconds)
    prefill = min(timed.prefill_seconds)
    read = read_weight_bytes(batch.model) + cached
    is_cpu = batch.device.type == "cpu"
    return {
        "model": name,
        "batch": batch.batch,
        "context": batch.context,
        "tokens_per_second": batch.batch / step,
        "milliseconds_per_step": 1000 * step,
        "milliseconds_by_round": [1000 * each for each in timed.step_seconds],
        "peak_bytes": weight_bytes(batch.model) + (cached if is_cpu else timed.peak_bytes),
        "prefill_tokens_per_second": batch.prefill_batch * (batch.context - 1) / prefill,
        "prefill_batch": batch.prefill_batch,
        "kv_cache_bytes_per_token": size.cache_bytes // batch.context,
        "read_bytes_per_step": read,
        "bound_milliseconds": 1000 * read / bandwidth,
        "bandwidth_fraction": read / bandwidth / step,
        "largest_batch": size.largest,
        "cuda_graph": batch.is_graph,
    }


def _compare(rows: list[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Add to each row how many times the baseline's tokens a second it makes, by round."""
    speeds = {
        row["model"]: [row["batch"] / each for each in row["milliseconds_by_round"]] for row in rows
    }
    for row in rows if baseline in speeds else ():
        pairs = zip(speeds[row["model"]], speeds[baseline], strict=True)
        ratios = [own / other for own, other in pairs]
        row["speedup"] = statistics.median(ratios)
        row["speedup_range"] = [min(ratios), max(ratios)]
    return rows
