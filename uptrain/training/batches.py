"""Batches of a run: a pure function from (data, seed, step), read ahead of the steps."""

import bisect
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from uptrain.data.shards import TokenShards
from uptrain.errors import DataError
from uptrain.training.order import Order, whole_shares
from uptrain.training.packing import positions

_MAX_LENGTH = 2048
# Of a device's micro-batch, if the recipe leaves it open: tokens on a CPU, tokens × hidden_size on a
# GPU. Measured on the example models and on one of 1.12B parameters: more are hardly faster. Several
# devices take twice as many: each part of a sharded step gathers all weights anew.
_CPU_MICRO_TOKENS, _GPU_MICRO_ELEMENTS = 4096, 2**24


class MicroBatch(NamedTuple):
    """What goes through a device at once."""

    inputs: torch.Tensor
    """[sequences, length], int64."""
    targets: torch.Tensor
    """[sequences, length], int64, the token behind each input."""
    position_ids: torch.Tensor | None
    """[sequences, length], int64, from 0 in each document; None if attention is not kept inside."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Bring it to a device; does not wait for the copy."""
        return MicroBatch(
            *(None if each is None else each.to(device, non_blocking=True) for each in self)  # type: ignore[arg-type]
        )


class _Pool(NamedTuple):
    """Text that has an order of its own: all of it, or one weighted source."""

    name: str
    blocks: int
    first_block: int
    first_token: int


