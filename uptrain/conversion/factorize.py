"""The best shared KV head of a group, in closed form.

A group of source KV heads is replaced by one shared head, and each member gets a linear map from
the shared head to its own, which its query projection (for K) or its output projection (for V)
absorbs at no cost. The mean and the aligned mean are special cases; the functions here find the
best of all of them under the second moment of the block's input, by a truncated singular value
decomposition of which only small Gram matrices are formed. Neither a root nor an inverse of the
moment is needed, so a rank-deficient one is safe.

Words used for the shapes: `members` source KV heads in the group, `queries` query heads that read
each of them, `head_dim` (or the slice of it that is treated), `inputs` the input features of the
projections. A projection with a bias is passed with the bias as one more input column, beside a
moment of the input with a constant 1 appended. Everything is computed in float64.

Source: the project's docs/methods.md, "factorize".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from uptrain.conversion.energy import (
    FLOOR,
    output_rows,
    query_roots,
    rotary_gram,
    rotary_query_energy,
    safe_weights,
)
from uptrain.conversion.rotary import complex_pairs, real_rows

_LEAST_COSINE = 0.1
"""A member that the shared pair resembles less than this gets at most ten times its least squares."""
_TINY = torch.finfo(torch.float64).tiny


class SharedValue(NamedTuple):
    """A shared V head with the output slices that go with it."""

    value: Tensor
    """[head_dim, inputs], float64."""
    output: Tensor
    """[members, queries, hidden_size, head_dim], float64."""
    discarded_energy: float
    """The squared error that is left, summed over the members' query heads."""
    energy: float
    """The same sum for outputs of zero: what `discarded_energy` is a part of."""


class SharedKey(NamedTuple):
    """A shared K head with the query projections that go with it."""

    key: Tensor
    """[head_dim, inputs], float64."""
    query: Tensor
    """[members, queries, head_dim, inputs], float64."""
    discarded_energy: float
    """The squared error of the scores that is left, with queries and keys taken as independent."""
    energy: float
    """The same sum for scores of zero."""


