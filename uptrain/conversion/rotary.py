"""Rotary pairs as complex rows.

Rotary position embedding turns the two channels of a pair by one angle, which is a product with a
unit complex number when the pair is read as one. A query and a key pair then score Re(conj(q) k).
"""

import torch
from torch import Tensor


def complex_pairs(rows: Tensor, *, interleaved: bool) -> Tensor:
    """View rotary rows as complex rows.

    Args:
        rows: [..., rotary_dim, inputs], float64.
        interleaved: Rows 2m and 2m + 1 are a pair (GPT-J, Cohere), else rows m and
            m + rotary_dim / 2 (Llama).

    Returns:
        [..., rotary_dim / 2, inputs], complex128.

    Raises:
        ValueError: If rotary_dim is odd.
    """
    rotary_dim = rows.shape[-2]
    if rotary_dim % 2:
        raise ValueError(f"rotary_dim {rotary_dim} is odd; rotary rows come in pairs")
    if interleaved:
        return torch.complex(rows[..., 0::2, :], rows[..., 1::2, :])
    half = rotary_dim // 2
    return torch.complex(rows[..., :half, :], rows[..., half:, :])


def real_rows(pairs: Tensor, *, interleaved: bool) -> Tensor:
    """Undo `complex_pairs`.

    Args:
        pairs: [..., pairs, inputs], complex128.
        interleaved: As in `complex_pairs`.

    Returns:
        [..., 2 * pairs, inputs], float64.
    """
    if interleaved:
        return torch.stack((pairs.real, pairs.imag), dim=-2).flatten(-3, -2)
    return torch.cat((pairs.real, pairs.imag), dim=-2)
