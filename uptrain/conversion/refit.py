"""Solve a projection anew, from moments of its inputs and of what it should produce.

The heads' outputs z of a converted layer are no longer those that the output projection was
trained on. It is fitted again by least squares to the target t: the original's attention output
plus what the residual stream has drifted by, so that each layer also repairs the layers before
it. The moments are sums over calibration tokens and can be gathered in any order.

Source: the project's docs/methods.md, "refit".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-3
"""Weight of staying at the present projection, as a part of the mean of E[z^2]."""


class Refit(NamedTuple):
    """A projection solved anew."""

    weight: Tensor
    """[outputs, inputs], float64."""
    error_before: float
    """sum |t - W z|^2 over the tokens with the old projection, as a part of sum |t|^2."""
    error_after: float
    """The same with the new one; never above `error_before`."""


def refit_projection(
    weight: Tensor, gram: Tensor, cross: Tensor, target_energy: float, *, ridge: float = RIDGE
) -> Refit:
    """Fit a linear projection to its target by ridge least squares towards its present value.

    Minimises sum |t - W' z|^2 + ridge * mean(diag(sum z z^T)) * |W' - W|^2. A bias is passed as
    one more input column, beside a constant 1 appended to z.

    Args:
        weight: [outputs, inputs], the present W.
        gram: [inputs, inputs], sum of z z^T over the tokens.
        cross: [inputs, outputs], sum of z t^T over the tokens.
        target_energy: Sum of |t|^2 over the tokens.
        ridge: At least 0. With 0, directions that no token has keep their present weights.

    Returns:
        The new projection and its error.

    Raises:
        ValueError: If the shapes do not belong together, or a moment is not finite.
    """
    outputs, inputs = weight.shape
    if tuple(gram.shape) != (inputs, inputs) or tuple(cross.shape) != (inputs, outputs):
        raise ValueError(
            f"moments {list(gram.shape)} and {list(cross.shape)} do not belong to a projection"
            f" [{outputs}, {inputs}]"
        )
    for name, moment in (("gram", gram), ("cross", cross)):
        if not bool(torch.isfinite(moment).all()):
            raise ValueError(f"{name} holds NaN or Inf")
    old = weight.double()
    gram = (gram.double() + gram.double().T) / 2
    cross = cross.double()
    # In the eigenbasis of the Gram matrix every direction is solved alone, so a direction without
    # energy divides by nothing: its step is zero.
    eigenvalues, vectors = torch.linalg.eigh(gram)
    floor = torch.finfo(torch.float64).eps * inputs * eigenvalues[-1].clamp(min=0)
    live = eigenvalues > floor
    penalty = ridge * gram.diagonal().mean().clamp(min=0)
    gain = torch.where(live, 1 / torch.where(live, eigenvalues + penalty, 1.0), 0.0)
    slope = cross - gram @ old.T
    new = old + (vectors @ (gain[:, None] * (vectors.T @ slope))).T
    return Refit(
        new,
        _relative_error(old, gram, cross, target_energy),
        _relative_error(new, gram, cross, target_energy),
    )


def _relative_error(weight: Tensor, gram: Tensor, cross: Tensor, target_energy: float) -> float:
    """Squared error as a part of the target's energy, from the moments."""
    error = target_energy - float(2 * (weight * cross.T).sum() - ((weight @ gram) * weight).sum())
    return max(0.0, error) / target_energy if target_energy > 0 else max(0.0, error)
