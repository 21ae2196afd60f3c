"""Turn the heads of a group towards each other, then average them.

Heads are only defined up to a change of basis; the mean of heads in unrelated bases cancels. Here
each member is turned onto the group's running mean by the rotation that fits best, which its
output slices (for V) or its queries (for K) undo exactly, and the mean of the turned heads is
scaled back to the members' average norm. All of it stays inside rotations, so it is also allowed
where a norm by head follows the projection, as far as its gains commute with them.

Words for the shapes are those of `factorize`: `members` source KV heads, `queries` query heads
that read each, `inputs` features of the projections' input; a bias is one more input column. The
second moment of the input is optional: without it, all inputs weigh the same. Float64 throughout.

Source: Jin et al. 2024, arXiv:2412.20677, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from uptrain.conversion.rotary import complex_pairs, real_rows

ITERATIONS = 20
"""Rounds of turning all members and averaging anew; the error never grows from one to the next."""

_NOTHING = 1e-12
"""A norm below this part of the members' counts as zero."""


class AlignedValue(NamedTuple):
    """The mean of turned V heads with the output slices that undo the turns."""

    value: Tensor
    """[head_dim, inputs], float64."""
    output: Tensor
    """[members, queries, hidden_size, head_dim], float64."""
    residual: float
    """sum_i |(R_i Wv_i - mean) C^(1/2)|^2, before norms are restored."""


class AlignedKey(NamedTuple):
    """The mean of turned K heads with the query projections turned alike."""

    key: Tensor
    """[head_dim, inputs], float64."""
    query: Tensor
    """[members, queries, head_dim, inputs], float64."""
    residual: float
    """sum_i |(R_i Wk_i - mean) C^(1/2)|^2, before norms are restored."""


def align_value_output(
    value: Tensor,
    output: Tensor,
    moment: Tensor | None = None,
    *,
    restore_norms: bool = True,
    iterations: int = ITERATIONS,
) -> AlignedValue:
    """Share one V head in a group by orthogonal Procrustes and the mean.

    Args:
        value: [members, head_dim, inputs], Wv.
        output: [members, queries, hidden_size, head_dim], the slices of Wo that read each member.
        moment: [inputs, inputs], C = E[x x^T]; None for the identity.
        restore_norms: Scale the mean to the members' average norm.
        iterations: Rounds of turning and averaging; 0 is the plain mean.

    Returns:
        The shared head, the new output slices, and the error.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    if output.shape[0] != value.shape[0] or output.shape[3] != value.shape[1]:
        raise ValueError(
            f"output {list(output.shape)} does not belong to value {list(value.shape)}"
        )
    turns, shared, residual = _procrustes(value.double(), moment, iterations, restore_norms)
    return AlignedValue(shared, output.double() @ turns.mT[:, None], residual)


def align_key_query_full(
    key: Tensor,
    query: Tensor,
    moment: Tensor | None = None,
    *,
    restore_norms: bool = True,
    iterations: int = ITERATIONS,
) -> AlignedKey:
    """Share one K head in a group where no rotary embedding stands between queries and keys.

    Args:
        key: [members, head_dim, inputs], Wk or a slice of its rows.
        query: [members, queries, head_dim, inputs], the same rows of Wq.
        moment: [inputs, inputs], C = E[x x^T]; None for the identity.
        restore_norms: Scale the mean to the members' average norm.
        iterations: Rounds of turning and averaging; 0 is the plain mean.

    Returns:
        The shared rows, the new query rows, and the error.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    _check_pairing(key, query)
    turns, shared, residual = _procrustes(key.double(), moment, iterations, restore_norms)
    return AlignedKey(shared, turns[:, None] @ query.double(), residual)


