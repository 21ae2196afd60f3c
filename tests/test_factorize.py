"""The best shared head in closed form, and what merging heads costs."""

import pytest
import torch

from uptrain.conversion.align import (
    align_key_query_full,
    align_key_query_rotary,
    align_value_output,
)
from uptrain.conversion.energy import (
    group_discarded_energy,
    key_query_gram,
    rotary_gram,
    rotary_query_energy,
    value_output_gram,
)
from uptrain.conversion.factorize import (
    factorize_key_query_full,
    factorize_key_query_rotary,
    factorize_value_output,
)
from uptrain.conversion.rotary import complex_pairs, real_rows

MEMBERS, QUERIES, HEAD, INPUTS, HIDDEN = 3, 2, 8, 20, 24
IDENTITY = torch.eye(INPUTS, dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(rank=50, seed=9):
    tokens = draw(rank, INPUTS, seed=seed)
    return tokens.T @ tokens / rank


def heads(seed=0):
    """value or key [m, d, i], output [m, q, hidden, d], query [m, q, d, i]."""
    return (
        draw(MEMBERS, HEAD, INPUTS, seed=seed),
        draw(MEMBERS, QUERIES, HIDDEN, HEAD, seed=seed + 100),
        draw(MEMBERS, QUERIES, HEAD, INPUTS, seed=seed + 200),
    )


def energy(rows, c):
    return float(((rows @ c) * rows.conj()).sum().real)


def value_error(value, output, shared, new_output, c):
    return energy(output @ value[:, None] - new_output @ shared, c)


def pairs_of(rows, interleaved=False):
    return complex_pairs(rows, interleaved=interleaved)


def rotary_error(key, query, shared, new_query, c):
    """sum w |(k_i - a_i k') C^(1/2)|^2, with the a_i read off from what became of the queries."""
    old, new = pairs_of(query), pairs_of(new_query)
    scales = ((new * old.conj()).sum((1, 3)) / old.abs().square().sum((1, 3))).conj()
    torch.testing.assert_close(new, old * scales.conj()[:, None, :, None])
    weights = rotary_query_energy(old, c)
    off = pairs_of(key) - scales[..., None] * pairs_of(shared)
    return energy(weights.sqrt()[..., None] * off, c.to(off))


def full_error(key, query, shared, new_query, c):
    """sum |R_i (k_i - M_i k') C^(1/2)|^2 = sum E_q E_x (q_i k_i(x) - q'_i k'(x))^2."""
    score = query.mT @ key[:, None] - new_query.mT @ shared
    return float(torch.einsum("mqab,ac,mqcd,bd->", score, c, score, c))


MOMENTS = [IDENTITY, torch.diag(draw(INPUTS).square()), moment(), moment(rank=4)]


@pytest.mark.parametrize("c", MOMENTS)
def test_the_error_is_the_discarded_energy(c):
    head, out, query = heads()
    shared = factorize_value_output(head, out, c)
    tolerance = pytest.approx(shared.discarded_energy, rel=1e-8, abs=1e-9 * shared.energy)
    assert value_error(head, out, shared.value, shared.output, c) == tolerance
    rotary = factorize_key_query_rotary(head, query, c)
    tolerance = pytest.approx(rotary.discarded_energy, rel=1e-8, abs=1e-9 * rotary.energy)
    assert rotary_error(head, query, rotary.key, rotary.query, c) == tolerance
    full = factorize_key_query_full(head, query, c)
    tolerance = pytest.approx(full.discarded_energy, rel=1e-8, abs=1e-9 * full.energy)
    assert full_error(head, query, full.key, full.query, c) == tolerance


@pytest.mark.parametrize("c", MOMENTS)
def test_the_energy_is_the_error_of_nothing(c):
    head, out, query = heads()
    shared = factorize_value_output(head, out, c)
    zero = torch.zeros_like
    expected = value_error(head, out, zero(shared.value), zero(out), c)
    assert shared.energy == pytest.approx(expected)
    full = factorize_key_query_full(head, query, c)
    assert full.energy == pytest.approx(full_error(head, query, zero(full.key), zero(query), c))


@pytest.mark.parametrize("c", MOMENTS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "align", [{"iterations": 0, "restore_norms": False}, {"restore_norms": False}, {}]
)
def test_it_is_never_above_the_mean_or_the_aligned_mean(c, seed, align):
    head, out, query = heads(seed)
    slack = 1 + 1e-9
    shared = factorize_value_output(head, out, c)
    other = align_value_output(head, out, c, **align)
    error = value_error(head, out, other.value, other.output, c)
    assert shared.discarded_energy <= error * slack
    rotary = factorize_key_query_rotary(head, query, c)
    other = align_key_query_rotary(head, query, c, **align)
    error = rotary_error(head, query, other.key, other.query, c)
    assert rotary.discarded_energy <= error * slack
    full = factorize_key_query_full(head, query, c)
    other = align_key_query_full(head, query, c, **align)
    assert full.discarded_energy <= full_error(head, query, other.key, other.query, c) * slack


def test_members_that_differ_by_an_allowed_change_of_basis_convert_exactly():
    head, out, query = draw(HEAD, INPUTS), *heads()[1:]
    maps = draw(MEMBERS, HEAD, HEAD, seed=5)
    shared = factorize_value_output(maps @ head, out, moment())
    torch.testing.assert_close(shared.output @ shared.value, out @ (maps @ head)[:, None])
    full = factorize_key_query_full(maps @ head, query, moment())
    torch.testing.assert_close(full.query.mT @ full.key, query.mT @ (maps @ head)[:, None])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("c", [IDENTITY, moment()])
def test_complex_multiples_of_rotary_pairs_convert_exactly(interleaved, c):
    head, query = pairs_of(draw(HEAD, INPUTS), interleaved), heads()[2]
    scales = torch.complex(draw(MEMBERS, HEAD // 2, seed=3), draw(MEMBERS, HEAD // 2, seed=4))
    key = real_rows(scales[..., None] * head, interleaved=interleaved)
    shared = factorize_key_query_rotary(key, query, c, interleaved=interleaved)

    def turned(rows, angle):
        turn = torch.exp(1j * angle * torch.arange(1, HEAD // 2 + 1).double())
        pairs = pairs_of(rows, interleaved) * turn[:, None]
        return real_rows(pairs, interleaved=interleaved)

    for distance in (0.0, 1.0, 7.0):
        old = query.mT @ turned(key, distance)[:, None]
        torch.testing.assert_close(shared.query.mT @ turned(shared.key, distance), old)
    assert shared.discarded_energy <= 1e-12 * shared.energy


def test_a_bias_is_one_more_input():
    """With a constant input, what the weights cannot share the biases still can."""
    tokens = torch.cat((draw(50, INPUTS - 1), torch.ones(50, 1)), 1).double()
    c = tokens.T @ tokens / 50
    head, out, _ = heads()
    shared = factorize_value_output(head, out, c)
    old = torch.einsum("mqhd,mdi,ni->nmqh", out, head, tokens)
    new = torch.einsum("mqhd,di,ni->nmqh", shared.output, shared.value, tokens)
    error = float((old - new).square().sum() / 50)
    assert error == pytest.approx(shared.discarded_energy)


def test_one_token_is_enough_to_be_exact_on_it():
    token = draw(INPUTS)
    c = torch.outer(token, token)
    head, out, query = heads()
    value = factorize_value_output(head, out, c)
    torch.testing.assert_close(
        (value.output @ value.value) @ token, (out @ head[:, None]) @ token, rtol=1e-6, atol=1e-6
    )
    for factorize in (factorize_key_query_rotary, factorize_key_query_full):
        shared = factorize(head, query, c)
        assert torch.isfinite(shared.key).all()
        assert torch.isfinite(shared.query).all()


def test_opposed_members_give_no_nan_and_convert_exactly():
    head, query = draw(HEAD, INPUTS), draw(2, QUERIES, HEAD, INPUTS, seed=1)
    key = torch.stack((head, -head))
    for factorize in (factorize_key_query_rotary, factorize_key_query_full):
        shared = factorize(key, query, moment())
        torch.testing.assert_close(shared.query.mT @ shared.key, query.mT @ key[:, None])


@pytest.mark.parametrize("c", [moment(), 0 * IDENTITY])
def test_heads_of_zeros_and_a_moment_of_zeros_give_no_nan(c):
    head, out, query = heads()
    zeros = ((head * 0, out, query), (head, out * 0, query * 0), (head, out, query))
    for key, outputs, queries in zeros:
        value = factorize_value_output(key, outputs, c)
        assert torch.isfinite(value.output).all()
        for factorize in (factorize_key_query_rotary, factorize_key_query_full):
            shared = factorize(key, queries, c)
            assert torch.isfinite(shared.key).all()
            assert torch.isfinite(shared.query).all()


def test_a_group_of_one_is_unchanged_in_function():
    head, out, query = (part[:1] for part in heads())
    value = factorize_value_output(head, out, moment())
    torch.testing.assert_close(value.output @ value.value, out @ head[:, None])
    rotary = factorize_key_query_rotary(head, query, moment())
    torch.testing.assert_close(rotary.key, head[0])
    torch.testing.assert_close(rotary.query, query)


def test_the_free_basis_is_scaled_and_turned():
    head, out, query = heads()
    shared = factorize_value_output(head, out, moment())
    wanted = head.norm(dim=-1).mean()
    torch.testing.assert_close(shared.value.norm(), wanted * HEAD**0.5)
    other = factorize_value_output(head, out, moment(), seed=1)
    assert not torch.allclose(other.value, shared.value)
    torch.testing.assert_close(other.output @ other.value, shared.output @ shared.value)
    again = factorize_value_output(head, out, moment())
    assert torch.equal(again.value, shared.value)
    assert torch.equal(again.output, shared.output)
    rotary = factorize_key_query_rotary(head, query, moment())
    sizes = pairs_of(head).abs().square().sum(-1).mean(0).sqrt()
    torch.testing.assert_close(pairs_of(rotary.key).abs().square().sum(-1).sqrt(), sizes)


def test_the_centred_moment_ignores_a_shift_of_all_keys():
    head, _, query = heads()
    tokens = draw(50, INPUTS, seed=3) + 5
    c = tokens.T @ tokens / 50
    mean = tokens.mean(0)
    centred = c - torch.outer(mean, mean)
    best = factorize_key_query_full(head, query, c, key_moment=centred)
    plain = factorize_key_query_full(head, query, c)
    assert best.discarded_energy < plain.discarded_energy


def test_given_query_energies_replace_those_of_the_weights():
    head, _, query = heads()
    weights = rotary_query_energy(pairs_of(query), moment())
    given = factorize_key_query_rotary(head, query, moment(), query_energy=weights)
    assert torch.equal(given.key, factorize_key_query_rotary(head, query, moment()).key)
    favoured = torch.tensor([1e9, 1.0, 1.0]).double()[:, None].expand(3, HEAD // 2)
    one = factorize_key_query_rotary(head, query, moment(), query_energy=favoured)
    new, old = one.query[0].mT @ one.key, query[0].mT @ head[0]
    torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("group", [(0, 1, 2), (0, 2), (1,)])
def test_costs_of_groups_are_the_discarded_energies(group):
    head, out, query = heads()
    chosen, c = list(group), moment()
    gram = value_output_gram(head, out, c)
    shared = factorize_value_output(head[chosen], out[chosen], c)
    assert group_discarded_energy(gram, group) == pytest.approx(shared.discarded_energy, abs=1e-9)
    pairs = pairs_of(head)
    gram = rotary_gram(pairs, c, rotary_query_energy(pairs_of(query), c))
    rotary = factorize_key_query_rotary(head[chosen], query[chosen], c)
    assert group_discarded_energy(gram, group) == pytest.approx(rotary.discarded_energy, abs=1e-9)
    full = factorize_key_query_full(head[chosen], query[chosen], c)
    gram = key_query_gram(head, query, c)
    assert group_discarded_energy(gram, group) == pytest.approx(full.discarded_energy, abs=1e-9)


def test_shapes_that_do_not_belong_together_are_refused():
    head, out, query = heads()
    with pytest.raises(ValueError, match=r"output \[2, 2, 24, 8\] does not belong to value"):
        factorize_value_output(head, out[:2], moment())
    with pytest.raises(ValueError, match=r"moment \[20, 20\], expected \[19, 19\]"):
        factorize_value_output(head[..., :19], out, moment())
    with pytest.raises(ValueError, match=r"query \[2, 2, 8, 20\] does not belong to key"):
        factorize_key_query_full(head, query[:2], moment())
    with pytest.raises(ValueError, match="rotary_dim 7 is odd"):
        factorize_key_query_rotary(head[:, :7], query[:, :, :7], moment())
