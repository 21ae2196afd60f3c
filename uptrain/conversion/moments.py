"""Second moments of what enters an attention block, from text or from the gains of its norm."""

from collections.abc import Callable, Iterable
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from uptrain.conversion.attention import AttentionNames
from uptrain.conversion.fit import Rows, Run
from uptrain.conversion.partway import reach_attention

_SIGN_ROWS, _SIGN_LENGTH = 32, 16


class Moments(NamedTuple):
    """Second moments of what enters an attention block, [inputs, inputs], float64.

    With a constant 1 appended to it where there are biases.
    """

    moment: Tensor
    """E[x xᵀ] of what keys and values are made of."""
    covariance: Tensor
    """E[x xᵀ] − E[x] E[x]ᵀ of the same."""
    query_moment: Tensor | None
    """E[x xᵀ] of what queries are made of; None if that is the same."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Moments":
        """Put something else in the place of each."""
        query = None if self.query_moment is None else change(self.query_moment)
        return Moments(change(self.moment), change(self.covariance), query)


@torch.no_grad()
def input_moments(
    layer: nn.Module, names: AttentionNames, run: Run, batches: Iterable[tuple[Tensor, Rows]]
) -> Moments:
    """Take the second moments of an attention block's input.

    Args:
        layer: The layer.
        names: Where its attention block is.
        run: Runs the whole layer.
        batches: What enters the layer, each [sequences, length, hidden_size], and which sequences of
            the text these are.
    """
    seen: dict[str, list[Tensor]] = {}

    def keep(leaf: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(leaf, []).append(args[0])

        projection = layer.get_submodule(f"{names.module}.{leaf}")
        return projection.register_forward_pre_hook(hook)

    handles = [keep(leaf) for leaf in {names.key, names.query}]
    sums: dict[str, _Sums] = {}
    try:
        for batch, rows in batches:
            reach_attention(layer, [names], run, batch, rows)
            keys, queries = seen[names.key], seen[names.query]
            of_both = len(keys) == len(queries) and all(map(is_, keys, queries))
            for leaf in {names.key, names.query} if not of_both else {names.key}:
                for entering in seen[leaf]:  # merged attention makes keys of two inputs
                    sums.setdefault(leaf, _Sums()).add(entering, names.has_bias)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    key = sums[names.key]
    moment = key.products / key.tokens
    mean = moment[-1] if names.has_bias else key.values / key.tokens
    covariance = moment - torch.outer(mean, mean)
    query = sums.get(names.query) if names.query != names.key else None
    return Moments(moment, covariance, None if query is None else query.products / query.tokens)


class _Sums:
    """Sums over tokens."""

    def __init__(self) -> None:
        self.products = self.values = torch.zeros(())
        self.tokens = 0

    def add(self, entering: Tensor, has_bias: bool) -> None:
        entering = entering.flatten(0, -2).float()
        if has_bias:
            entering = torch.cat([entering, torch.ones_like(entering[:, :1])], dim=1)
        device = entering.device
        self.products = self.products.to(device) + (entering.T @ entering).double()
        self.values = self.values.to(device) + entering.sum(0).double()
        self.tokens += len(entering)


def balanced_signs(width: int) -> Tensor:
    """Draw rows that pass a norm unchanged, so that what comes out of it is its gain.

    Each goes with its negative, so that a LayerNorm's offset does not mix with the gain.

    Args:
        width: Of the layer's input.

    Returns:
        [sequences, length, width], half of each row 1 and half −1; short enough for any model.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(_SIGN_ROWS, width, generator=generator).argsort(-1)
    signs = torch.where(order < width // 2, 1.0, -1.0)
    return torch.cat([signs, -signs]).view(-1, _SIGN_LENGTH, width)
