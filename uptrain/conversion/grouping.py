"""Which source KV heads are merged into one target head.

A grouping is a list of groups, each a list of source KV head indices. Every group has the same
size. Target head g is made from group g, and every query head that read a member of group g reads
target head g afterwards, so a grouping that is not contiguous also orders the query heads anew.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from uptrain.errors import HeadCountError

Groups = list[list[int]]


def contiguous(num_source_heads: int, num_target_heads: int) -> Groups:
    """Group neighbouring heads, as in the paper.

    Args:
        num_source_heads: KV heads of the source.
        num_target_heads: KV heads of the target; divides `num_source_heads`.

    Returns:
        `num_target_heads` groups: [[0, 1, ...], [group_size, ...], ...].

    Raises:
        HeadCountError: If `num_target_heads` does not divide `num_source_heads`.

    Source: Ainslie et al. 2023, arXiv:2305.13245, section 2.2.
    """
    if num_target_heads < 1 or num_source_heads % num_target_heads:
        raise HeadCountError(
            f"num_key_value_heads={num_target_heads} does not divide the source's"
            f" {num_source_heads} heads; choose a divisor of {num_source_heads}."
        )
    group_size = num_source_heads // num_target_heads
    return [
        list(range(first, first + group_size)) for first in range(0, num_source_heads, group_size)
    ]


def search(
    num_source_heads: int,
    num_target_heads: int,
    cost: Callable[[tuple[int, ...]], float],
    *,
    pair_cost: Tensor | None = None,
    num_starts: int = 8,
    seed: int = 0,
) -> Groups:
    """Find equal groups of low total cost by swapping members.

    From each start (the contiguous groups, a greedy one, then random ones) the best swap of two
    heads of different groups is taken until none lowers the total. The result is never worse than
    the contiguous groups.

    Args:
        num_source_heads: KV heads of the source.
        num_target_heads: KV heads of the target; divides `num_source_heads`.
        cost: The cost of merging one group, given as ascending head indices; called once for each
            group that is looked at.
        pair_cost: [num_source_heads, num_source_heads], symmetric: when given, the swaps lower the
            sum of the pairs' costs, and `cost` only judges where each start ended. For many heads,
            where `cost` is too slow for every swap.
        num_starts: Starts to descend from.
        seed: Of the random starts.

    Returns:
        The groups, each ascending, ordered by their first member.

    Raises:
        HeadCountError: If `num_target_heads` does not divide `num_source_heads`.
    """
    best = contiguous(num_source_heads, num_target_heads)
    if num_target_heads == 1 or num_target_heads == num_source_heads:
        return best
    known: dict[tuple[int, ...], float] = {}

    def exact(group: Sequence[int]) -> float:
        members = tuple(sorted(group))
        if members not in known:
            known[members] = cost(members)
        return known[members]

    def by_pairs(group: Sequence[int]) -> float:
        assert pair_cost is not None
        members = list(group)
        return float(pair_cost[members][:, members].sum()) / 2

    draw = random.Random(seed)
    quick_cost = exact if pair_cost is None else by_pairs
    starts = [best, _greedy(num_source_heads, num_target_heads, quick_cost)]
    for _ in range(max(0, num_starts - len(starts))):
        heads = list(range(num_source_heads))
        draw.shuffle(heads)
        size = num_source_heads // num_target_heads
        starts.append([heads[i : i + size] for i in range(0, num_source_heads, size)])
    best_total = sum(exact(group) for group in best)
    for start in starts[: max(1, num_starts)]:
        groups = _descend(start, exact) if pair_cost is None else _descend_pairs(start, pair_cost)
        total = sum(exact(group) for group in groups)
        if total < best_total * (1 - 1e-12):
            best, best_total = groups, total
    return sorted(sorted(group) for group in best)


def _descend(groups: Groups, cost: Callable[[Sequence[int]], float]) -> Groups:
    """Swap heads between two groups while a swap lowers the sum of the groups' costs."""
    groups = [list(group) for group in groups]
    costs = [cost(group) for group in groups]
    tolerance = 1e-12 * sum(abs(value) for value in costs)
    while True:
        best_gain, best_swap = tolerance, None
        for a in range(len(groups)):
            for b in range(a + 1, len(groups)):
                for i in range(len(groups[a])):
                    for j in range(len(groups[b])):
                        first, second = _swapped(groups[a], groups[b], i, j)
                        gain = costs[a] + costs[b] - cost(first) - cost(second)
                        if gain > best_gain:
                            best_gain, best_swap = gain, (a, b, first, second)
        if best_swap is None:
            return groups
        a, b, first, second = best_swap
        groups[a], groups[b] = first, second
        costs[a], costs[b] = cost(first), cost(second)


def _descend_pairs(groups: Groups, pair_cost: Tensor) -> Groups:
    """`_descend` where a group costs the sum of its pairs: all swaps are judged at once."""
    size = len(groups[0])
    heads = torch.tensor(groups).flatten()  # by place: heads 0 … size - 1 make up the first group
    group = torch.arange(len(heads)) // size
    same = group[:, None] == group
    tolerance = 1e-12 * float(pair_cost.sum())
    while True:
        costs = pair_cost[heads][:, heads]
        towards = costs.unflatten(1, (-1, size)).sum(-1)[:, group]  # of a head and another's group
        own = towards.diagonal()
        gains = own[:, None] + own - towards - towards.T + 2 * costs
        gain, place = gains.masked_fill(same, 0.0).flatten().max(0)
        if gain <= tolerance:
            return heads.view(-1, size).tolist()
        a, b = divmod(int(place), len(heads))
        heads[[a, b]] = heads[[b, a]]


def _swapped(
    first: Sequence[int], second: Sequence[int], i: int, j: int
) -> tuple[list[int], list[int]]:
    """Exchange member i of the first group with member j of the second."""
    new_first = [*first[:i], second[j], *first[i + 1 :]]
    new_second = [*second[:j], first[i], *second[j + 1 :]]
    return new_first, new_second


def _greedy(
    num_source_heads: int, num_target_heads: int, cost: Callable[[Sequence[int]], float]
) -> Groups:
    """Grow one group after another, each from the lowest free head by its cheapest companions."""
    free = list(range(num_source_heads))
    groups: Groups = []
    for _ in range(num_target_heads):
        group = [free.pop(0)]
        while len(group) < num_source_heads // num_target_heads:
            companion = min(free, key=lambda head: cost([*group, head]))
            free.remove(companion)
            group.append(companion)
        groups.append(group)
    return groups