def factorize_value_output(
    value: Tensor, output: Tensor, moment: Tensor, *, seed: int = 0
) -> SharedValue:
    """Share one V head in a group and let each output slice absorb its member's map.

    Minimises sum_ij |(Wo_ij Wv_i - Wo'_ij Wv') C^(1/2)|^2 over a shared Wv' and free Wo'_ij.
    The shared head's free basis is then fixed: rows scaled to the members' mean row norm, then
    turned by a random orthogonal matrix drawn from `seed`, which spreads the energy over the rows.

    Args:
        value: [members, head_dim, inputs], Wv.
        output: [members, queries, hidden_size, head_dim], the slices of Wo that read each member.
        moment: [inputs, inputs], C = E[x x^T] of the block's input, uncentred.
        seed: Of the rotation; the result's product Wo' Wv' does not depend on it.

    Returns:
        The shared head, the new output slices, and the error.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    members, head_dim, inputs = value.shape
    if output.shape[0] != members or output.shape[3] != head_dim:
        raise ValueError(
            f"output {list(output.shape)} does not belong to value {list(value.shape)}"
        )
    _check_moment(moment, inputs)
    orthogonal, rows = output_rows(value, output)
    moment = moment.double()
    stacked = rows.reshape(members * head_dim, inputs)
    basis, kept, energy = _leading(stacked @ moment @ stacked.T, head_dim)
    shared = basis.T @ stacked
    blocks = basis.reshape(members, head_dim, head_dim)
    scale = _row_scale(shared, value.double().norm(dim=-1).mean())
    turn = _rotation(head_dim, seed).to(value.device)
    new_output = torch.einsum("mqhk,mkd->mqhd", orthogonal, blocks / scale) @ turn.T
    return SharedValue(
        turn @ (shared * scale[:, None]), new_output, max(0.0, energy - kept), energy
    )


def factorize_key_query_rotary(
    key: Tensor,
    query: Tensor,
    moment: Tensor,
    *,
    key_moment: Tensor | None = None,
    interleaved: bool = False,
) -> SharedKey:
    """Share one K head in a group under rotary position embedding.

    A complex scale of a rotary pair commutes with every rotation, so each pair of each member may
    be any complex multiple of the shared pair, undone on the same pair of the queries. Minimises,
    for each pair, sum_i w_i |(k_i - a_i k') C^(1/2)|^2 with w_i = E|q_i|^2: a rank-1 problem.
    The shared pair's free scale is fixed at the members' mean norm, its phase so that the largest
    a_i is positive. Least squares makes scores smaller where the shared pair fits a member badly,
    and a softmax of smaller scores is flatter; so each a_i is then scaled to give the member's
    scores their energy back.

    Args:
        key: [members, rotary_dim, inputs], the rotary rows of Wk.
        query: [members, queries, rotary_dim, inputs], the rotary rows of Wq.
        moment: [inputs, inputs], C = E[x x^T] of the block's input, uncentred.
        key_moment: [inputs, inputs], used for the keys in place of `moment`.
        interleaved: Rows 2m and 2m + 1 are a pair (GPT-J), else rows m and m + rotary_dim / 2.

    Returns:
        The shared rows, the new query rows, and the error of least squares.

    Raises:
        ValueError: If the shapes do not belong together or rotary_dim is odd.
    """
    used = moment if key_moment is None else key_moment
    _check_pairing(key, query)
    _check_moment(moment, query.shape[3])
    _check_moment(used, key.shape[2])
    keys = complex_pairs(key.double(), interleaved=interleaved)
    queries = complex_pairs(query.double(), interleaved=interleaved)
    weights = rotary_query_energy(queries, moment.double())
    moment = used.double()
    grams = rotary_gram(keys, moment, weights)
    eigenvalues, vectors = torch.linalg.eigh(grams)
    roots = safe_weights(weights).sqrt().T
    combination = vectors[..., -1].conj() * roots
    shared = torch.einsum("pm,mpi->pi", combination, keys)
    projected = shared @ moment.to(shared.dtype)
    norms = (projected * shared.conj()).sum(-1).real
    inner = torch.einsum("mpi,pi->mp", keys, projected.conj())
    degenerate = norms <= FLOOR * norms.max().clamp(min=_TINY)
    scales = torch.where(degenerate, 1.0, inner / torch.where(degenerate, 1.0, norms))
    own = ((keys @ moment.to(keys.dtype)) * keys.conj()).sum(-1).real.clamp(min=0)
    norms = norms.clamp(min=_TINY)
    cosine = scales.abs() * (norms / torch.maximum(own, FLOOR * norms)).sqrt()
    scales = scales / torch.where(degenerate, 1.0, cosine.clamp(_LEAST_COSINE, 1.0))
    scales, shared = _fix_phase(scales, shared)
    target = keys.abs().square().sum(-1).mean(0).sqrt()
    size = shared.abs().square().sum(-1).sqrt()
    factor = torch.where((size > 0) & (target > 0), target / size, 1.0)
    shared, scales = shared * factor[:, None], scales / factor
    new_query = queries * scales.conj()[:, None, :, None]
    energy = float(torch.diagonal(grams, dim1=-2, dim2=-1).real.sum())
    discarded = float(eigenvalues[..., :-1].clamp(min=0).sum())
    return SharedKey(
        real_rows(shared, interleaved=interleaved),
        real_rows(new_query, interleaved=interleaved),
        discarded,
        energy,
    )


def factorize_key_query_full(
    key: Tensor,
    query: Tensor,
    moment: Tensor,
    *,
    key_moment: Tensor | None = None,
    seed: int = 0,
) -> SharedKey:
    """Share one K head in a group where no rotary embedding stands between queries and keys.

    Any linear map M_i may lead from the shared head to a member, undone on the member's queries.
    Minimises sum_i |R_i (Wk_i - M_i Wk') C^(1/2)|^2 with R_i^2 the second moment of the queries.
    Also for the pass-through rows of a partial rotary head.

    Args:
        key: [members, head_dim, inputs], Wk or a slice of its rows.
        query: [members, queries, head_dim, inputs], the same rows of Wq.
        moment: [inputs, inputs], C = E[x x^T] of the block's input, uncentred.
        key_moment: [inputs, inputs], used for the keys in place of `moment`: the centred moment,
            where a shift of all keys cancels in the softmax (no attention sink), or that of another
            input, where queries and keys are not made of the same.
        seed: Of the rotation that fixes the free basis.

    Returns:
        The shared rows, the new query rows, and the error.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    _check_pairing(key, query)
    members, head_dim, inputs = key.shape
    used = moment.double() if key_moment is None else key_moment.double()
    _check_moment(moment, query.shape[3])
    _check_moment(used, inputs)
    root, inverse = query_roots(query, moment)
    stacked = (root @ key.double()).reshape(members * head_dim, inputs)
    basis, kept, energy = _leading(stacked @ used @ stacked.T, head_dim)
    shared = basis.T @ stacked
    scale = _row_scale(shared, key.double().norm(dim=-1).mean())
    turn = _rotation(head_dim, seed).to(key.device)
    maps = inverse @ (basis.reshape(members, head_dim, head_dim) / scale) @ turn.T
    new_query = torch.einsum("mkd,mqki->mqdi", maps, query.double())
    return SharedKey(turn @ (shared * scale[:, None]), new_query, max(0.0, energy - kept), energy)


def _leading(gram: Tensor, rank: int) -> tuple[Tensor, float, float]:
    """Leading eigenvectors [n, rank], their summed eigenvalues, and the trace."""
    eigenvalues, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    kept = float(eigenvalues[-rank:].clamp(min=0).sum())
    return vectors[:, -rank:].flip(1), kept, float(eigenvalues.clamp(min=0).sum())


def _row_scale(rows: Tensor, norm: Tensor) -> Tensor:
    """Factor [rows] that gives each row this norm; 1 for rows that are nearly zero."""
    norms = rows.norm(dim=-1)
    zero = norms <= FLOOR * norms.max()
    return torch.where(zero | (norm <= 0), 1.0, norm / torch.where(zero, 1.0, norms))


def _rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix [size, size], float64, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(size, size, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(draw)
    turn: Tensor = orthogonal * triangular.diagonal().sign()
    return turn


def _fix_phase(scales: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each shared pair so that the largest of its members' scales [members, pairs] is > 0."""
    largest = scales.gather(0, scales.abs().argmax(0, keepdim=True))[0]
    size = largest.abs()
    phase = torch.where(size > 0, largest / torch.where(size > 0, size, 1.0), 1.0)
    return scales * phase.conj(), shared * phase[:, None]


def _check_pairing(key: Tensor, query: Tensor) -> None:
    """Raise ValueError unless query [m, q, d, …] belongs to key [m, d, …]."""
    if (query.shape[0], query.shape[2]) != tuple(key.shape[:2]):
        raise ValueError(f"query {list(query.shape)} does not belong to key {list(key.shape)}")


def _check_moment(moment: Tensor, inputs: int) -> None:
    """Raise ValueError unless the moment is [inputs, inputs]."""
    if tuple(moment.shape) != (inputs, inputs):
        raise ValueError(f"moment {list(moment.shape)}, expected [{inputs}, {inputs}]")
