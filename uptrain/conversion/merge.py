"""Merge one attention block's heads into fewer, as far as its freedom allows."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uptrain.conversion import align, energy, factorize
from uptrain.conversion.attention import AttentionHeads
from uptrain.conversion.freedom import Basis, Freedom
from uptrain.conversion.grouping import Groups, contiguous, search
from uptrain.conversion.rotary import complex_pairs

# From so many heads on, pairs of heads stand for groups while the search swaps them.
_PAIRWISE_FROM = 16


@dataclass(frozen=True)
class Merged:
    """An attention block with fewer KV heads."""

    parts: AttentionHeads
    """[G, …]: as many query heads as before, in the order of the groups."""
    groups: Groups
    """Source KV heads of each target head."""
    discarded_value: float
    """Part of the value-output energy that the best shared heads of these groups discard, 0 … 1."""
    discarded_key: float
    """The same of the scores, queries and keys taken as independent."""


def merge_heads(
    parts: AttentionHeads,
    freedom: Freedom,
    moment: Tensor,
    num_key_value_heads: int,
    *,
    method: str,
    grouping: str,
    seed: int = 0,
) -> Merged:
    """Merge KV heads in groups, and let the query and output projections absorb what they can.

    Args:
        parts: The block's weights, K KV heads.
        freedom: What changes of basis the block allows.
        moment: [inputs, inputs], C = E[x xᵀ] of the block's input, with a constant 1 appended to x
            where there are biases.
        num_key_value_heads: G, a divisor of K.
        method: `mean`, `first`, `align` or `factorize`.
        grouping: `contiguous` or `search`; a block whose heads must keep their places gets
            `contiguous`.
        seed: Of the free basis of shared heads.
    """
    G = num_key_value_heads
    losses = Losses(parts, freedom, moment)
    groups = losses.choose_groups(G, grouping, seed)
    value, key = losses.discarded(groups)
    merged = [
        _merge_group(parts.reordered(torch.tensor(group)), freedom, moment, method, seed + index)
        for index, group in enumerate(groups)
    ]
    order = torch.tensor([head for group in groups for head in group])
    gate = parts.gate
    if gate is not None:
        gate = gate[order].reshape(G, -1, *gate.shape[2:])
    return Merged(
        AttentionHeads(
            query=torch.stack([part.query.flatten(0, 1) for part in merged]),
            key=torch.cat([part.key for part in merged]),
            value=torch.cat([part.value for part in merged]),
            output=torch.stack([part.output.flatten(0, 1) for part in merged]),
            gate=gate,
        ),
        groups,
        value,
        key,
    )


class Losses:
    """What merging any heads of one attention block would discard."""

    def __init__(self, parts: AttentionHeads, freedom: Freedom, moment: Tensor) -> None:
        """Form the inner products of all heads, from which every group's loss follows.

        Args:
            parts: The block's weights, K KV heads.
            freedom: What changes of basis the block allows.
            moment: [inputs, inputs], as in `merge_heads`.
        """
        self._heads, self._reorder = len(parts.key), freedom.reorder
        self._value, self._value_total = _value_cost(parts, freedom, moment)
        self._key, self._key_total = _key_cost(parts, freedom, moment)
        self._pairs: list[list[float]] | None = None

    def choose_groups(self, num_key_value_heads: int, grouping: str, seed: int = 0) -> Groups:
        """Choose which heads are merged: neighbours, or those that lose least together."""
        K, G = self._heads, num_key_value_heads
        if grouping != "search" or not self._reorder or G in (1, K):
            return contiguous(K, G)
        if K >= _PAIRWISE_FROM and self._pairs is None:
            costs = [[self._cost((a, b)) for b in range(a + 1, K)] for a in range(K)]
            self._pairs = [
                [0.0 if a == b else costs[min(a, b)][abs(a - b) - 1] for b in range(K)]
                for a in range(K)
            ]
        return search(K, G, self._cost, pair_cost=self._pairs, seed=seed)

    def discarded(self, groups: Groups) -> tuple[float, float]:
        """Parts of the value-output energy and of the scores' that these groups discard, 0 … 1."""
        members = [tuple(group) for group in groups]
        value = sum(map(self._value, members)) / self._value_total
        return value, sum(map(self._key, members)) / self._key_total

    def _cost(self, group: tuple[int, ...]) -> float:
        return self._value(group) / self._value_total + self._key(group) / self._key_total


