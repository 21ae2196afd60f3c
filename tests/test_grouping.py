"""Groups of heads: contiguous, and searched for."""

import itertools

import pytest
import torch

from uptrain.conversion.grouping import contiguous, search
from uptrain.errors import HeadCountError


def pair_costs(heads, seed=0):
    points = torch.randn(heads, 3, generator=torch.Generator().manual_seed(seed))
    return torch.cdist(points, points).square().tolist()


def cost_of(pairs):
    return lambda group: sum(pairs[a][b] for a, b in itertools.combinations(group, 2))


def total(groups, cost):
    return sum(cost(tuple(group)) for group in groups)


def test_contiguous_groups_are_neighbours():
    assert contiguous(6, 2) == [[0, 1, 2], [3, 4, 5]]
    assert contiguous(3, 3) == [[0], [1], [2]]


def test_a_head_count_that_does_not_divide_is_refused():
    message = "num_key_value_heads=4 does not divide the source's 6 heads; choose a divisor of 6."
    with pytest.raises(HeadCountError, match=message):
        contiguous(6, 4)
    with pytest.raises(HeadCountError, match="num_key_value_heads=0"):
        search(6, 0, lambda group: 0.0)


def test_search_finds_the_best_of_all_groupings():
    cost = cost_of(pair_costs(6))
    every = [
        total([[0, *first], sorted({1, 2, 3, 4, 5} - set(first))], cost)
        for first in itertools.combinations(range(1, 6), 2)
    ]
    groups = search(6, 2, cost)
    assert sorted(head for group in groups for head in group) == list(range(6))
    assert total(groups, cost) == pytest.approx(min(every))


@pytest.mark.parametrize("seed", range(5))
def test_search_is_never_worse_than_contiguous_and_repeats_itself(seed):
    cost = cost_of(pair_costs(12, seed))
    groups = search(12, 4, cost, seed=seed)
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    assert total(groups, cost) <= total(contiguous(12, 4), cost)
    assert groups == search(12, 4, cost, seed=seed)


def test_equal_costs_leave_the_heads_where_they_are():
    assert search(8, 4, lambda group: 1.0) == contiguous(8, 4)


def test_pair_costs_spare_the_exact_ones():
    pairs = pair_costs(16)
    asked = []

    def cost(group):
        asked.append(group)
        return cost_of(pairs)(group)

    table = torch.tensor(pairs, dtype=torch.float64)
    groups = search(16, 4, cost, pair_cost=table, num_starts=4)
    assert len(asked) <= 4 * 5
    assert total(groups, cost_of(pairs)) <= total(contiguous(16, 4), cost_of(pairs))


@pytest.mark.parametrize("seed", range(5))
def test_swaps_judged_at_once_are_those_judged_one_by_one(seed):
    pairs = pair_costs(12, seed)
    table = torch.tensor(pairs, dtype=torch.float64)
    one_by_one = search(12, 4, cost_of(pairs), seed=seed)
    assert search(12, 4, cost_of(pairs), pair_cost=table, seed=seed) == one_by_one


def test_one_group_and_one_head_to_a_group_need_no_search():
    def never(group):
        raise AssertionError("asked for a cost")

    assert search(4, 1, never) == [[0, 1, 2, 3]]
    assert search(4, 4, never) == [[0], [1], [2], [3]]
