"""The best shared head in closed form, and what merging heads costs."""

import itertools

import pytest
import torch

from uptrain.conversion import energy as energy_module
from uptrain.conversion.align import (
    align_key_query_full,
    align_key_query_rotary,
    align_value_output,
)
from uptrain.conversion.energy import (
    discarded_bound,
    group_discarded_energy,
    key_query_gram,
    mean_gram,
    pair_discarded_energy,
    rotary_gram,
    rotary_query_energy,
    total_energy,
    value_output_gram,
)
from uptrain.conversion.factorize import (
    factorize_key_query_full,
    factorize_key_query_rotary,
    factorize_value_output,
)
from uptrain.conversion.grouping import search
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


def least_squares_query(key, query, shared, c, interleaved=False):
    """The queries under which the scores of a shared key come nearest to the members' own."""
    keys, one = pairs_of(key, interleaved), pairs_of(shared, interleaved)
    weighted = (one @ c.to(one)).conj()
    scales = (keys * weighted).sum(-1) / (one * weighted).sum(-1)
    turned = pairs_of(query, interleaved) * scales.conj()[:, None, :, None]
    return real_rows(turned, interleaved=interleaved)


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
    least = least_squares_query(head, query, rotary.key, c)
    assert rotary_error(head, query, rotary.key, least, c) == tolerance
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


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_scores_of_each_member_keep_their_energy(interleaved):
    head, _, query = heads()
    c = moment()

    def score_energies(key, query):
        """E|q|² E|k|² of each member and pair."""
        keys, queries = pairs_of(key, interleaved), pairs_of(query, interleaved)
        found = ((keys @ c.to(keys)) * keys.conj()).sum(-1).real
        return rotary_query_energy(queries, c) * found

    wanted = score_energies(head, query)
    whole = factorize_key_query_rotary(head, query, c, interleaved=interleaved)
    least = least_squares_query(head, query, whole.key, c, interleaved)
    kept = score_energies(whole.key, least) / wanted
    assert kept.max() <= 1 + 1e-9
    assert kept.min() < 0.9
    # A member that hardly resembles the shared pair gets no more than a hundred times the energy.
    torch.testing.assert_close(
        score_energies(whole.key, whole.query) / wanted, (100 * kept).clamp(max=1)
    )


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


def test_a_member_of_zeros_gives_no_nan():
    head, _, query = heads()
    for size in (1e-6, 1, 1e6):
        key = head * size
        key[1] = 0
        for factorize in (factorize_key_query_rotary, factorize_key_query_full):
            shared = factorize(key, query, moment())
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


def shifted_tokens(bias=False):
    """Tokens [50, inputs] far from zero, their moment and their covariance."""
    tokens = draw(50, INPUTS, seed=3) + 5
    if bias:
        tokens[:, -1] = 1
    c = tokens.T @ tokens / 50
    mean = tokens.mean(0)
    return tokens, c, c - torch.outer(mean, mean)


def attention(key, query, tokens):
    """Probabilities [members, queries, tokens, tokens]."""
    return (((query @ tokens.T).mT @ (key @ tokens.T)) / 20).softmax(-1)


def test_keys_that_differ_by_a_shift_convert_exactly_under_the_covariance():
    head, query = draw(HEAD, INPUTS), heads()[2]
    tokens, c, covariance = shifted_tokens(bias=True)
    key = head.repeat(MEMBERS, 1, 1)
    key[..., -1] = draw(MEMBERS, HEAD, seed=6)
    shared = factorize_key_query_full(key, query, c, key_moment=covariance)
    assert shared.discarded_energy <= 1e-9 * shared.energy
    wanted = attention(key[:, None], query, tokens)
    torch.testing.assert_close(attention(shared.key, shared.query, tokens), wanted)
    plain = factorize_key_query_full(key, query, c)
    assert (attention(plain.key, plain.query, tokens) - wanted).abs().max() > 0.01