def _merge_group(
    parts: AttentionHeads, freedom: Freedom, moment: Tensor, method: str, seed: int
) -> AttentionHeads:
    """Merge all KV heads of `parts` into one: key and value [1, …], query and output by member."""
    if method == "first":
        return replace(parts, key=parts.key[:1], value=parts.value[:1])
    if method == "mean" or freedom.value is Basis.FIXED:
        value, output = parts.value.mean(0), parts.output
    elif method == "factorize":
        value, output, *_ = factorize.factorize_value_output(
            parts.value, parts.output, moment, seed=seed
        )
    else:
        value, output, _ = align.align_value_output(parts.value, parts.output, moment)
    key, query = parts.key.mean(0), parts.query
    if method != "mean":
        key, query = _merge_keys(parts, freedom, moment, method, seed)
    return replace(parts, key=key[None], query=query, value=value[None], output=output)


def _merge_keys(
    parts: AttentionHeads, freedom: Freedom, moment: Tensor, method: str, seed: int
) -> tuple[Tensor, Tensor]:
    """Share one K head: [head_dim, inputs], and the queries [members, queries, head_dim, inputs]."""
    n, pairing = freedom.rotary_dim, freedom.interleaved
    turned, rest = slice(0, n), slice(n, None)
    keys, queries = [], []
    if n:
        key, query = parts.key[:, turned], parts.query[:, :, turned]
        if freedom.key is Basis.SCALED and method == "factorize":
            shared, undone, *_ = factorize.factorize_key_query_rotary(
                key, query, moment, interleaved=pairing
            )
        else:
            shared, undone, _ = align.align_key_query_rotary(
                key, query, moment, interleaved=pairing, signs=freedom.key is Basis.SIGNED
            )
        keys.append(shared)
        queries.append(undone)
    if n < parts.key.shape[1]:
        key, query = parts.key[:, rest], parts.query[:, :, rest]
        if freedom.key not in (Basis.FULL, Basis.SCALED):
            shared, undone = key.mean(0), query
        elif method == "factorize":
            shared, undone, *_ = factorize.factorize_key_query_full(key, query, moment, seed=seed)
        else:
            shared, undone, _ = align.align_key_query_full(key, query, moment)
        keys.append(shared)
        queries.append(undone)
    return torch.cat(keys), torch.cat(queries, dim=2)


Cost = Callable[[tuple[int, ...]], float]


def _value_cost(parts: AttentionHeads, freedom: Freedom, moment: Tensor) -> tuple[Cost, float]:
    """What a group discards of the value-output energy, and the whole energy."""
    if freedom.value is Basis.FIXED:
        return _mean_cost(parts.value, moment)
    gram = energy.value_output_gram(parts.value, parts.output, moment)
    total = float(gram.flatten(2).flatten(0, 1).trace())
    return (lambda group: energy.group_discarded_energy(gram, group)), max(total, 1e-300)


def _key_cost(parts: AttentionHeads, freedom: Freedom, moment: Tensor) -> tuple[Cost, float]:
    """What a group discards of the scores' energy, and the whole energy."""
    n = freedom.rotary_dim
    grams: list[Tensor] = []
    if n:
        keys = complex_pairs(parts.key[:, :n].double(), interleaved=freedom.interleaved)
        queries = complex_pairs(parts.query[:, :, :n].double(), interleaved=freedom.interleaved)
        # Behind a norm all queries are of one length.
        weights = torch.ones(keys.shape[:2], dtype=torch.float64, device=keys.device)
        if freedom.key is Basis.SCALED:
            weights = energy.rotary_query_energy(queries, moment)
        grams.append(energy.rotary_gram(keys, moment, weights))
    if n < parts.key.shape[1]:
        if freedom.key not in (Basis.FULL, Basis.SCALED):
            if not grams:
                return _mean_cost(parts.key, moment)
        else:
            grams.append(energy.key_query_gram(parts.key[:, n:], parts.query[:, :, n:], moment))
    total = sum(
        float(
            torch.diagonal(gram, dim1=1, dim2=2).real.sum()
            if gram.dim() == 3
            else gram.flatten(2).flatten(0, 1).trace()
        )
        for gram in grams
    )
    return (lambda group: sum(energy.group_discarded_energy(gram, group) for gram in grams)), max(
        total, 1e-300
    )


def _mean_cost(heads: Tensor, moment: Tensor) -> tuple[Cost, float]:
    """What the mean of heads [K, d, inputs] discards, where no change of basis is allowed."""
    gram = torch.einsum("adi,ij,bdj->ab", heads.double(), moment.double(), heads.double())

    def cost(group: tuple[int, ...]) -> float:
        block = gram[list(group)][:, list(group)]
        return max(0.0, float(block.trace() - block.sum() / len(group)))

    return cost, max(float(gram.trace()), 1e-300)
