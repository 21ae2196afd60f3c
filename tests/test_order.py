"""The order of blocks: pure, each epoch another permutation, weights met at every place."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uptrain.errors import DataError
from uptrain.training.order import Order, schedule, whole_shares

SHARES = st.lists(st.integers(1, 40), min_size=1, max_size=7)


def test_each_epoch_is_another_permutation():
    blocks = 12
    order = Order((blocks,), (1,), seed=1).take(0, 48)[1]
    epochs = order.reshape(4, blocks)
    assert all(sorted(epoch) == list(range(blocks)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert order.tolist() != Order((blocks,), (1,), seed=2).take(0, 48)[1].tolist()


def test_the_order_is_pure_and_stays_what_it_is():
    order = Order((12,), (1,), seed=1)
    again = [order.take(8 * step, 8 * step + 8)[1].tolist() for step in (5, 0, 5)]
    assert again[0] == again[2]
    # A changed order would make old checkpoints go on with other data.
    assert Order((100,), (1,), 0).take(0, 8)[1].tolist() == [82, 36, 20, 5, 93, 16, 94, 52]


@given(SHARES)
@settings(deadline=None)
def test_after_any_number_of_places_no_source_is_a_whole_one_from_its_part(shares):
    pools = schedule(shares)
    counts = np.cumsum(pools[:, None] == np.arange(len(shares)), 0)
    exact = np.arange(1, len(pools) + 1)[:, None] * np.array(shares)
    assert (abs(counts * sum(shares) - exact) < sum(shares)).all()
    assert counts[-1].tolist() == shares


@given(SHARES, st.data())
@settings(deadline=None, max_examples=50)
def test_any_stretch_is_a_part_of_the_same_order(shares, data):
    blocks = tuple(data.draw(st.integers(1, 30)) for _ in shares)
    order = Order(blocks, tuple(shares), seed=3)
    start = data.draw(st.integers(0, 500))
    stop = start + data.draw(st.integers(1, 100))
    whole = [each.tolist() for each in order.take(0, stop)]
    part = [each.tolist() for each in Order(blocks, tuple(shares), 3).take(start, stop)]
    assert part == [each[start:] for each in whole]
    pools = np.array(whole[0])
    assert order.counts(stop) == [int((pools == pool).sum()) for pool in range(len(shares))]
    for pool, size in enumerate(blocks):
        mine = np.array(whole[1])[pools == pool]
        for epoch in np.split(mine, range(size, len(mine), size)):
            assert len(set(epoch.tolist())) == len(epoch)
            assert set(epoch.tolist()) <= set(range(size))


def test_a_far_place_is_as_near_as_the_first():
    order = Order((10**6, 10**5), (7, 3), seed=0)
    pools, blocks = order.take(10**15, 10**15 + 1000)
    assert abs((pools == 0).sum() - 700) <= 1
    assert blocks.max() < 10**6
    assert order.counts(10**15) == [7 * 10**14, 3 * 10**14]


def test_one_weighted_source_has_the_order_of_none():
    plain, weighted = (Order((50,), shares, seed=4).take(0, 200)[1] for shares in ((1,), (3,)))
    assert plain.tolist() == weighted.tolist()


def test_sources_of_one_size_have_orders_of_their_own():
    pools, blocks = Order((50, 50), (1, 1), seed=4).take(0, 100)
    assert blocks[pools == 0].tolist() != blocks[pools == 1].tolist()


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((0.7, 0.3), (7, 3)),
        ((1.0, 1.0, 1.0), (1, 1, 1)),
        ((2.5,), (1,)),
        ((0.1, 0.2, 0.3), (1, 2, 3)),
        ((1.0, 3.14159265), (24145, 75855)),  # too many digits: rounded
        ((1e-5, 1.0), (1, 99999)),
    ],
)
def test_weights_become_the_smallest_whole_numbers(weights, shares):
    assert whole_shares(weights) == shares


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_rounded_weights_are_near(weights):
    shares = whole_shares(weights)
    total = sum(map(Fraction, weights))
    for weight, share in zip(weights, shares, strict=True):
        assert abs(Fraction(weight) / total - Fraction(share, sum(shares))) < Fraction(1, 99_999)


def test_a_weight_that_never_has_its_turn_is_refused():
    with pytest.raises(
        DataError, match=r"data\.train: a weight of 1e-09 is less than 1/100000 of all; raise it"
    ):
        whole_shares((1.0, 1e-9))