@pytest.mark.parametrize("seed", range(4))
def test_under_the_covariance_less_of_what_the_softmax_sees_is_lost(seed):
    head, _, query = heads(seed)
    _, c, covariance = shifted_tokens()

    def seen(shared):  # as `full_error`, with the keys' own moment
        score = query.mT @ head[:, None] - shared.query.mT @ shared.key
        return float(torch.einsum("mqab,ac,mqcd,bd->", score, c, score, covariance))

    best = factorize_key_query_full(head, query, c, key_moment=covariance)
    plain = factorize_key_query_full(head, query, c)
    assert seen(best) == pytest.approx(best.discarded_energy, rel=1e-8)
    assert seen(best) < seen(plain)


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


def grams():
    """Of each kind: any map, rotary pairs, the mean."""
    head, out, query = heads()
    pairs = pairs_of(head)
    return [
        value_output_gram(head, out, moment()),
        rotary_gram(pairs, moment(), rotary_query_energy(pairs_of(query), moment())),
        mean_gram(head, moment()),
    ]


@pytest.mark.parametrize("kind", range(3))
def test_costs_of_pairs_are_those_of_groups_of_two(kind, monkeypatch):
    gram = grams()[kind]
    found = pair_discarded_energy(gram)
    for a, b in itertools.combinations(range(MEMBERS), 2):
        expected = group_discarded_energy(gram, (a, b))
        assert found[a, b] == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(found, found.T)
    assert torch.equal(found.diagonal(), torch.zeros(MEMBERS).double())
    monkeypatch.setattr(energy_module, "_SLICE_NUMBERS", 1)
    torch.testing.assert_close(pair_discarded_energy(gram), found)


def test_the_mean_discards_what_lies_around_it():
    head = heads()[0]
    found = group_discarded_energy(mean_gram(head, moment()), tuple(range(MEMBERS)))
    assert found == pytest.approx(energy(head - head.mean(0), moment()))
    assert total_energy(mean_gram(head, moment())) == pytest.approx(energy(head, moment()))


def related_heads(count, size, inputs, seed):
    """Gram matrix of heads in shuffled groups of four that have much in common."""
    base = draw(count // 4, size, inputs, seed=seed).repeat_interleave(4, 0)
    rows = draw(count, size, size, seed=seed + 1) @ base / size**0.5
    rows = rows + 0.5 * draw(count, size, inputs, seed=seed + 2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    rows = rows[order].reshape(count * size, inputs)
    return (rows @ rows.T).reshape(count, size, count, size)


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_of_pairs_is_close_and_leads_to_groups_as_good(seed):
    count, size = 16, 16
    gram = related_heads(count, size, 64, seed)
    exact = pair_discarded_energy(gram)
    first, second = torch.triu_indices(count, count, 1)
    blocks = torch.stack(
        [
            gram[[a, b]][:, :, [a, b]].reshape(2 * size, 2 * size)
            for a, b in zip(first.tolist(), second.tolist(), strict=True)
        ]
    )
    bound = discarded_bound(blocks)
    wanted = exact[first, second]
    # An upper bound, to rounding; 4% and the correlation are what its docstring promises.
    assert (bound >= wanted * (1 - 1e-9)).all()
    assert (bound <= wanted * 1.04).all()
    assert torch.corrcoef(torch.stack([bound, wanted]))[0, 1] > 0.999
    table = torch.zeros_like(exact)
    table[first, second] = bound

    def found(pairs):
        groups = search(count, 4, lambda g: group_discarded_energy(gram, g), pair_cost=pairs)
        return sum(group_discarded_energy(gram, tuple(group)) for group in groups)

    assert found(table + table.T) <= found(exact) * (1 + 1e-9)


def test_the_bound_of_nothing_and_of_equal_heads():
    assert torch.equal(discarded_bound(torch.zeros(2, 8, 8).double()), torch.zeros(2).double())
    rows = draw(4, 20)
    twice = torch.cat((rows, rows))
    block = (twice @ twice.T)[None]
    assert discarded_bound(block) <= 1e-4 * block[0].trace()


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
