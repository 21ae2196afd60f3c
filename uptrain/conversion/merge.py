"""Merge one attention block's heads into fewer, as far as its freedom allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from uptrain.conversion import align, energy, factorize
from uptrain.conversion.attention import AttentionHeads, AttentionNames
from uptrain.conversion.freedom import Basis, Freedom
from uptrain.conversion.grouping import Groups, contiguous, search
from uptrain.conversion.pooling import pool_tensor
from uptrain.conversion.rotary import complex_pairs
from uptrain.families.layouts import split_heads
from uptrain.families.schema import Layout

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


class _Moments(NamedTuple):
    """Second moments of what enters a block, [inputs, inputs]."""

    key: Tensor
    """Of what keys and values are made of."""
    free_key: Tensor
    """The same for keys without rotary embedding: centred where these may be shifted."""
    query: Tensor
    """Of what queries are made of."""


def merge_heads(
    parts: AttentionHeads,
    freedom: Freedom,
    moment: Tensor,
    num_key_value_heads: int,
    *,
    method: str,
    grouping: str,
    covariance: Tensor | None = None,
    query_moment: Tensor | None = None,
    seed: int = 0,
) -> Merged:
    """Merge KV heads in groups, and let the query and output projections absorb what they can.

    Args:
        parts: The block's weights, K KV heads.
        freedom: What changes of basis the block allows.
        moment: [inputs, inputs], C = E[x xᵀ] of what keys and values are made of, with a constant 1
            appended to x where there are biases.
        num_key_value_heads: G, a divisor of K.
        method: `mean`, `first`, `align` or `factorize`.
        grouping: `contiguous` or `search`; a block whose heads must keep their places gets
            `contiguous`.
        covariance: [inputs, inputs], the centred moment: takes the place of `moment` for keys that
            may be shifted.
        query_moment: [inputs, inputs], of what queries are made of, where that is something else: in
            attention to an encoder's output.
        seed: Of the free basis of shared heads.
    """
    G = num_key_value_heads
    losses = Losses(parts, freedom, moment, covariance, query_moment)
    moments = _moments(freedom, moment, covariance, query_moment)
    groups = losses.choose_groups(G, grouping, seed)
    value, key = losses.discarded(groups)
    merged = [
        _merge_group(parts.reordered(torch.tensor(group)), freedom, moments, method, seed + index)
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


def merge_beside(
    state: Mapping[str, Tensor], names: AttentionNames, groups: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Pool what follows the number of KV heads beside the projections, within each group.

    Gains of norms over all KV heads (olmo2, cohere) or of each (stablelm), convolutions (inkling). Heads
    that any of it tells apart keep their places, as the probe finds, so groups are then of neighbours.

    Args:
        state: The layer's tensors by name within the layer.
        names: From `find_attention`.
        groups: Source KV heads of each target head.

    Returns:
        float64 tensors by name within the layer.
    """
    merged = {}
    for name, tensor in names.beside.items():
        whole = torch.cat([state[member].double() for member in tensor.members])
        if tensor.layout is Layout.SEPARATE:
            (heads,) = split_heads(whole, tensor.layout, tensor.heads)[1]
            pooled = torch.stack([heads[list(group)].mean(0) for group in groups])
            merged[name] = pooled.flatten(0, 1)
        else:
            merged[name] = pool_tensor(whole, tensor, "mean")
    return merged


class Losses:
    """What merging any heads of one attention block would discard."""

    def __init__(
        self,
        parts: AttentionHeads,
        freedom: Freedom,
        moment: Tensor,
        covariance: Tensor | None = None,
        query_moment: Tensor | None = None,
    ) -> None:
        """Form the inner products of all heads, from which every group's loss follows.

        Args:
            parts: The block's weights, K KV heads.
            freedom: What changes of basis the block allows.
            moment: [inputs, inputs], as in `merge_heads`.
            covariance: [inputs, inputs], as there.
            query_moment: [inputs, inputs], as there.
        """
        self._heads, self._reorder = len(parts.key), freedom.reorder
        self._value = _Part(_value_grams(parts, freedom, moment))
        moments = _moments(freedom, moment, covariance, query_moment)
        self._key = _Part(_key_grams(parts, freedom, moments))
        self._pairs: Tensor | None = None

    def choose_groups(self, num_key_value_heads: int, grouping: str, seed: int = 0) -> Groups:
        """Choose which heads are merged: neighbours, or those that lose least together."""
        K, G = self._heads, num_key_value_heads
        if grouping != "search" or not self._reorder or G in (1, K):
            return contiguous(K, G)
        if K >= _PAIRWISE_FROM and self._pairs is None:
            self._pairs = (self._value.of_pairs() + self._key.of_pairs()).cpu()
        return search(K, G, self._cost, pair_cost=self._pairs, seed=seed)

    def discarded(self, groups: Groups) -> tuple[float, float]:
        """Parts of the value-output energy and of the scores' that these groups discard, 0 … 1."""
        members = [tuple(group) for group in groups]
        return self._value.of(members), self._key.of(members)

    def _cost(self, group: tuple[int, ...]) -> float:
        return self._value.of([group]) + self._key.of([group])


