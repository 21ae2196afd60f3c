"""What merging heads costs: the energy that the best shared head of a group discards.

The error of `factorize` for any group follows from inner products between all heads' rows, so the
Gram matrices below are formed once for a layer and every grouping is judged from their blocks.

Words for the shapes: `heads` source KV heads, `queries` query heads that read each, `inputs`
features of the projections' input; a bias is one more input column. Float64 throughout.

Source: the project's docs/methods.md, "factorize".
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-12
"""Smallest part of a largest eigenvalue that is told from zero."""


def value_output_gram(value: Tensor, output: Tensor, moment: Tensor) -> Tensor:
    """Inner products of all heads' value-output rows, from which any group's error follows.

    Args:
        value: [heads, head_dim, inputs].
        output: [heads, queries, hidden_size, head_dim].
        moment: [inputs, inputs].

    Returns:
        [heads, head_dim, heads, head_dim], float64.
    """
    heads, head_dim, inputs = value.shape
    stacked = output_rows(value, output)[1].reshape(heads * head_dim, inputs)
    return (stacked @ moment.double() @ stacked.T).reshape(heads, head_dim, heads, head_dim)


def key_query_gram(
    key: Tensor,
    query: Tensor,
    moment: Tensor,
    *,
    key_moment: Tensor | None = None,
    query_moment: Tensor | None = None,
) -> Tensor:
    """Like `value_output_gram`, for keys without rotary embedding.

    Args:
        key: [heads, head_dim, inputs].
        query: [heads, queries, head_dim, inputs].
        moment: [inputs, inputs].
        key_moment: [inputs, inputs], as in `factorize_key_query_full`.
        query_moment: [heads, head_dim, head_dim], as in `factorize_key_query_full`.

    Returns:
        [heads, head_dim, heads, head_dim], float64.
    """
    heads, head_dim, inputs = key.shape
    root, _ = query_roots(query, moment, query_moment)
    stacked = (root @ key.double()).reshape(heads * head_dim, inputs)
    used = moment.double() if key_moment is None else key_moment.double()
    return (stacked @ used @ stacked.T).reshape(heads, head_dim, heads, head_dim)


def rotary_gram(keys: Tensor, moment: Tensor, weights: Tensor) -> Tensor:
    """Inner products of all heads' rotary pairs, weighted by the energy of their queries.

    Args:
        keys: [heads, pairs, inputs], complex128, from `complex_pairs`.
        moment: [inputs, inputs].
        weights: [heads, pairs], the queries' energy; a pair that no query feels weighs 1.

    Returns:
        [pairs, heads, heads], complex128, Hermitian.
    """
    weighted = (keys * safe_weights(weights).sqrt()[..., None]).transpose(0, 1)
    return weighted @ moment.to(keys.dtype) @ weighted.mH


def rotary_query_energy(queries: Tensor, moment: Tensor) -> Tensor:
    """Second moment of each rotary pair of the queries.

    Args:
        queries: [heads, queries, pairs, inputs], complex128, from `complex_pairs`.
        moment: [inputs, inputs].

    Returns:
        [heads, pairs], float64, summed over the query heads that read a KV head.
    """
    return ((queries @ moment.to(queries.dtype)) * queries.conj()).sum(-1).real.sum(1)


def group_discarded_energy(gram: Tensor, group: tuple[int, ...]) -> float:
    """The error of merging a group, from a Gram matrix of all heads.

    Args:
        gram: [heads, head_dim, heads, head_dim] (any linear map) or [pairs, heads, heads]
            (rotary pairs).
        group: The heads to merge.

    Returns:
        The energy that the best shared head discards.
    """
    index = torch.tensor(group, device=gram.device)
    if gram.dim() == 3:
        block = gram[:, index][:, :, index]
        return float(torch.linalg.eigvalsh(block)[..., :-1].clamp(min=0).sum())
    size = len(group) * gram.shape[1]
    block = gram[index][:, :, index].reshape(size, size)
    return float(torch.linalg.eigvalsh(block)[: size - gram.shape[1]].clamp(min=0).sum())


def output_rows(value: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Split the output slices into orthogonal columns and what is left for the values.

    Returns:
        [members, queries, hidden_size, k] with orthonormal columns over (queries, hidden_size),
        and R_i Wv_i [members, k, inputs], where k = head_dim.
    """
    members, queries, hidden_size, head_dim = output.shape
    tall = output.double().reshape(members, queries * hidden_size, head_dim)
    missing = head_dim - tall.shape[1]
    if missing > 0:  # fewer rows than columns: pad, so that the factors keep their shapes
        tall = torch.nn.functional.pad(tall, (0, 0, 0, missing))
    orthogonal, triangular = torch.linalg.qr(tall)
    orthogonal = orthogonal[:, : queries * hidden_size]
    return (
        orthogonal.reshape(members, queries, hidden_size, head_dim),
        triangular @ value.double(),
    )


def query_roots(
    query: Tensor, moment: Tensor, query_moment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Root of each member's query moment, and its inverse: both [members, head_dim, head_dim]."""
    if query_moment is None:
        rows = query.double()
        query_moment = (rows @ moment.double() @ rows.mT).sum(1)
    eigenvalues, vectors = torch.linalg.eigh(query_moment.double())
    largest = eigenvalues[..., -1:]
    eigenvalues = torch.where(
        largest > 0, torch.maximum(eigenvalues, FLOOR * largest), torch.ones_like(eigenvalues)
    )
    roots = eigenvalues.sqrt()[..., None, :]
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def safe_weights(weights: Tensor) -> Tensor:
    """Weights [members, pairs], float64, with 1 for all members of a pair that has none."""
    weights = weights.double().clamp(min=0)
    return torch.where(weights.sum(0) > 0, weights, 1.0)