def align_key_query_rotary(
    key: Tensor,
    query: Tensor,
    moment: Tensor | None = None,
    *,
    interleaved: bool = False,
    signs: bool = False,
    restore_norms: bool = True,
    iterations: int = ITERATIONS,
) -> AlignedKey:
    """Share one K head in a group under rotary embedding: one rotation for each rotary pair.

    Args:
        key: [members, rotary_dim, inputs], the rotary rows of Wk.
        query: [members, queries, rotary_dim, inputs], the rotary rows of Wq.
        moment: [inputs, inputs], C = E[x x^T]; None for the identity.
        interleaved: Rows 2m and 2m + 1 are a pair, else rows m and m + rotary_dim / 2.
        signs: Turn a pair by 0 or 180 degrees only: all that a norm by channel leaves free.
        restore_norms: Scale each pair of the mean to the members' average norm of that pair.
        iterations: Rounds of turning and averaging; 0 is the plain mean.

    Returns:
        The shared rows, the new query rows, and the error.

    Raises:
        ValueError: If the shapes do not belong together or rotary_dim is odd.
    """
    _check_pairing(key, query)
    keys = complex_pairs(key.double(), interleaved=interleaved)
    weighted = keys if moment is None else keys @ moment.to(keys)
    norms = (weighted * keys.conj()).sum(-1).real.clamp(min=0).sqrt()
    members = torch.eye(len(keys), 1, dtype=torch.float64, device=keys.device)
    phases = torch.ones(keys.shape[:2], dtype=keys.dtype, device=keys.device)
    for _ in range(iterations):
        mean = (phases[..., None] * keys).mean(0)
        size = _weighted_norms(mean, moment)
        vanished = size <= _NOTHING * norms.mean(0)
        if bool(vanished.any()):  # k and -k: turn towards the first member instead
            first = (members[..., None] * phases[..., None] * keys).sum(0)
            mean = torch.where(vanished[:, None], first, mean)
            size = torch.where(vanished, norms[0], size)
        inner = torch.einsum("pi,mpi->mp", mean, weighted.conj())
        if signs:
            inner = inner.real.to(inner.dtype)
        length = inner.abs()
        undefined = length <= _NOTHING * norms * size
        phases = torch.where(undefined, phases, inner / torch.where(undefined, 1.0, length))
    turned = phases[..., None] * keys
    shared = turned.mean(0)
    residual = float(_weighted_norms(turned - shared, moment).square().sum())
    if restore_norms:
        size = _weighted_norms(shared, moment)
        shared = shared * _restoring(size, norms.mean(0))[:, None]
    new_query = complex_pairs(query.double(), interleaved=interleaved) * phases[:, None, :, None]
    return AlignedKey(
        real_rows(shared, interleaved=interleaved),
        real_rows(new_query, interleaved=interleaved),
        residual,
    )


def _procrustes(
    heads: Tensor, moment: Tensor | None, iterations: int, restore_norms: bool
) -> tuple[Tensor, Tensor, float]:
    """Turn heads [members, head_dim, inputs] onto their running mean.

    Returns:
        The turns [members, head_dim, head_dim], the mean of the turned heads
        [head_dim, inputs], and the error before norms are restored.
    """
    members, head_dim, _ = heads.shape
    weighted = heads if moment is None else heads @ moment.double()
    norms = (weighted * heads).sum((-2, -1)).clamp(min=0).sqrt()
    identity = torch.eye(head_dim, dtype=torch.float64, device=heads.device)
    turns = identity.expand(members, -1, -1)
    for _ in range(iterations):
        mean = (turns @ heads).mean(0)
        size = float(_weighted_norms(mean, moment).norm())
        if size <= _NOTHING * float(norms.mean()):  # opposed members: turn towards the first
            mean, size = turns[0] @ heads[0], float(norms[0])
        # What the data leave undefined stays as it is.
        anchor = _NOTHING * size * norms[:, None, None] * turns
        left, values, right = torch.linalg.svd(mean @ weighted.mT + anchor)
        defined = (values.amax(-1) > 0)[:, None, None]
        turns = torch.where(defined, left @ right, turns)
    turned = turns @ heads
    shared = turned.mean(0)
    residual = float(_weighted_norms(turned - shared, moment).square().sum())
    if restore_norms:
        size_now = _weighted_norms(shared, moment).norm()
        shared = shared * _restoring(size_now, norms.mean())
    return turns, shared, residual


def _weighted_norms(rows: Tensor, moment: Tensor | None) -> Tensor:
    """|row C^(1/2)| of rows [..., inputs]: [...], float64."""
    weighted = rows if moment is None else rows @ moment.to(rows)
    return (weighted * rows.conj()).sum(-1).real.clamp(min=0).sqrt()


def _restoring(size: Tensor, wanted: Tensor) -> Tensor:
    """The factor that brings a norm to the wanted one; 1 where there is nothing to scale."""
    nothing = size <= _NOTHING * wanted
    return torch.where(nothing, 1.0, wanted / torch.where(nothing, 1.0, size))


def _check_pairing(key: Tensor, query: Tensor) -> None:
    """Raise ValueError unless query [m, q, d, …] belongs to key [m, d, …]."""
    if (query.shape[0], query.shape[2]) != tuple(key.shape[:2]):
        raise ValueError(f"query {list(query.shape)} does not belong to key {list(key.shape)}")