class _Part:
    """What merging discards of one kind of energy, as a part of the whole."""

    def __init__(self, grams: list[Tensor]) -> None:
        self._grams = grams
        self._total = max(sum(map(energy.total_energy, grams)), 1e-300)
        self._known: dict[tuple[int, ...], float] = {}

    def of(self, groups: list[tuple[int, ...]]) -> float:
        """What these groups discard together."""
        for group in groups:
            if group not in self._known:
                lost = (energy.group_discarded_energy(gram, group) for gram in self._grams)
                self._known[group] = sum(lost)
        return sum(self._known[group] for group in groups) / self._total

    def of_pairs(self) -> Tensor:
        """What each two heads discard, [heads, heads]."""
        pairs = torch.stack([energy.pair_discarded_energy(gram) for gram in self._grams])
        return pairs.sum(0) / self._total


def _merge_group(
    parts: AttentionHeads,
    freedom: Freedom,
    moments: _Moments,
    method: str,
    seed: int,
) -> AttentionHeads:
    """Merge all KV heads of `parts` into one: key and value [1, …], query and output by member."""
    if method == "first":
        return replace(parts, key=parts.key[:1], value=parts.value[:1])
    if method == "mean" or freedom.value is Basis.FIXED:
        value, output = parts.value.mean(0), parts.output
    elif method == "factorize" and freedom.value is Basis.FULL:
        value, output, *_ = factorize.factorize_value_output(
            parts.value, parts.output, moments.key, seed=seed
        )
    else:
        value, output, _ = align.align_value_output(parts.value, parts.output, moments.key)
    key, query = parts.key.mean(0), parts.query
    if method != "mean" and parts.tied:
        key, query, output = _merge_tied(parts, freedom, moments)
        value = key
    elif method != "mean":
        key, query = _merge_keys(parts, freedom, moments, method, seed)
    return replace(parts, key=key[None], query=query, value=value[None], output=output)


def _merge_tied(
    parts: AttentionHeads, freedom: Freedom, moments: _Moments
) -> tuple[Tensor, Tensor, Tensor]:
    """Share one head that is key and value, as `_merge_keys`; the output slices come last.

    What turns a key turns the value, so its output slices are turned as its queries are.
    """
    inputs = parts.query.shape[-1]
    both = replace(parts, query=torch.cat([parts.query, parts.output.mT], dim=-1))
    key, turned = _merge_keys(both, freedom, moments, "align", seed=0)
    return key, turned[..., :inputs], turned[..., inputs:].mT


def _merge_keys(
    parts: AttentionHeads,
    freedom: Freedom,
    moments: _Moments,
    method: str,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Share one K head: [head_dim, inputs], and the queries [members, queries, head_dim, inputs]."""
    n, pairing = freedom.rotary_dim, freedom.interleaved
    turned, rest = slice(0, n), slice(n, None)
    keys, queries = [], []
    if n:
        key, query = parts.key[:, turned], parts.query[:, :, turned]
        if freedom.key is Basis.SCALED and method == "factorize":
            shared, undone, *_ = factorize.factorize_key_query_rotary(
                key, query, moments.query, key_moment=moments.key, interleaved=pairing
            )
        else:
            shared, undone, _ = align.align_key_query_rotary(
                key, query, moments.key, interleaved=pairing, signs=freedom.key is Basis.SIGNED
            )
        keys.append(shared)
        queries.append(undone)
    if n < parts.key.shape[1]:
        key, query = parts.key[:, rest], parts.query[:, :, rest]
        if freedom.key not in (Basis.FULL, Basis.SCALED):
            shared, undone = key.mean(0), query
        elif method == "factorize":
            shared, undone, *_ = factorize.factorize_key_query_full(
                key, query, moments.query, key_moment=moments.free_key, seed=seed
            )
        else:
            shared, undone, _ = align.align_key_query_full(key, query, moments.free_key)
        keys.append(shared)
        queries.append(undone)
    return torch.cat(keys), torch.cat(queries, dim=2)


def _moments(
    freedom: Freedom, moment: Tensor, covariance: Tensor | None, query_moment: Tensor | None
) -> _Moments:
    free_key = covariance if covariance is not None and freedom.shift else moment
    return _Moments(moment, free_key, moment if query_moment is None else query_moment)


def _value_grams(parts: AttentionHeads, freedom: Freedom, moment: Tensor) -> list[Tensor]:
    """Inner products from which a group's loss of value-output energy follows."""
    if (freedom.key if parts.tied else freedom.value) is Basis.FIXED:
        return [energy.mean_gram(parts.value, moment)]
    return [energy.value_output_gram(parts.value, parts.output, moment)]


def _key_grams(parts: AttentionHeads, freedom: Freedom, moments: _Moments) -> list[Tensor]:
    """Inner products from which a group's loss of the scores' energy follows, summed."""
    n = freedom.rotary_dim
    grams: list[Tensor] = []
    if n:
        keys = complex_pairs(parts.key[:, :n].double(), interleaved=freedom.interleaved)
        queries = complex_pairs(parts.query[:, :, :n].double(), interleaved=freedom.interleaved)
        # Behind a norm all queries are of one length.
        weights = torch.ones(keys.shape[:2], dtype=torch.float64, device=keys.device)
        if freedom.key is Basis.SCALED:
            weights = energy.rotary_query_energy(queries, moments.query)
        grams.append(energy.rotary_gram(keys, moments.key, weights))
    if n < parts.key.shape[1]:
        if freedom.key in (Basis.FULL, Basis.SCALED):
            key, query = parts.key[:, n:], parts.query[:, :, n:]
            found = energy.key_query_gram(key, query, moments.query, key_moment=moments.free_key)
            grams.append(found)
        elif not grams:
            grams.append(energy.mean_gram(parts.key, moments.key))
    return grams