@dataclass(frozen=True)
class Batches:
    """The batches of a run: blocks of tokens, in an order drawn anew each epoch.

    Without weights, block i is the tokens [iL, iL + L] of all sources behind one another. With
    weights, each source is cut into blocks of its own; they are numbered on from source to source.
    """

    shards: TokenShards
    sequence_length: int
    batch_sequences: int
    """Blocks in one step, over all processes."""
    seed: int
    weights: tuple[float, ...] | None = None
    """Of each source; None to go over all of them alike."""
    within_documents: bool = False
    """Whether to number positions anew in each document."""

    @property
    def blocks(self) -> int:
        """Number of whole blocks of `sequence_length` inputs, each with its targets."""
        return sum(pool.blocks for pool in self._pools)

    def fingerprint(self) -> dict[str, Any]:
        """What decides which tokens come when, by the key of the recipe."""
        files = {
            f"data.train[{number}]": {"name": each["file"], "sha256": each["sha256"]}
            for number, each in enumerate(self.shards.manifest["sources"])
        }
        return {
            **files,  # before the digest of all that was made of them: a difference is named better
            "data.train": self.shards.digest,
            "data.seed": self.seed,
            "weight in data.train": list(self._order.shares) if self.weights else None,
            "data.attention_within_documents": self.within_documents,
        }

    def epochs(self, steps: int) -> list[tuple[str, float]]:
        """How often `steps` steps go over the text: of all sources, or by name of each weighted one."""
        used = self._order.counts(steps * self.batch_sequences)
        return [
            (pool.name, count / pool.blocks) for pool, count in zip(self._pools, used, strict=True)
        ]

    def check(self, steps: int, repeat: bool) -> None:
        """Refuse data that cannot feed `steps` steps.

        Raises:
            DataError: If there is less than one batch, less than `steps` and no `repeat`, or a
                weighted source has not one block.
        """
        batch_tokens = self.batch_sequences * self.sequence_length
        found = f"data.train holds {self.shards.tokens:,} tokens"
        if self.blocks < self.batch_sequences:
            raise DataError(
                f"{found}, fewer than one batch of {batch_tokens:,} (and one more to predict); "
                "add text or lower train.batch_tokens"
            )
        for pool in self._pools:
            if pool.blocks == 0:
                raise DataError(
                    f"data.train: {pool.name} has not one sequence of {self.sequence_length:,} tokens; "
                    "add text, or leave the source out"
                )
        for name, epochs in self.epochs(steps):
            if epochs <= 1 or repeat:
                continue
            if self.weights is None:
                need = f"{steps:,} steps of {batch_tokens:,} need {steps * batch_tokens + 1:,}"
                raise DataError(
                    f"{found}, but {need}; add text, lower the budget, or set "
                    f"data.repeat: true to go over the text {epochs:.1f} times"
                )
            raise DataError(
                f"data.train: {name} is too short for its weight in {steps:,} steps of "
                f"{batch_tokens:,} tokens; add text, lower the budget or the weight, or set "
                f"data.repeat: true to go over it {epochs:.1f} times"
            )

    def indices(self, step: int, rank: int = 0, world_size: int = 1) -> npt.NDArray[np.int64]:
        """Blocks of step `step` (from 0) that process `rank` of `world_size` takes.

        The parts of all ranks, in their order, make the same batch for any `world_size`, which must
        divide `batch_sequences`.
        """
        first = step * self.batch_sequences
        pools, blocks = self._order.take(first, first + self.batch_sequences)
        numbers = blocks + np.array([pool.first_block for pool in self._pools])[pools]
        share: npt.NDArray[np.int64] = np.split(numbers, world_size)[rank]
        return share

    def read(self, indices: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read blocks as inputs and targets, both int64 [len(indices), sequence_length]."""
        starts = self._token_starts(indices)
        rows = [self.shards.read(start, start + self.sequence_length + 1) for start in starts]
        tokens = torch.from_numpy(np.stack(rows))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def position_ids(self, indices: Iterable[int]) -> torch.Tensor | None:
        """Number the inputs of blocks from 0 in each document: int64 [len(indices), length].

        None if attention is not kept within documents. A document that began in the block before
        goes on as one that begins here.
        """
        if not self.within_documents:
            return None
        length = self.sequence_length
        rows = [
            positions(self.shards.document_starts(start, start + length) - start, length)
            for start in self._token_starts(indices)
        ]
        return torch.from_numpy(np.stack(rows))

    def _token_starts(self, indices: Iterable[int]) -> list[int]:
        firsts = [pool.first_block for pool in self._pools]
        starts = []
        for index in indices:
            pool = self._pools[bisect.bisect_right(firsts, index) - 1]
            starts.append(pool.first_token + int(index - pool.first_block) * self.sequence_length)
        return starts

    @cached_property
    def _pools(self) -> list[_Pool]:
        sources = [("data.train", self.shards.tokens)]
        if self.weights is not None:
            sources = [(each["file"], each["tokens"]) for each in self.shards.manifest["sources"]]
        pools, first_token, first_block = [], 0, 0
        for name, tokens in sources:
            blocks = max(tokens - 1, 0) // self.sequence_length
            pools.append(_Pool(name, blocks, first_block, first_token))
            first_token, first_block = first_token + tokens, first_block + blocks
        return pools

    @cached_property
    def _order(self) -> Order:
        shares = (1,) if self.weights is None else whole_shares(self.weights)
        return Order(tuple(pool.blocks for pool in self._pools), shares, self.seed)


def default_length(context: int | None) -> int:
    """Choose the tokens of a sequence, where a recipe leaves it open.

    Args:
        context: Tokens that the model was made for, if that is known.
    """
    return min(context or _MAX_LENGTH, _MAX_LENGTH)


def sequences_at_once(
    length: int, hidden_size: int, devices: int, share: int | None = None, on_cpu: bool = False
) -> int:
    """Choose how many sequences go through a device at once, where a recipe leaves it open.

    Args:
        length: Tokens of a sequence.
        hidden_size: Numbers of a token in the residual stream.
        devices: Over which the model is sharded.
        share: Sequences of a step on each device, which they have to divide.
        on_cpu: Whether the devices are CPUs.
    """
    most = _CPU_MICRO_TOKENS if on_cpu else _GPU_MICRO_ELEMENTS * min(devices, 2) // hidden_size
    most = max(1, most // length)
    if share is None:
        return most
    return max(count for count in range(1, min(most, share) + 1) if share % count == 0)


def _pin(batch: MicroBatch) -> MicroBatch:
    ids = batch.position_ids
    return MicroBatch(
        batch.inputs.pin_memory(),
        batch.targets.pin_memory(),
        None if ids is None else ids.pin_memory(),
    )


@contextmanager
def read_ahead(
    batches: Batches,
    steps: Iterable[int],
    micro_sequences: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    ahead: int = 2,
) -> Iterator[Iterator[list[MicroBatch]]]:
    """Read the batches of `steps` in a background thread, some steps ahead of their use.

    Args:
        batches: What to read.
        steps: From 0, in the order of their use.
        micro_sequences: Sequences that go through a device at once.
        rank: Of this process.
        world_size: Number of processes.
        device: Where the batches will go. For a CUDA device they are pinned, so that
            `.to(device, non_blocking=True)` does not wait.
        ahead: Steps in memory beside the one in use.

    Yields:
        An iterator over the steps' micro-batches, on the CPU. What a reading raises is raised for
        the step that it was for. The thread ends with the context.
    """
    pinned = device is not None and device.type == "cuda"

    def read(step: int) -> list[MicroBatch]:
        indices = batches.indices(step, rank, world_size)
        parts = [
            MicroBatch(*batches.read(part), batches.position_ids(part))
            for part in np.split(indices, len(indices) // micro_sequences)
        ]
        return [_pin(part) for part in parts] if pinned else parts

    def each(pool: ThreadPoolExecutor) -> Iterator[list[MicroBatch]]:
        left = iter(steps)
        waiting: deque[Future[list[MicroBatch]]] = deque()
        waiting.extend(pool.submit(read, step) for step in islice(left, ahead))
        while waiting:
            ready = waiting.popleft().result()
            waiting.extend(pool.submit(read, step) for step in islice(left, 1))
            yield ready

    # Memory is pinned for the device that is the thread's current one.
    current = torch.cuda.current_device() if pinned else 0
    prepare = (torch.cuda.set_device, (current,)) if pinned else (None, ())
    with ThreadPoolExecutor(1, "read-ahead", *prepare) as pool:
        try:
            yield each(pool)
        finally:
            pool.shutdown(cancel_futures=True)
