"""Rotate, then average."""

import itertools

import pytest
import torch

from uptrain.conversion.align import (
    align_key_query_full,
    align_key_query_rotary,
    align_value_output,
)
from uptrain.conversion.rotary import complex_pairs, real_rows

MEMBERS, QUERIES, HEAD, INPUTS, HIDDEN = 3, 2, 8, 20, 24


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(rank=INPUTS, seed=9):
    tokens = draw(rank, INPUTS, seed=seed)
    return tokens.T @ tokens / rank


def rotation(size, seed):
    return torch.linalg.qr(draw(size, size, seed=seed))[0]


def phase_rows(rows, phases, interleaved):
    pairs = complex_pairs(rows, interleaved=interleaved) * phases[:, None]
    return real_rows(pairs, interleaved=interleaved)


MOMENTS = [None, moment(), moment(rank=5)]


@pytest.mark.parametrize("c", MOMENTS)
@pytest.mark.parametrize("restore", [True, False])
def test_turned_value_heads_convert_exactly(c, restore):
    head, out = draw(HEAD, INPUTS), draw(MEMBERS, QUERIES, HIDDEN, HEAD, seed=1)
    turns = [torch.eye(HEAD, dtype=torch.float64), rotation(HEAD, 2), rotation(HEAD, 3)]
    value = torch.stack([turn @ head for turn in turns])
    aligned = align_value_output(value, out, c, restore_norms=restore)
    used = torch.eye(INPUTS, dtype=torch.float64) if c is None else c
    new, old = aligned.output @ aligned.value, out @ value[:, None]
    torch.testing.assert_close(new @ used, old @ used)
    assert aligned.residual == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("interleaved", [False, True])
def test_turned_rotary_keys_convert_exactly(interleaved):
    head, query = draw(HEAD, INPUTS), draw(MEMBERS, QUERIES, HEAD, INPUTS, seed=1)
    phases = torch.polar(torch.ones(MEMBERS, HEAD // 2).double(), draw(MEMBERS, HEAD // 2, seed=2))
    key = torch.stack([phase_rows(head, phase, interleaved) for phase in phases])
    aligned = align_key_query_rotary(key, query, interleaved=interleaved)
    for angle in (0.0, 1.0):  # the score of two tokens at some distance
        turn = torch.exp(1j * angle * torch.arange(1, HEAD // 2 + 1).double())
        for member in range(MEMBERS):
            old = query[member].mT @ phase_rows(key[member], turn, interleaved)
            new = aligned.query[member].mT @ phase_rows(aligned.key, turn, interleaved)
            torch.testing.assert_close(new, old)


def test_turned_keys_without_rotary_convert_exactly():
    head, query = draw(HEAD, INPUTS), draw(MEMBERS, QUERIES, HEAD, INPUTS, seed=1)
    key = torch.stack([rotation(HEAD, seed) @ head for seed in range(MEMBERS)])
    aligned = align_key_query_full(key, query, moment())
    torch.testing.assert_close(aligned.query.mT @ aligned.key, query.mT @ key[:, None])


@pytest.mark.parametrize("c", MOMENTS)
@pytest.mark.parametrize("seed", range(4))
def test_before_restoring_norms_it_is_never_above_the_mean(c, seed):
    value, out = draw(MEMBERS, HEAD, INPUTS, seed=seed), draw(MEMBERS, 1, HIDDEN, HEAD, seed=seed)
    query = draw(MEMBERS, QUERIES, HEAD, INPUTS, seed=seed + 50)
    for align, other in (
        (align_value_output, out),
        (align_key_query_full, query),
        (align_key_query_rotary, query),
    ):
        residuals = [
            align(value, other, c, restore_norms=False, iterations=rounds).residual
            for rounds in (0, 1, 2, 20)
        ]
        used = torch.eye(INPUTS, dtype=torch.float64) if c is None else c
        off = value - value.mean(0)
        assert residuals[0] == pytest.approx(float(((off @ used) * off).sum()))
        for before, after in itertools.pairwise(residuals):
            assert after <= before * (1 + 1e-9)
        assert residuals[-1] < residuals[0]


def test_restored_norms_are_the_members_average():
    value, out = draw(MEMBERS, HEAD, INPUTS), draw(MEMBERS, 1, HIDDEN, HEAD)
    query = draw(MEMBERS, QUERIES, HEAD, INPUTS, seed=1)
    size = value.flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(align_value_output(value, out).value.norm(), size)
    pairs = complex_pairs(value, interleaved=False).abs().square().sum(-1).sqrt().mean(0)
    shared = complex_pairs(align_key_query_rotary(value, query).key, interleaved=False)
    torch.testing.assert_close(shared.abs().square().sum(-1).sqrt(), pairs)


def test_without_rounds_it_is_the_plain_mean():
    value, out = draw(MEMBERS, HEAD, INPUTS), draw(MEMBERS, QUERIES, HIDDEN, HEAD, seed=1)
    aligned = align_value_output(value, out, iterations=0, restore_norms=False)
    torch.testing.assert_close(aligned.value, value.mean(0))
    torch.testing.assert_close(aligned.output, out)


def test_opposed_members_give_no_nan_and_convert_exactly():
    head, query = draw(HEAD, INPUTS), draw(2, QUERIES, HEAD, INPUTS, seed=1)
    key = torch.stack((head, -head))
    for align in (align_key_query_rotary, align_key_query_full):
        aligned = align(key, query)
        torch.testing.assert_close(aligned.query.mT @ aligned.key, query.mT @ key[:, None])
    out = draw(2, 1, HIDDEN, HEAD, seed=2)
    aligned_value = align_value_output(key, out)
    torch.testing.assert_close(aligned_value.output @ aligned_value.value, out @ key[:, None])


def test_opposed_pairs_among_others_give_no_nan():
    key, query = draw(2, HEAD, INPUTS), draw(2, QUERIES, HEAD, INPUTS, seed=1)
    key[1, [0, HEAD // 2]] = -key[0, [0, HEAD // 2]]
    aligned = align_key_query_rotary(key, query)
    assert torch.isfinite(aligned.key).all()
    assert torch.isfinite(aligned.query).all()
    assert aligned.key[0].norm() > 0


@pytest.mark.parametrize("c", [None, torch.zeros(INPUTS, INPUTS)])
def test_heads_of_zeros_and_a_moment_of_zeros_give_no_nan(c):
    heads, query = torch.zeros(2, HEAD, INPUTS), draw(2, QUERIES, HEAD, INPUTS)
    for value in (heads, draw(2, HEAD, INPUTS)):
        for align in (align_key_query_rotary, align_key_query_full):
            aligned = align(value, query, c)
            assert torch.isfinite(aligned.key).all()
            assert torch.isfinite(aligned.query).all()
        assert torch.isfinite(align_value_output(value, draw(2, 1, HIDDEN, HEAD), c).value).all()


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"query \[2, 1, 8, 20\] does not belong to key \[3, 8"):
        align_key_query_rotary(draw(3, 8, 20), draw(2, 1, 8, 20))
    with pytest.raises(ValueError, match=r"output \[3, 1, 24, 6\] does not belong to value"):
        align_value_output(draw(3, 8, 20), draw(3, 1, 24, 6))
    with pytest.raises(ValueError, match="rotary_dim 7 is odd"):
        align_key_query_rotary(draw(3, 7, 20), draw(3, 1, 7, 20))
